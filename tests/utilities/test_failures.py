"""Failures in one sentence: of a class that explains itself, with --debug as a traceback, of several processes once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launchers import tiny
from utilities.distributed import ProcessFailedError
from utilities.failures import DEBUG, failures_in_one_sentence

ROOT = Path(__file__).parents[2]


def test_an_error_is_one_line_and_exit_code_1(capsys):
    with pytest.raises(SystemExit) as ended, failures_in_one_sentence():
        raise ValueError("Argument `x` expected\n    one line but got two.")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: Argument `x` expected one line but got two. (`--debug` shows where.)\n"


def test_a_defect_keeps_its_traceback():
    with pytest.raises(AttributeError), failures_in_one_sentence():
        raise AttributeError("ours")


def test_debug_is_taken_off_the_command_line_and_lets_errors_pass(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--debug"])
    monkeypatch.setenv(DEBUG, "")
    with pytest.raises(ValueError, match="whole"), failures_in_one_sentence():
        assert sys.argv == ["train.py", "fit"] and os.environ[DEBUG] == "1"  # processes that are started have it too
        raise ValueError("whole")


def test_what_another_process_has_said_is_not_said_again(capsys):
    with pytest.raises(SystemExit), failures_in_one_sentence():
        raise ProcessFailedError("Process 0 of 2 failed")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--trainer.callbacks.sparcity=0.5", "Unknown setting `trainer.callbacks.sparcity`"),  # before they are connected
        ("--trainer.callbacks.ignore=[head]", "`ignore`: 'head' matches no linear"),  # after
    ],
)
def test_several_processes_say_it_once(setting, message, tmp_path):
    model, text = tiny(tmp_path)
    data = {"source": text, "seq_len": 16, "num_calibration": 8, "num_heldout": 2}
    options = [f"--data.{name}={value}" for name, value in data.items()]
    command = [sys.executable, str(ROOT / "train.py"), "fit", "--config", str(ROOT / "configs/quickstart.yaml"), *options]
    command += ["--model.model_name_or_path", model, "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.logger=false"]
    command += ["--trainer.accelerator=cpu", setting]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode in (1, 2), done.stderr
    said = re.findall(r"error: .*", done.stderr)  # perhaps after a progress bar, which has not ended its line
    assert len(said) == 1 and message in said[0], done.stderr
    assert "Traceback" not in done.stderr

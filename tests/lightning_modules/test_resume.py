"""Killed by SIGKILL and resumed from last.ckpt, training gives bitwise the weights of the uninterrupted run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers.resumed_runs import CASES, KILLED_IN_EPOCH
from train import main

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter", "ignore:.*Jsonargparse")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Per case, what the script found."""
    folder = tmp_path_factory.mktemp("resumed")
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/helpers/resumed_runs.py"), str(folder)]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_the_uninterrupted_run(name, found):
    run = found[name]
    assert run["signal"] == signal.SIGKILL and run["epoch"] == KILLED_IN_EPOCH - 1
    assert run["differing"] == []
    assert any("weight" in key for key in run["moved"])  # it did go on
    assert not any("factor" in key for key in run["moved"])  # averaging weights leaves them alone, too


def test_the_random_state_is_asked_for_only_where_it_matters(tmp_path):
    """Reading a checkpoint without a trainer, or to measure, leaves the random state as it is."""
    from lightning_modules import NodeClassifier

    module, checkpoint = NodeClassifier(), {}
    module.on_save_checkpoint(checkpoint)
    torch.rand(3)
    before = torch.get_rng_state()
    module.on_load_checkpoint(checkpoint)
    assert torch.equal(torch.get_rng_state(), before)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True).keys() == {"random_state"}


def config(folder):
    content = yaml.safe_load((ROOT / "configs/csg2l/karate.yaml").read_text())
    content["trainer"] |= {"accelerator": "cpu", "max_epochs": 40, "enable_progress_bar": False}
    content["trainer"]["logger"]["init_args"] |= {"save_dir": str(folder), "name": "run"}
    content["trainer"]["callbacks"] = [
        entry for entry in content["trainer"]["callbacks"] if "Monitor" not in entry["class_path"]
    ]
    labels = {"class_path": "PredictedLabels", "init_args": {"warmup_epochs": 3}}
    content["model"]["init_args"] |= {"pseudo_labels": labels, "dropout": 0.5}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def command(path, *arguments):
    return [sys.executable, "-W", "ignore", str(ROOT / "train.py"), "fit", "--config", str(path), *arguments]


def test_last_goes_on_with_the_newest_run_in_two_processes(tmp_path):
    """Two processes that are killed and go on, and one that is left in peace, end with the same file."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir(), whole.mkdir()
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    running = subprocess.Popen(
        command(config(killed), *two), cwd=killed, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    last = killed / "run/version_0/checkpoints/last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    stopped = torch.load(last, weights_only=True)["epoch"]
    assert stopped < 39
    arguments = command(config(killed), *two, "--ckpt_path", "last")
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    resumed = subprocess.Popen(arguments, cwd=killed, env=ENVIRONMENT, **pipes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the others: sums depend on it
    try:
        main(["fit", "--config", str(config(whole))])
        _, errors = resumed.communicate(timeout=1800)
    finally:
        torch.set_num_threads(threads)
        resumed.kill()
    assert resumed.returncode == 0, errors[-5000:]
    assert [path.name for path in (killed / "run").iterdir()] == ["version_0"]
    first, second = (torch.load(where / "run/version_0/checkpoints/last.ckpt", weights_only=True) for where in (killed, whole))
    assert first["epoch"] == second["epoch"] == 39
    assert all(torch.equal(value, first["state_dict"][key]) for key, value in second["state_dict"].items())
    best = [torch.load(where / "run/version_0/checkpoints/best.ckpt", weights_only=True)["epoch"] for where in (killed, whole)]
    assert best[0] == best[1]


def test_last_is_an_error_where_there_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"`ckpt_path` = last: no run in .*run has written.*Give the path"):
        main(["test", "--config", str(config(tmp_path)), "--ckpt_path", "last"])

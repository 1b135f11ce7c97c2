"""train.py: every shipped config, and the command line as a user types it; in processes of its own where that could matter."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from train import main

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def train(*args, cwd=ROOT):
    """Run train.py and return the process, its output as text."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    command = [sys.executable, str(ROOT / "train.py"), *args]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1800, check=False)


@pytest.fixture
def show(monkeypatch, capsys):
    """Runs a command in this process and returns what it prints."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("COLUMNS", "80")

    def show(*args):
        capsys.readouterr()
        main(list(args))
        return capsys.readouterr().out

    return show


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_config_is_instantiated(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    cli = main(["--config", str(config), "--trainer.accelerator", "cpu"], run=False)
    callbacks = {type(callback).__name__ for callback in cli.trainer.callbacks}
    if config.parent.name == "csg2l":
        assert type(cli.model).__name__ == "CSG2L" and type(cli.datamodule).__name__ == "GraphDataModule"
        assert {"EarlyStopping", "ModelCheckpoint", "GraphMonitor"} <= callbacks
    elif config.parent.name == "deit":
        assert type(cli.model).__name__ == "ImageClassifier" and type(cli.datamodule).__name__ == "ImageDataModule"
        assert ("SaveModel" if config.stem == "digits" else "BlockwisePruning") in callbacks
    elif config.stem == "deit_digits_full":
        assert type(cli.model).__name__ == "ImageClassifier" and {"KeepSparsity", "SaveModel"} <= callbacks
    elif config.stem == "generate_24":
        assert (
            type(cli.model).__name__ == "CausalLM" and cli.model.hparams.compressed == "2:4" and cli.model.hparams.static_cache
        )
    else:
        assert cli.model.model is None  # made when the run starts
        expected = {"smollm2_lora": "LoRA", "smollm2_full": "KeepSparsity"}
        expected |= {"paper_tasks": "EvaluateTasks", "export_onnx": "ExportOnnx", "drop_olmoe": "DropExperts"}
        assert type(cli.model).__name__ == "CausalLM" and expected.get(config.stem, "BlockwisePruning") in callbacks
        assert cli.datamodule.hparams.tokenizer is None  # the model's
    commands = re.findall(r"--config (\S+\.yaml)", config.read_text())
    assert commands and all(ROOT / command == config for command in commands), "the comment names another file"


@pytest.fixture(scope="module")
def config(tiny_model, text_file, tmp_path_factory):
    """A config file of the user's own: tiny model, local text."""
    folder = tmp_path_factory.mktemp("run")
    content = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    content["model"]["init_args"]["model_name_or_path"] = tiny_model("llama")
    content["data"]["init_args"] |= {"source": text_file, "seq_len": 24, "num_calibration": 8, "num_heldout": 4}
    content["trainer"]["accelerator"] = "cpu"
    content["trainer"]["logger"]["init_args"]["save_dir"] = str(folder / "logs")
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_fit_then_the_printed_command_validates_the_result(config, show):
    fit = train("fit", "--config", str(config))
    assert fit.returncode == 0, fit.stderr
    line = r"val/perplexity +(\S+) dense -> (\S+) pruned"
    perplexities = re.search(line, fit.stdout)
    assert perplexities, fit.stdout
    assert (
        re.search(r"sparsity +50\.\d+%", fit.stdout)
        and "peak memory" in fit.stdout
        and "tensorboard.main --logdir" in fit.stdout
    )
    command = shlex.split(re.search(r"validate again +\S*python\S* train.py (.*?) *\n", fit.stdout)[1])
    validate = train(*command)
    assert validate.returncode == 0, validate.stderr
    shown = float(re.search(r"val/perplexity\s+│\s+(\S+)", validate.stdout)[1])
    assert shown == pytest.approx(float(perplexities[2]), rel=1e-3)

    # With the user's own config, then a second run into the same log root, then other data.
    pruned = command[-1]
    assert f"{shown}" in show("validate", "--config", str(config), "--model.model_name_or_path", pruned)
    for name in ("config.yaml", "pruned/model.safetensors", "pruned/pruning.json", "pruned/tokenizer.json"):
        assert (Path(pruned).parent / name).is_file(), name
    assert re.search(rf"{line}.*\n", show("fit", "--config", str(config)))[0] == re.search(rf"{line}.*\n", fit.stdout)[0]
    assert "val/perplexity" in show("validate", "--config", str(config), "--seed_everything", "5", "--data.source", "pydoc")


def test_test_and_predict(config, show):
    assert "test/perplexity" in show("test", "--config", str(config))
    assert show("predict", "--config", str(config), "--model.max_new_tokens", "4").count(" >>> ") == 4


def test_print_config_and_wrong_settings(config, show, capsys):
    with pytest.raises(SystemExit) as ended:
        show("fit", "--config", str(config), "--print_config")
    assert not ended.value.code
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"][0]["init_args"]["sparsity"] == 0.5
    with pytest.raises(ValueError, match="Arguments `sparsity`"):
        show("fit", "--config", str(config), "--trainer.callbacks.pattern", "2:4")
    with pytest.raises(ValueError, match=r"is not an existing directory\. Give a hub id"):
        show("validate", "--config", str(config), "--model.model_name_or_path", "./nowhere/model")
    wrong = train("fit", "--config", str(config), "--trainer.callbacks.sparsity", "1.5")
    assert wrong.returncode != 0 and "share of zeros in [0, 1) but got 1.5" in wrong.stderr


def test_help_waits_for_no_library_and_names_the_subcommands_that_there_are():
    from lightning.pytorch.cli import LightningCLI

    code = (
        f"import atexit, runpy, sys; sys.argv = [{str(ROOT / 'train.py')!r}, '--help']\n"
        "atexit.register(lambda: print({'torch', 'lightning', 'transformers'} & set(sys.modules), file=sys.stderr))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0 and done.stderr == "set()\n"
    listed = re.findall(r"^    (\w+)  +\w", done.stdout, re.MULTILINE)
    assert listed == list(LightningCLI.subcommands()) and "configs/quickstart.yaml" in done.stdout


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Config -> the last line of a process that has made what it names; both at the same time."""
    environment, folder, running = os.environ | {"PYTHONPATH": str(ROOT)}, tmp_path_factory.mktemp("imported"), {}
    for config in ("quickstart.yaml", "csg2l/digits.yaml"):
        code = (
            "import sys, torchmetrics, transformers, train\n"
            "transformers.AutoModelForCausalLM, transformers.AutoTokenizer\n"
            "theirs = set(sys.modules)\n"  # some releases import scikit-learn
            f"train.main(['--config', {str(ROOT / 'configs' / config)!r}, '--trainer.accelerator', 'cpu'], run=False)\n"
            "asked = {'timm', 'torch_geometric', 'datasets', 'peft', 'lm_eval', 'onnx', 'sklearn'}\n"
            "print(sorted(asked & set(sys.modules) - theirs))"
        )
        command = [sys.executable, "-c", code]
        running[config] = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    printed = {config: process.communicate(timeout=1800)[0] for config, process in running.items()}
    assert all(process.returncode == 0 for process in running.values())
    return {config: text.strip().splitlines()[-1] for config, text in printed.items()}


@pytest.mark.parametrize("config", ["quickstart.yaml", "csg2l/digits.yaml"])
def test_libraries_of_other_jobs_are_not_imported(config, imported):
    assert imported[config] in ("[]", "['torch_geometric']" if "csg2l" in config else "[]")

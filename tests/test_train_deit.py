"""The configs of configs/deit, run as a user runs them, in a reduced form."""

import json
from pathlib import Path

import pytest
import torch

from train import main

ROOT = Path(__file__).parents[1]


def test_train_then_prune_then_validate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    cli = main(["fit", "--config", str(ROOT / "configs/deit/digits.yaml"), *quiet, "--trainer.max_epochs", "15"])
    dense = float(cli.trainer.callback_metrics["val/top1"])
    assert dense > 0.7  # after a third of the 45 epochs; chance is 0.1
    cli = main(["fit", "--config", str(ROOT / "configs/deit/prune_digits.yaml"), *quiet])
    pruned = Path("logs/prune_digits/version_0/pruned")
    report = json.loads((pruned / "pruning.json").read_text())
    assert report["metrics"]["dense"]["val/top1"] == pytest.approx(dense)
    assert report["sparsity"] == pytest.approx(0.5, abs=1e-3)
    weights = {name: value.clone() for name, value in cli.model.model.state_dict().items()}
    config = "logs/prune_digits/version_0/config.yaml"
    cli = main(["validate", "--config", config, "--model.model_name_or_path", str(pruned), *quiet])
    assert float(cli.trainer.callback_metrics["val/top1"]) == pytest.approx(report["metrics"]["pruned"]["val/top1"])
    assert all(torch.equal(value, weights[name]) for name, value in cli.model.model.state_dict().items())

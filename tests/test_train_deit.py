"""The configs of configs/deit, run as a user runs them, in a reduced form."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from train import main


def test_train_then_prune_then_validate(digits_run, tmp_path, monkeypatch):
    shutil.copytree(digits_run.folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert digits_run.top1 > 0.7  # after a third of the 45 epochs; chance is 0.1
    pruned = Path("logs/prune_digits/version_0/pruned")
    report = json.loads((pruned / "pruning.json").read_text())
    assert report["metrics"]["dense"]["val/top1"] == pytest.approx(digits_run.top1)
    assert report["sparsity"] == pytest.approx(0.5, abs=1e-3)
    config = "logs/prune_digits/version_0/config.yaml"
    cli = main(["validate", "--config", config, "--model.model_name_or_path", str(pruned), *digits_run.quiet])
    assert float(cli.trainer.callback_metrics["val/top1"]) == pytest.approx(report["metrics"]["pruned"]["val/top1"])
    assert all(torch.equal(value, digits_run.pruned[name]) for name, value in cli.model.model.state_dict().items())

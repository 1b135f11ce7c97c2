"""The configs of configs/deit, run as a user runs them, in a reduced form."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch

from callbacks.base.sparsity import linear_weights, share_of, zeros_of
from train import main

ROOT = Path(__file__).parents[1]


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


def test_vision_transformer_is_pruned_and_recovered(digits_run, tmp_path, monkeypatch):
    shutil.copytree(digits_run.folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    pruned = "logs/prune_digits/version_0/pruned"
    before = float(json.loads(Path(pruned, "pruning.json").read_text())["metrics"]["pruned"]["val/loss"])
    options = ["--model.learning_rate", "2e-3", "--trainer.max_epochs", "2"]
    cli = main(["fit", "--config", str(ROOT / "configs/recover/deit_digits_full.yaml"), *digits_run.quiet, *options])
    assert float(cli.trainer.callback_metrics["val/loss"]) < before
    weights = linear_weights(cli.model)
    assert share_of(zeros_of(weights)) == pytest.approx(0.5, abs=0.01)

    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        expected = cli.model.eval()(images)
    for directory in (pruned, "logs/recover_digits/version_0/model"):
        arguments = json.loads(Path(directory, "config.json").read_text())["model_args"]
        assert arguments["embed_dim"] == 96
        by_file = timm.create_model(
            "deit_tiny_patch16_224", checkpoint_path=str(Path(directory, "model.safetensors")), **arguments
        ).eval()
        by_directory = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
        qkv = by_file.blocks[0].attn.qkv.weight
        assert torch.equal(qkv, by_directory.blocks[0].attn.qkv.weight)
        zeros = torch.cat([weights[f"blocks.0.attn.qkv.{part}"] for part in "qkv"]) == 0
        assert torch.equal(qkv == 0, zeros)
    with torch.no_grad():
        torch.testing.assert_close(by_file(images), expected)

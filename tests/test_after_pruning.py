"""After pruning, as a user does it: the directory in plain libraries; recovery, tasks and ONNX by the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from callbacks.base.sparsity import linear_weights
from train import main

ROOT = Path(__file__).parents[1]
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI.s args", "ignore:.*Jsonargparse")


@pytest.fixture
def command(tmp_path, monkeypatch, tiny_model, text_file):
    """Runs train.py in an empty directory, with a shipped config, a tiny language model and a local text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    small = ["--data.source", text_file, "--data.seq_len", "12", "--data.num_calibration", "16", "--data.num_heldout", "4"]

    def run(subcommand, config, model, *arguments):
        model = tiny_model("llama") if model is None else model
        given = ["--config", str(ROOT / "configs" / config), "--model.model_name_or_path", str(model)]
        return main([subcommand, *given, *small, *QUIET, *arguments])

    return run


def test_language_model_is_pruned_recovered_evaluated_and_exported(command, tmp_path, capsys):
    pruned = Path("logs/quickstart/version_0/pruned")
    module = command("fit", "quickstart.yaml", None, "--trainer.callbacks.sparsity", "0.6").model
    plain = transformers.AutoModelForCausalLM.from_pretrained(pruned)
    ids = transformers.AutoTokenizer.from_pretrained(pruned)("w3 w5 w8 w13", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, module(ids))
    assert type(plain).__name__ == "LlamaForCausalLM" and plain.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 7)

    for config, directory in (("smollm2_lora", "recover_lora"), ("smollm2_full", "recover_full")):
        trained = command("fit", f"recover/{config}.yaml", pruned).model
        recovered = Path("logs", directory, "version_0/model")
        plain = transformers.AutoModelForCausalLM.from_pretrained(recovered)
        for name, weight in linear_weights(trained).items():
            saved = plain.get_parameter(f"{name}.weight")
            assert torch.equal(saved, weight) and torch.equal(saved == 0, linear_weights(module)[name] == 0)
            assert not torch.equal(saved, linear_weights(module)[name])

    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "questions.jsonl").write_text('{"question": "w3 w4", "choices": ["w5", "w6 w7"], "label": 1}\n' * 3)
    task = {"task": "mine", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(tasks / "questions.jsonl")}, "cache_dir": str(tasks)}}
    task |= {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "label"}
    (tasks / "mine.yaml").write_text(yaml.safe_dump(task))
    more = ["--trainer.callbacks+=callbacks.EvaluateTasks", "--trainer.callbacks.tasks", "[mine]"]
    more += ["--trainer.callbacks.task_path", str(tasks), "--trainer.callbacks+=callbacks.ExportOnnx"]
    capsys.readouterr()
    command("validate", "quickstart.yaml", recovered, *more)
    assert "mine acc" in capsys.readouterr().out
    (folder,) = {path.parent for path in Path("logs/quickstart").rglob("tasks.json")}
    assert json.loads((folder / "tasks.json").read_text())["results"]["mine"]["acc"] in (0.0, 1.0)
    assert (folder / "onnx/model.onnx").is_file()
    command("validate", "eval/paper_tasks.yaml", recovered, "--trainer.callbacks.tasks", "[mine]", *more[3:5])
    assert "mine acc" in capsys.readouterr().out


def test_transformers_vision_model_loads_again(tmp_path):
    from lightning.pytorch import Trainer

    from callbacks import BlockwisePruning
    from datamodules import ImageDataModule
    from lightning_modules import ImageClassifier

    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.DeiTConfig(**sizes, num_attention_heads=2, num_labels=10)
    transformers.DeiTForImageClassification(config).save_pretrained(tmp_path / "dense")
    size = {"height": 8, "width": 8}
    transformers.DeiTImageProcessor(size=size, crop_size=size).save_pretrained(tmp_path / "dense")
    module = ImageClassifier(str(tmp_path / "dense"))
    data = ImageDataModule("digits", batch_size=64, num_calibration=16, num_heldout=16)
    callback = BlockwisePruning(pattern="2:4", update_rule="fixed", output_dir=str(tmp_path / "pruned"))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, limit_val_batches=1, **quiet).fit(module, data)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "pruned")
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path / "pruned").size["height"] == 8
    for name, weight in linear_weights(module).items():
        saved = model.get_parameter(f"{name}.weight")
        assert torch.equal(saved, weight) and (saved.view(len(saved), -1, 4) == 0).sum(-1).min() == 2


def test_optional_packages_are_not_imported_before_they_are_needed():
    code = (
        "import sys; from train import main\n"
        "for arguments in (['--help'], ['fit', '--config', 'configs/recover/smollm2_lora.yaml', '--print_config']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit: pass\n"
        "print('imported:', sorted({'peft', 'lm_eval', 'onnx', 'onnxscript', 'onnxruntime'} & set(sys.modules)))\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("imported: []\n"), done.stdout[-500:] + done.stderr[-500:]
    assert "usage:" in done.stdout and "callbacks.LoRA" in done.stdout

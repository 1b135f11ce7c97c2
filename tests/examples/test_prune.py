"""The example as a user runs it, on a model of their own and in a notebook's manner."""

import re
import subprocess
import sys

import pytest
import torch
import transformers
from lightning.pytorch import Trainer

from callbacks import BlockwisePruning
from datamodules import TextDataModule
from lightning_modules import CausalLM
from tests.helpers.launchers import tiny


def test_example(tmp_path):
    model, text = tiny(tmp_path)
    sizes = ["--seq-len", "16", "--windows", "8", "--sparsity", "0.6"]
    command = [sys.executable, "-m", "examples.prune", model, "--text", text, *sizes, "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Perplexity [\d.]+ -> [\d.]+; largest error in model\.layers\.\d", done.stdout), done.stdout
    weights = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[1].mlp.up_proj.weight
    assert (weights == 0).float().mean() == pytest.approx(0.6, abs=1e-3)


def test_a_model_in_memory_and_a_plain_trainer(tmp_path):
    """Pruned in place; the tokenizer is that of the directory it came from."""
    path, text = tiny(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    data = TextDataModule(source=text, seq_len=16, num_calibration=8, num_heldout=2)
    pruning = BlockwisePruning(sparsity=0.5, output_dir=str(tmp_path / "out"))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    Trainer(devices=1, callbacks=[pruning], default_root_dir=tmp_path, **quiet).fit(CausalLM(model), data)
    after = model.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(before, after) and (after == 0).float().mean() == pytest.approx(0.5, abs=1e-3)
    assert set(pruning.metrics) == {"dense", "pruned"} and pruning.output_path == tmp_path / "out"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    (again,) = Trainer(devices=1, default_root_dir=tmp_path, **quiet).validate(
        CausalLM(str(tmp_path / "out")), data, verbose=False
    )
    assert again["val/perplexity"] == pytest.approx(pruning.metrics["pruned"]["val/perplexity"], rel=1e-5)


def test_a_model_of_another_library_is_refused():
    with pytest.raises(ValueError, match="expected a path, or a causal language model of transformers, but got a Linear"):
        CausalLM(torch.nn.Linear(2, 2))

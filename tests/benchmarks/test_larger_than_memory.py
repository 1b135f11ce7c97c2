"""The random checkpoint is whole, and the two runs of the benchmark give the same bits."""

from argparse import Namespace

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import larger_than_memory
from lightning_modules.parts.shards import find_shards


def test_a_row(tmp_path, monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 64}
    monkeypatch.setitem(larger_than_memory.SHAPES, "tiny", LlamaConfig(**sizes))
    monkeypatch.setattr(larger_than_memory, "in_a_process", larger_than_memory.prune)
    options = Namespace(shape="tiny", layers=2, method="wanda", samples=2, seq_len=8, limit_gib=None, streamed_only=False)
    row = larger_than_memory.measure(options, tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(find_shards(tmp_path / "dense")) == 3 and row["parameters"] == sum(p.numel() for p in model.parameters())
    assert row["same_weights"] and row["blocks"] == 2 and row["checkpoint_gib"] * 2**30 == pytest.approx(2 * row["parameters"])
    assert set(row) <= set(larger_than_memory.COLUMNS) and row["peak_rss_gib"] >= row["imported_gib"] > 0

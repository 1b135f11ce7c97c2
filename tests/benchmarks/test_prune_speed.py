"""benchmarks.prune_speed writes a row for each variant of a shape."""

import csv
import sys

import pytest
from transformers import LlamaConfig

from benchmarks import prune_speed


@pytest.mark.parametrize("extra", [[], ["--layers", "2", "--batch-size", "1"]], ids=["", "options"])
def test_rows_of_a_tiny_shape(extra, tmp_path, monkeypatch):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 40}
    monkeypatch.setattr(prune_speed, "SHAPES", {"tiny": LlamaConfig(**sizes)})
    variants = ["d2prune, v held", "joint", "joint, error", "joint, 2:4", "plain wanda"]
    size = ["--seq-len", "8", "--samples", "4", "--dtype", "float32", "--plain-layers", "1"]
    command = ["prune_speed", "--shapes", "tiny", "--out", str(tmp_path / "x.csv"), *size, *extra, "--variants", *variants]
    monkeypatch.setattr(sys, "argv", command)
    prune_speed.main()
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == variants
    assert all(float(row["block"]) >= float(row["solve"]) > 0 and float(row["two_passes"]) > 0 for row in rows)
    assert {row["blocks"] for row in rows} == {"2" if extra else "3"}

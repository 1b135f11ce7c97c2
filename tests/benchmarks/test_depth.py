"""benchmarks.depth: the errors of its rows, once each, and the figure."""

import csv
import sys

import pytest
import torch

from benchmarks import depth
from lightning_modules import CausalLM
from tests.helpers.launchers import tiny


def test_outputs_are_the_hidden_states_of_the_model(tiny_model):
    module = CausalLM(tiny_model("opt"))
    module.configure_model()
    module.model.eval()
    ids = torch.arange(2, 26).view(2, 12)
    found = depth.outputs_of(module, ids)
    assert not any(block._forward_hooks for block in module.blocks.values())
    expected = module.model(input_ids=ids, output_hidden_states=True).hidden_states[1:-1]  # the last one is normalised
    assert len(found) == len(expected) + 1
    assert all(torch.allclose(a, b.flatten(0, 1), atol=1e-5) for a, b in zip(found, expected, strict=False))


def test_relative_error():
    dense = torch.tensor([[1.0, 0.0], [0.0, 100.0]])
    assert depth.relative_error(torch.tensor([[1.0, 1.0], [0.0, 100.0]]), dense) == pytest.approx(0.5)


def test_rows_are_written_once_and_drawn(tmp_path, monkeypatch):
    model, _ = tiny(tmp_path)
    for name in ("wiki.valid.tokens", "wiki.test.raw"):
        (tmp_path / name).write_text((tmp_path / "words.txt").read_text())
    output = tmp_path / "depth.csv"
    arguments = ["--wikitext", str(tmp_path), "--model", model, "--output", str(output), "--dtype", "float32"]
    size = ["--seq-len", "16", "--samples", "6", "--heldout", "4", "--batch-size", "2"]
    monkeypatch.setattr(sys, "argv", ["depth", *arguments, *size])
    depth.main()
    depth.main()
    with output.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    blocks = {row["block"] for row in rows}
    assert len(rows) == len(depth.SHOWN) * len(blocks) and all(0 < float(row["error"]) < 10 for row in rows)
    assert [len(line.get_xdata()) for line in depth.draw(rows).axes[0].lines] == [len(blocks)] * len(depth.SHOWN)
    assert output.with_suffix(".png").stat().st_size > 10_000

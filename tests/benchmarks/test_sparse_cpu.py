"""benchmarks/sparse_cpu.py on tiny shapes: every form gives the dense product, and a row is measured once."""

import csv
import sys

import pytest
import torch

from benchmarks import sparse_cpu, speed_tables
from tests.helpers.marks import needs_mkl


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Runs the script and reads what it wrote."""
    monkeypatch.setattr(sparse_cpu, "SHAPES", {"tiny": (24, 32)})
    threads = torch.get_num_threads()

    def run(*arguments):
        output = tmp_path / "rows.csv"
        fixed = ["--out", str(output), "--shapes", "tiny", "--seconds", "0", "--least-rounds", "3", "--cold-mib", "1"]
        monkeypatch.setattr(sys, "argv", ["sparse_cpu.py", *fixed, "--zeros", "0.5", "0.9", "--tokens", "1", "3", *arguments])
        sparse_cpu.main()
        with output.open(newline="") as file:
            return list(csv.DictReader(file))

    yield run
    torch.set_num_threads(threads)


@needs_mkl
def test_rows(rows):
    found = rows()
    assert [(row["dtype"], row["zeros"], row["tokens"]) for row in found] == [
        (dtype, zeros, tokens) for dtype in ("float32", "bfloat16") for zeros in ("0.5", "0.9") for tokens in "13"
    ]
    for row in found:
        assert float(row["dense_us"]) >= float(row["dense_min_us"]) > 0 and float(row["bitmap_us"]) > 0
        assert bool(row["packed_us"]) == sparse_cpu.packs(getattr(torch, row["dtype"]))
        assert bool(row["csr_us"]) == bool(row["speedup"]) == (row["dtype"] == "float32")
        assert row["rounds"] == "3" and row["threads"] == "1" and row["torch"] and row["commit"]
    assert rows() == found  # nothing is measured again


def test_no_layout_is_measured_that_this_cpu_does_not_have(rows, monkeypatch):
    """Of bfloat16 there is none without certain instructions."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    found = rows("--dtypes", "bfloat16")
    assert found and all(row["packed_us"] == "" and float(row["dense_us"]) > 0 for row in found)


def test_other_products_are_seen(monkeypatch):
    options = sparse_cpu.argparse.Namespace(seconds=0, least_rounds=1, cold_mib=1)
    monkeypatch.setattr(sparse_cpu.SparseLinear, "forward", lambda self, x: torch.ones(len(x), self.out_features))
    row = {"outputs": 8, "inputs": 16, "zeros": 0.5, "dtype": "float32", "tokens": 2}
    with pytest.raises(AssertionError, match="bitmap"), torch.inference_mode():
        sparse_cpu.measure(row, options)


def test_table(rows, monkeypatch, tmp_path):
    rows("--dtypes", "float32")
    monkeypatch.setattr("benchmarks.speed_tables.read", lambda name: list(csv.DictReader((tmp_path / "rows.csv").open())))
    lines = speed_tables.sparse_cpu().splitlines()
    assert lines[0] == "|  | dense, µs | packed, µs | dense / sparse rows, 50% | dense / sparse rows, 90% |"
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| tiny, 24 x 32, tokens: 1", "| tiny, 24 x 32, tokens: 3"]
    assert "1 thread, float32, torch" in lines[-1]

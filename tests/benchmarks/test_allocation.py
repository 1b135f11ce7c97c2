"""The benchmark of allocation and solver on a tiny model: its rows, once each, and the table of them."""

import csv
import sys

import pytest

from benchmarks import allocation
from tests.helpers.launchers import tiny


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    model, _ = tiny(tmp_path)
    for name in ("wiki.valid.tokens", "wiki.test.raw"):
        (tmp_path / name).write_text((tmp_path / "words.txt").read_text())
    found = ["allocation", "--wikitext", str(tmp_path), "--model", model, "--output", str(tmp_path / "allocation.csv")]
    found += ["--seq-len", "16", "--samples", "6", "--heldout", "4", "--test-samples", "8", "--targets", "0.6", "2:4"]
    monkeypatch.setattr(sys, "argv", [*found, "--variants", "uniform, obs", "error, obs", "uniform, admm"])
    return tmp_path / "allocation.csv"


def test_rows_are_written_once_and_shown(arguments, monkeypatch):
    allocation.main()
    allocation.main()
    with arguments.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["target"], row["allocation"], row["solver"]) for row in rows] == [
        ("0.6", "uniform", "obs"), ("0.6", "error", "obs"), ("0.6", "uniform", "admm"), ("2:4", "uniform", "obs"),
        ("2:4", "uniform", "admm"),
    ]  # fmt: skip
    assert float(rows[1]["most_sparse_block"]) > float(rows[0]["most_sparse_block"])
    assert float(rows[2]["relative_error"]) < float(rows[0]["relative_error"])
    assert all(float(row["heldout_perplexity"]) > 1 and float(row["test_perplexity"]) > 1 for row in rows)
    monkeypatch.setattr(allocation, "read", lambda _: rows)
    shown = allocation.table()
    header = "| allocation, solver | held-out, 0.6 | held-out, 2:4 | test, 0.6 | test, 2:4 |"
    assert header in shown and shown.count("| error, obs |") == 1 and "8 test windows" in shown

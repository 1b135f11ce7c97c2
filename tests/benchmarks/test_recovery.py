"""benchmarks/recovery.py on a tiny model, and the table of docs/recovery.md."""

import csv
import sys
from pathlib import Path

import pytest

from benchmarks import recovery

ROOT = Path(__file__).parents[2]


def test_rows_of_a_tiny_model(tiny_model, text_file, tmp_path, monkeypatch):
    words = Path(text_file).read_text()
    (tmp_path / "wiki.valid.tokens").write_text(words)
    (tmp_path / "wiki.test.raw").write_text(words[:900])
    output = tmp_path / "rows.csv"
    arguments = ["--source", str(tmp_path), "--output", str(output), "--model", tiny_model("llama"), "--targets", "2:4"]
    arguments += ["--seq-len", "12", "--samples", "160", "--heldout", "4", "--learning-rate", "3e-3"]
    monkeypatch.setattr(sys, "argv", ["recovery.py", *arguments])
    recovery.main()
    recovery.main()  # nothing is missing
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["target"], row["recovery"]) for row in rows] == [
        ("dense", "none"),
        *(("2:4", name) for name in ("none", "full", "lora", "lora apart")),
    ]
    assert [row["sparsity"] for row in rows[1:]] == ["0.5", "0.5", "0.5", ""]
    pruned = float(rows[1]["heldout_perplexity"])
    for row in rows[2:]:
        assert (row["steps"], row["learning_rate"], row["source"]) == ("80", "0.003", "wikitext2") and row["torch"]
        assert float(row["heldout_perplexity"]) < pruned and float(row["test_perplexity"]) > 1


def test_the_table_of_the_docs_is_that_of_the_rows():
    marked = f"<!-- recovery -->\n\n{recovery.table()}\n\n<!-- /recovery -->"
    assert marked in (ROOT / "docs" / "recovery.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", recovery.read("recovery.csv"), ids=lambda row: f"{row['target']}, {row['recovery']}")
def test_rows_say_how_they_were_measured(row):
    assert all(row[name] for name in ("seq_len", "samples", "seed", "hardware", "torch", "transformers", "commit"))
    if row["target"] != "dense" and row["recovery"] != "lora apart":
        assert float(row["sparsity"]) == pytest.approx(0.5 if row["target"] == "2:4" else float(row["target"]), abs=1e-3)

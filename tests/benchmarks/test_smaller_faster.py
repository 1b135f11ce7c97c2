"""benchmarks/smaller_faster.py on a tiny model, its commands in this process, and the table of README.md."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from benchmarks import markdown, smaller_faster, speed_tables
from lightning_modules import expand
from lightning_modules.parts import fastest_form

WINDOWS = ["--seq-len", "16", "--samples", "6", "--windows", "3", "--prompt", "8", "--steps", "5"]


def in_this_process(*words):
    """Run a command of the benchmark, which costs no new process here."""
    if words[0] == "train.py":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py"])  # Lightning warns of words that are given twice
            train.main(list(words[1:]))
    else:
        assert words[:2] == ("-m", "lightning_modules.expand")
        expand.main(list(words[2:]))


@pytest.fixture
def measure(tiny_model, text_file, tmp_path, monkeypatch):
    """Runs the script and returns the rows of its file."""
    words = Path(text_file).read_text()
    (tmp_path / "wiki.valid.tokens").write_text(words)
    (tmp_path / "wiki.test.raw").write_text(words[:900])
    monkeypatch.setattr(smaller_faster, "run", in_this_process)
    monkeypatch.setattr(fastest_form, "COLD_BYTES", 1)  # copies of tiny weights would be many
    monkeypatch.setattr(fastest_form, "SECONDS", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fixed = ["--wikitext", str(tmp_path), "--out", str(tmp_path / "rows.csv"), "--folder", str(tmp_path / "models")]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["smaller_faster.py", *fixed, "--model", tiny_model("llama"), *WINDOWS, *arguments])
        monkeypatch.chdir(smaller_faster.ROOT)
        smaller_faster.main()
        with (tmp_path / "rows.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    return run


def test_rows(measure, tmp_path):
    found = measure("--targets", "0.7", "2:4", "--prune-on", "cpu")
    assert [(row["target"], row["form"]) for row in found] == [
        ("dense", "plain"),
        *(("0.7", form) for form in ("plain", "compressed, auto", "compressed, unstructured")),
        *(("2:4", form) for form in ("plain", "compressed, auto", "compressed, 2:4")),
    ]
    dense, plain, auto, asked, plain24, auto24, asked24 = found
    for row in found:
        assert float(row["tokens_s"]) >= float(row["least_tokens_s"]) > 0 and row["torch"] and row["commit"]
        assert row["same_text"] == "1.0" and row["static_cache"] == "False" and int(row["threads"]) >= 1
    for rows in ((plain, auto, asked), (plain24, auto24, asked24)):
        assert [float(row["perplexity"]) for row in rows] == pytest.approx([float(rows[0]["perplexity"])] * 3, rel=1e-3)
        assert len({row["disk_bytes"] for row in rows[1:]}) == 1 and int(rows[1]["disk_bytes"]) < int(rows[0]["disk_bytes"])
    assert float(plain["perplexity"]) != float(dense["perplexity"])
    for row in (plain, plain24):  # zeros take room
        assert [row[name] for name in ("memory_bytes", "linear_bytes", "linears")] == [
            dense[name] for name in ("memory_bytes", "linear_bytes", "linears")
        ]
    assert dense["linears"].endswith(" Linear") and asked24["linears"] == f"{dense['linears']}24"
    assert int(asked24["linear_bytes"]) < int(dense["linear_bytes"])

    (directory,) = (tmp_path / "models").glob("*-0.7-plain")
    weights = load_file(directory / "model.safetensors")
    assert int(plain["disk_bytes"]) == (directory / "model.safetensors").stat().st_size
    linears = [weight for name, weight in weights.items() if "_proj" in name]
    assert int(plain["linear_bytes"]) == sum(weight.nbytes for weight in linears)
    zeros = sum(int((weight == 0).sum()) for weight in linears) / sum(weight.numel() for weight in linears)
    assert zeros == pytest.approx(0.7, abs=0.01)
    assert measure("--targets", "0.7", "2:4", "--prune-on", "cpu") == found  # nothing is measured again


def test_tied_weights_count_once():
    embedding, head = torch.nn.Embedding(6, 4), torch.nn.Linear(4, 6, bias=False)
    head.weight = embedding.weight
    assert smaller_faster.bytes_of([embedding, head]) == 6 * 4 * 4
    other = torch.nn.Linear(4, 6, bias=False, dtype=torch.bfloat16)
    other.register_buffer("more", torch.zeros(3))
    assert smaller_faster.bytes_of([embedding, head, other]) == 6 * 4 * 4 + 6 * 4 * 2 + 3 * 4


def test_a_failed_command_ends_the_run(capfd):
    with pytest.raises(RuntimeError, match="failed with exit code 3"):
        smaller_faster.run("-c", "raise SystemExit(3)")


def test_the_table_has_a_line_for_each_form(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "smaller_faster.csv"
    fixed = dict.fromkeys(smaller_faster.COLUMNS, "1") | {"disk_bytes": "123456789", "memory_bytes": "2e6"}
    fixed["perplexity"] = "9.876"
    forms = [("dense", "plain"), ("0.7", "plain"), ("0.7", "compressed, auto"), ("2:4", "compressed, 2:4")]
    for device, rows in (("cuda", forms), ("cpu", forms[:3])):
        for target, form in rows:
            row = fixed | {"device": device, "target": target, "form": form, "static_cache": str(device == "cuda")}
            smaller_faster.append(path, row, smaller_faster.COLUMNS)
    monkeypatch.setattr(markdown, "ROOT", tmp_path)
    lines = speed_tables.smaller_faster().splitlines()
    assert lines[0].startswith("|  | cuda, 1: files, MB | cuda, 1: memory, MB | cuda, 1: tokens/s | cuda, 1: perplexity | cpu")
    assert lines[2] == "| dense | 123 | 2 | 1.0 | 9.88 | 123 | 2 | 1.0 | 9.88 |"
    assert [line.split(" | ")[0] for line in lines[3:6]] == [
        "| 70 % zeros, plain",
        "| 70 % zeros, compressed, auto",
        "| 2:4, compressed, 2:4",
    ]
    assert lines[5].endswith("| 9.88 |  |  |  |  |")  # not measured on the other device
    assert lines[-1].startswith("1, 1, 1 + 1 tokens, batch 1, steps compiled") and "no graphs" in lines[-1]

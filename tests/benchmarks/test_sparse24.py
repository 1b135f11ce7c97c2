"""benchmarks/sparse24.py on tiny shapes and a CPU, where nothing is captured."""

import csv
import sys

import pytest
import torch

from benchmarks import sparse24, sparse24_tuning, speed_tables

TINY = ["--device", "cpu", "--dtype", "float32", "--hidden", "64", "--intermediate", "128", "--layers", "2", "--prompt", "8"]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Runs the script and reads what it wrote."""

    def run(*arguments):
        output = tmp_path / "rows.csv"
        monkeypatch.setattr(sys, "argv", ["sparse24.py", *TINY, "--out", str(output), *arguments])
        sparse24.main()
        if not output.is_file():
            return []
        with output.open(newline="") as file:
            return list(csv.DictReader(file))

    return run


def test_linears(rows):
    found = rows("--part", "linears", "--tokens", "2", "20", "--shapes", "q", "down")
    assert [(row["what"], row["outputs"], row["inputs"], row["tokens"]) for row in found] == [
        (name, "64", inputs, tokens) for tokens in ("2", "20") for name, inputs in (("q", "64"), ("down", "128"))
    ]
    for row in found:
        assert float(row["speedup"]) == pytest.approx(float(row["dense"]) / float(row["compressed"]), rel=1e-3)
        assert float(row["error"]) < 1e-6 and float(row["dense_error"]) < 1e-6 and row["unit"] == "us"
        assert bool(row["compressed_gb_s"]) == (row["tokens"] == "2") and row["torch"] and row["commit"]


def test_model(rows):
    found = {(row["what"], row["batch"]): row for row in rows("--part", "model", "--batch", "1", "2", "--steps", "2")}
    assert set(found) == {
        ("memory of the linears", ""),
        ("prefill", "1"),
        *((what, batch) for what in ("decoding", "generate, no graph") for batch in "12"),
    }
    assert float(found["prefill", "1"]["error"]) < 1e-5
    memory = found["memory of the linears", ""]
    assert float(memory["compressed"]) / float(memory["dense"]) == pytest.approx(17 / 32, rel=1e-3)


def test_weights_are_24_and_decoding_follows_generate():
    options = sparse24.argparse.Namespace(hidden=64, intermediate=128, layers=2, dtype="float32", device="cpu")
    with torch.inference_mode():
        torch.manual_seed(0)
        model = sparse24.random_model(options)
        for linear in sparse24.linears_of(model):
            assert ((linear.weight.unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all()
        assert len(sparse24.linears_of(model)) == 14
        prompt = torch.randint(128, (2, 8))
        plain = model(input_ids=prompt).logits[:, -1]
        torch.testing.assert_close(sparse24.prefill(model, prompt)[1], plain)
        seen = []
        model.lm_head.register_forward_hook(lambda module, args, logits: seen.append(logits[:, -1].argmax(-1)))
        sparse24.decoding(model, prompt, 3)
        written = torch.stack(seen, 1)
        options = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
        expected = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)[:, 8:]
        assert torch.equal(written, expected)  # of the prompt, then 1 + 3 steps


@pytest.mark.parametrize(("zeros", "unroll"), [((), 1), (("--zeros", "0.5"), 4)], ids=["2:4", "2:4 and rest"])
def test_tuning_finds_the_default_among_others(rows, capsys, monkeypatch, zeros, unroll):
    monkeypatch.setattr(sparse24_tuning, "WARPS", (1, 2))
    monkeypatch.setattr(sparse24_tuning, "UNROLL", (unroll,))
    monkeypatch.setattr(sparse24_tuning, "WORDS_IN_FLIGHT", (8, 1024))
    monkeypatch.setattr(sparse24_tuning, "REPLAYS", 1)
    monkeypatch.setattr(sparse24_tuning, "COMPILERS", 2)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # kernels run on CPU tensors in Triton's interpreter only
    sizes = ("--device", device, "--dtype", "bfloat16")
    assert rows("--part", "tune", "--shapes", "q", "--tokens", "1", "--seconds", "inf", *sizes, *zeros) == []
    lines = [line for line in capsys.readouterr().out.splitlines() if "compiled in" not in line]
    assert len(lines) > 2 and lines[0].startswith("q, 1 tokens: dense") and any(line.endswith("(default)") for line in lines)
    assert not any("WRONG" in line for line in lines)


@pytest.mark.parametrize(("has_rest", "most"), [(False, 64), (True, 8)])
def test_the_grid_has_what_triton_takes(has_rest, most):
    configs = sparse24_tuning.grid(has_rest)
    assert len(configs) == len(set(configs)) > 10
    assert all(config.tiles in (1, 2, 4) and config.tiles * config.warps <= most for config in configs)
    assert not has_rest or all(config.unroll % 4 == 0 for config in configs)


def test_the_table_shows_both_parts(rows, monkeypatch):
    rows("--part", "linears", "--tokens", "2", "20", "--shapes", "q")
    found = rows("--part", "model", "--batch", "1", "--steps", "2")
    monkeypatch.setattr(speed_tables, "read", lambda name: found)
    text = speed_tables.sparse24()
    assert text.count("| q, 64 x 64, ") == 2 and "| decoding (tokens/s), batch 1 | " in text
    assert "| memory of the linears (GiB) | " in text and "prefill" in text and ", float32, torch " in text

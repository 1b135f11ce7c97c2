"""benchmarks/sparse_decode.py on tiny shapes and a CPU, where nothing is captured."""

import csv
import sys
from functools import partial

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import sparse_decode, speed_tables
from benchmarks.sparse_decode import make_zeros

TINY = ["--device", "cpu", "--hidden", "64", "--intermediate", "128", "--layers", "1", "--prompt", "8", "--steps", "3"]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Runs the script and reads what it wrote."""

    def run(*arguments):
        output = tmp_path / "rows.csv"
        monkeypatch.setattr(sys, "argv", ["sparse_decode.py", *TINY, "--out", str(output), *arguments])
        sparse_decode.main()
        with output.open(newline="") as file:
            return list(csv.DictReader(file))

    return run


def test_linears(rows):
    found = rows("--part", "linears", "--tokens", "1", "3", "--zeros", "0.5", "0.7")
    assert len(found) == 3 * 2 * 5 and {row["what"] for row in found} == {"q", "gate", "down"}
    forms = [("2:4", "0.5"), *((form, zeros) for form in ("unstructured", "2:4 and rest") for zeros in ("0.5", "0.7"))]
    expected = [(form, zeros, tokens) for form, zeros in forms for tokens in "13"]
    assert [(row["form"], row["zeros"], row["tokens"]) for row in found[:10]] == expected
    for row in found:
        assert float(row["speedup"]) == pytest.approx(float(row["dense_us"]) / float(row["us"]), rel=1e-3)
        assert float(row["error"]) < 0.01 and float(row["dense_error"]) < 0.01 and row["torch"] and row["commit"]


def test_model(rows):
    found = rows("--part", "model")
    forms = [form for form in sparse_decode.FORMS if not form.startswith("auto")]
    assert [row["form"] for row in found] == ["dense", *(f"{form}, merged" for form in forms)]
    dense, merged, pattern = (float(row["gib"]) for row in found[:3])
    assert merged == dense and pattern == pytest.approx(9 / 16 * dense, rel=1e-3)
    assert all(float(row["tokens_s"]) == pytest.approx(1e6 / float(row["us"]), rel=1e-3) for row in found)
    assert found[0]["same_tokens"] == "" and all(0 <= float(row["same_tokens"]) <= 1 for row in found[1:])
    assert {(row["what"], row["compiled"]) for row in found} == {("decoding", "none")}


def test_sequences_in_a_batch_are_counted(rows):
    (row,) = rows("--part", "model", "--batch", "3", "--forms", "auto, 70 %, merged")
    assert row["tokens"] == "3" and float(row["tokens_s"]) == pytest.approx(3e6 / float(row["us"]), rel=1e-3)
    assert float(row["same_tokens"]) == 1  # in bfloat16 on a CPU all stay dense


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_compiled_model(rows, attention, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # one graph as well, in less time
    forms = ["--forms", "2:4", "2:4, merged"]
    found = rows("--part", "model", "--compile", "--attention", attention, *forms)
    what = {"sdpa": "decoding", "flex_attention": "decoding, flex_attention"}[attention]
    assert [(row["form"], row["what"], row["compiled"]) for row in found] == [(form, what, "whole") for form in forms[1:]]
    assert float(found[0]["gib"]) == float(found[1]["gib"])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("length", [5, 127, 128, 200])
def test_the_mask_of_a_step_ends_with_its_own_key(length):
    position = torch.tensor([[length]])
    mask = sparse_decode.block_mask(position, 256)
    query, key, value = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 256, 8), torch.randn(1, 2, 256, 8)
    for _ in range(2):
        found = flex_attention(query, key, value, block_mask=mask)
        seen = int(position) + 1
        share = torch.softmax(query.double() @ key[:, :, :seen].double().mT / 8**0.5, -1)
        torch.testing.assert_close(found.double(), share @ value[:, :, :seen].double(), rtol=1e-5, atol=1e-5)
        position.add_(1)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_zeros_are_the_smallest(share):
    torch.manual_seed(0)
    weight = torch.randn(40, 50)
    made = weight.clone()
    make_zeros(made, share)
    assert int((made == 0).sum()) == round(share * 2000)
    assert weight[made == 0].abs().max() < weight[made != 0].abs().min() and torch.equal(made[made != 0], weight[made != 0])


def test_table():
    text = speed_tables.sparse_decode()
    assert "| q, 70% zeros, lanes | 0.38 |" in text and "| unstructured, 70 %, merged, compiled |" in text

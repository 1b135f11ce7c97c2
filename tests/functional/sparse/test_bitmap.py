"""The compressed form of a matrix with zeros anywhere: there and back, bit for bit."""

import pytest
import torch

from functional.sparse import compress, compressed_bytes, decompress

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def with_zeros(rows, columns, share, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator)
    return weight.masked_fill(torch.rand(rows, columns, generator=generator) < share, 0).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 8), (16, 65), (0, 8), (4, 0)])
def test_every_bit_comes_back(shape, share, dtype):
    weight = with_zeros(*shape, share, dtype)
    compressed = compress(weight)
    assert compressed.values.dtype == dtype and compressed.values.shape == (torch.count_nonzero(weight),)
    found = decompress(*compressed)
    assert found.shape == weight.shape and torch.equal(found.view(BITS[dtype]), weight.view(BITS[dtype]))


def test_the_layout_is_the_documented_one():
    """Read back bit by bit."""
    weight = with_zeros(6, 19, 0.5)
    mask, values, rows, columns = compress(weight)
    assert mask.shape == (6, 3) and mask.dtype == torch.uint8 and (rows, columns) == (6, 19)
    left = values.tolist()
    for row in range(6):
        for column in range(24):
            bit = int(mask[row, column // 8]) >> column % 8 & 1
            assert (bit and left.pop(0)) == (weight[row, column].item() if column < 19 else 0)
    assert not left


def test_all_numbers_but_zeros_are_kept():
    smallest = torch.tensor([1], dtype=torch.int32).view(torch.float32).item()  # subnormal
    weight = torch.tensor([[0.0, -0.0, float("nan"), float("-inf"), smallest]])
    assert compress(weight).mask.tolist() == [[0b11100]]
    found = decompress(*compress(weight))
    assert torch.equal(found[:, 2:].view(torch.int32), weight[:, 2:].view(torch.int32))
    assert not torch.signbit(found[:, :2]).any()  # the negative zero has become a positive one


def test_a_transposed_matrix_is_stored_by_its_own_rows():
    weight = with_zeros(9, 12, 0.5)
    assert torch.equal(decompress(*compress(weight.T)), weight.T)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 0.5625), (0.7, 0.3625)])
def test_bytes(share, expected):
    weight = torch.ones(40, 80, dtype=torch.bfloat16)
    weight[:, : round(share * 80)] = 0
    compressed = compress(weight)
    assert compressed.nbytes / weight.nbytes == pytest.approx(expected)
    assert compressed.nbytes == compressed_bytes(40, 80, compressed.values.numel(), 2)
    assert compress(torch.ones(3, 9)).nbytes == compressed_bytes(3, 9, 27, 4) == 3 * 2 + 27 * 4


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(16), r"floating-point matrix \(outputs, inputs\) but got torch.float32 of shape \(16,\)"),
        (torch.zeros(2, 3, 4), r"of shape \(2, 3, 4\). Flatten its leading axes"),
        (torch.zeros(2, 16, dtype=torch.int64), "floating-point matrix .* but got torch.int64"),
    ],
)
def test_what_cannot_be_compressed(weight, message):
    with pytest.raises(ValueError, match=message):
        compress(weight)


@pytest.mark.parametrize("mask", [torch.zeros(2, 1, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int32)])
def test_a_mask_of_another_matrix_is_refused(mask):
    with pytest.raises(ValueError, match=r"`mask` of a weight \(2, 16\) expected uint8 \(2, 2\) but got"):
        decompress(mask, torch.zeros(0), 2, 16)

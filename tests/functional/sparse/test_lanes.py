"""Matrices in lanes: every bit comes back, and every lane's walk is what its docstring says."""

import pytest
import torch

from functional.sparse import from_lanes, lanes_of, to_lanes
from functional.sparse.lanes import CHUNK, MOST_COLUMNS


def matrix(rows, columns, density, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    return (torch.randn(rows, columns, generator=generator) * kept).to(dtype)


def uneven():
    """Empty, full and late rows, and gaps of 15, 16, 30, 31 and 46 columns."""
    weight = matrix(37, 150, 0.3)
    weight[3], weight[5] = 0, 1 + torch.arange(150.0)
    weight[7:12] = 0
    for row, gap in zip(range(7, 12), (15, 16, 30, 31, 46), strict=True):
        weight[row, [2, 2 + gap]] = torch.tensor([1.0, -2.0])
    weight[12, :100] = 0
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("height", "parts"), [(16, 32), (32, 16), (4, 2), (1, 1), (8, 3)])
def test_every_bit_comes_back(dtype, height, parts):
    for weight in (uneven(), matrix(64, 300, 0.5), matrix(33, 500, 0.02), torch.zeros(5, 7), torch.ones(3, 16)):
        assert torch.equal(from_lanes(to_lanes(weight.to(dtype), height, parts)), weight.to(dtype))


def test_negative_zeros_and_what_is_not_finite():
    weight = torch.tensor([[0.0, -0.0, float("inf"), float("-inf"), 3.0]])
    back = from_lanes(to_lanes(weight))
    assert torch.equal(back, weight) and not back.signbit()[0, 1]
    assert from_lanes(to_lanes(torch.tensor([[0.0, float("nan")]]))).isnan().tolist() == [[False, True]]


def test_a_walk_by_hand():
    """Each lane alone, entry after entry, as the kernel does it: all weights are met, each once, in their row."""
    weight, height, parts = uneven(), 8, 4
    values, steps, firsts, starts, order, rows, columns = to_lanes(weight, height, parts)
    found, met = torch.zeros(rows, columns), 0
    for piece in range(len(firsts)):
        chunks = int(starts[piece + 1] - starts[piece])
        for part in range(parts):
            for lane in range(height):
                column = int(firsts[piece, part, lane])
                for turn in range(chunks // parts + (part < chunks % parts)):
                    chunk = int(starts[piece]) + turn * parts + part
                    for entry in range(CHUNK):
                        column += int(steps[chunk, lane]) >> (4 * entry) & 15
                        value = float(values[chunk, lane, entry])
                        if value:
                            found[int(order[piece * height + lane]), column] += value
                            met += 1
    assert torch.equal(found, weight) and met == int((weight != 0).sum())


def test_rows_of_a_slice_have_like_numbers_of_entries():
    weight = matrix(100, 64, 0.5)
    order = to_lanes(weight, 8, 2).order
    counts = (weight != 0).sum(1)[order[:100].long()]
    assert order[100:].tolist() == [100] * 4 and (counts.diff() >= 0).all()
    assert sorted(order[:100].tolist()) == list(range(100))


@pytest.mark.parametrize(("zeros", "share"), [(0.5, 0.645), (0.7, 0.39)])
def test_bytes(zeros, share):
    """20 bits an entry, and little more, as its docstring and the documentation say."""
    weight = matrix(512, 4096, 1 - zeros, torch.bfloat16)
    lanes = to_lanes(weight, *lanes_of(4096, 4096))
    assert 20 / 16 * (1 - zeros) < lanes.nbytes / weight.nbytes < share
    assert lanes.nbytes == sum(part.numel() * part.element_size() for part in lanes[:5])


def test_wrong_arguments():
    for wrong in (torch.zeros(3), torch.zeros(2, 2, dtype=torch.int8), torch.zeros(1, MOST_COLUMNS + 1)):
        with pytest.raises(ValueError, match=r"`weight` expected .* at most 32767 inputs but got .* Leave it dense"):
            to_lanes(wrong)

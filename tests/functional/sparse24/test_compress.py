"""The compressed form: there and back, bit for bit."""

import itertools

import pytest
import torch

from functional.sparse24 import compress, decompress, expand, groups_over_two

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPS = [group for group in itertools.product([0, 1], repeat=4) if sum(group) <= 2]


def every_pair_of_groups(dtype):
    """Each group of none, one or two weights beside each other one, of values that are all different: (121, 8)."""
    places = torch.tensor([[*low, *high] for low in GROUPS for high in GROUPS])
    return (places * torch.arange(1, places.numel() + 1).view_as(places)).div(7).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_every_group_comes_back(dtype):
    weight = every_pair_of_groups(dtype)
    values, indices = compress(weight)
    assert values.shape == (2, 121, 2) and values.dtype == dtype and indices.shape == (121, 1) and indices.dtype == torch.uint8
    assert torch.equal(decompress(values, indices), weight)
    nibbles = torch.cat([indices & 15, indices >> 4], 1)
    assert ((nibbles & 3) < (nibbles >> 2)).all() and (nibbles >> 2).max() == 3  # the kernels count on it


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copies", [1, 5, 40])
def test_the_kernel_makes_the_same_matrix(dtype, copies):
    """Widths within a tile, none of them a multiple of it; an odd number of rows."""
    weight = every_pair_of_groups(dtype).repeat(1, copies)
    assert torch.equal(expand(*compress(weight)), weight)


def test_the_layout_is_the_documented_one():
    weight = torch.tensor([[0, 5, 0, 6], [7, 0, 0, 0], [0, 0, 8, 9], [0, 0, 0, 0]], dtype=torch.float32).view(1, 16)
    values, indices = compress(weight)
    assert values.tolist() == [[[5, 7, 8, 0]], [[6, 0, 9, 0]]]
    low, high = (1 | 3 << 2, 0 | 1 << 2), (2 | 3 << 2, 0 | 1 << 2)
    assert indices.tolist() == [[a | b << 4 for a, b in zip(low, high, strict=True)]]


def test_nine_sixteenths_of_the_bytes():
    weight = torch.zeros(32, 64, dtype=torch.bfloat16)
    assert sum(part.nbytes for part in compress(weight)) * 16 == weight.nbytes * 9


def test_numbers_that_are_no_numbers_are_weights_too():
    weight = torch.tensor([[float("nan"), 0, 0, float("inf"), 0, 0, 0, 1]])
    torch.testing.assert_close(decompress(*compress(weight)), weight, equal_nan=True)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3, 16), r"at most two .* but 12 of 12 groups have more. Prune with pattern \"2:4\" first"),
        (torch.eye(8)[:, [0, 0, 0, 1, 2, 3, 4, 5]], "but 1 of 16 groups have more"),
        (torch.zeros(3, 12), "a multiple of 8 inputs, two groups a byte, but got 12. Leave this linear dense"),
        (torch.zeros(16), r"floating-point matrix \(outputs, inputs\) but got torch.float32 of shape \(16,\)"),
        (torch.zeros(2, 16, dtype=torch.int64), "floating-point matrix .* but got torch.int64"),
    ],
)
def test_what_cannot_be_compressed(weight, message):
    with pytest.raises(ValueError, match=message):
        compress(weight)


def test_groups_are_counted():
    weight = torch.zeros(2, 16)
    weight[0, :3] = weight[1, 12:] = 1
    weight[1, 3:5] = 1  # two groups of one weight each
    assert groups_over_two(weight) == 2

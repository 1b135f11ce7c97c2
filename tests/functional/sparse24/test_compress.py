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
    compressed = compress(weight)
    assert compressed.values.shape == (8, 1, 2, 32, 4, 2) and compressed.values.dtype == dtype
    assert compressed.indices.shape == (8, 1, 32) and compressed.indices.dtype == torch.int32
    assert (compressed.rows, compressed.columns) == (121, 8)
    assert torch.equal(decompress(*compressed), weight)
    nibbles = torch.stack([compressed.indices >> shift & 15 for shift in range(0, 32, 4)])
    assert ((nibbles & 3) < (nibbles >> 2)).all() and (nibbles >> 2).max() == 3  # the tensor cores count on it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("copies", [1, 5, 40])
def test_the_kernel_makes_the_same_matrix(dtype, copies):
    """Widths within a strip, none of them a multiple of it; an odd number of rows."""
    weight = every_pair_of_groups(dtype).repeat(1, copies)
    assert torch.equal(expand(compress(weight)), weight)
    assert torch.equal(expand(compress(weight[:, 4:])), weight[:, 4:])


def test_the_layout_is_the_documented_one():
    """Read back one by one, as the first lines of compress.py say."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.tensor(list(itertools.combinations(range(4), 2)))[torch.randint(6, (20, 24), generator=generator)]
    kept = torch.randn(20, 24, 2, generator=generator)
    weight = torch.zeros(20, 24, 4).scatter_(2, pairs, kept).flatten(1)
    values, indices, _, _ = compress(weight)
    assert values.shape == (2, 2, 2, 32, 4, 2)
    for row, group in itertools.product(range(20), range(24)):
        tile, (h, g) = row // 16, divmod(row % 16, 8)
        strip, s, (u, (k, v)) = group // 16, group % 16 // 8, (group % 8 // 4, divmod(group % 4, 2))
        assert torch.equal(values[tile, strip, s, 4 * g + 2 * v + u, 2 * k + h], kept[row, group])
        nibble = int(indices[tile, strip, 4 * g + 2 * s + k]) >> (16 * h + 4 * (2 * v + u)) & 15
        assert (nibble & 3, nibble >> 2) == tuple(pairs[row, group].tolist())


def test_nine_sixteenths_of_the_bytes():
    weight = torch.zeros(32, 64, dtype=torch.bfloat16)
    compressed = compress(weight)
    assert (compressed.values.nbytes + compressed.indices.nbytes) * 16 == weight.nbytes * 9


def test_numbers_that_are_no_numbers_are_weights_too():
    weight = torch.tensor([[float("nan"), 0, 0, float("inf"), 0, 0, 0, 1]])
    torch.testing.assert_close(decompress(*compress(weight)), weight, equal_nan=True)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3, 16), r"at most two .* but 12 of 12 groups have more. Prune with pattern \"2:4\" first"),
        (torch.eye(8)[:, [0, 0, 0, 1, 2, 3, 4, 5]], "but 1 of 16 groups have more"),
        (torch.zeros(3, 10), "a multiple of 4 inputs but got 10. Leave this linear dense"),
        (torch.zeros(16), r"floating-point matrix \(outputs, inputs\), not empty, but got torch.float32 of shape \(16,\)"),
        (torch.zeros(2, 16, dtype=torch.int64), "floating-point matrix .* but got torch.int64"),
        (torch.zeros(0, 16), r"not empty, but got torch.float32 of shape \(0, 16\)"),
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

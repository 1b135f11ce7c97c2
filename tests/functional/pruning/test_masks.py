"""How many zeros a sparsity means, and ties."""

import pytest
import torch

from functional.pruning import masks, parse_pattern, zeros_wanted
from functional.pruning.masks import (
    Pattern,
    keep_largest,
    keep_largest_of_groups,
    keep_largest_of_rows,
    smallest_kept,
    zeros_of,
)


@pytest.mark.parametrize(
    ("numel", "sparsity", "zeros"),
    [(100, 0.29, 29), (100, 0.57, 57), (10, 0.7, 7), (576, 0.6, 345), (6, 2 / 3, 4), (3, 1 / 3, 1), (7, 0.5, 3), (9, 0.0, 0)],
)
def test_the_number_of_zeros_is_that_of_the_decimal(numel, sparsity, zeros):
    assert zeros_wanted(numel, sparsity) == zeros


def test_zeros_of_a_weight():
    assert zeros_of((5, 7), True, 0.5, None) == 15
    assert zeros_of((5, 7), False, 0.5, None) == 17
    assert zeros_of((5, 8), False, 0.0, "3:4") == 30


def test_ties_lose_from_the_left():
    scores = torch.ones(2, 3)
    assert keep_largest(scores, 4).tolist() == [[False] * 3, [False, True, True]]
    assert keep_largest_of_rows(scores, 1).tolist() == [[False, True, True]] * 2


def test_patterns():
    assert parse_pattern("2:4") == (2, 4) and str(parse_pattern("3:4")) == "3:4" and parse_pattern("3:4").sparsity == 0.75
    assert parse_pattern(None) is None


@pytest.mark.parametrize("kind", ["random", "ties", "columns", "sorted", "constant", "misleading"])
@pytest.mark.parametrize("margin", [0, 5])
@pytest.mark.parametrize("array", [False, True])
def test_search_finds_what_sorting_finds(kind, margin, array, monkeypatch):
    """Also where every n-th score says something else than all do."""
    monkeypatch.setattr(masks, "SAMPLED", 50)
    monkeypatch.setattr(masks, "SAMPLED_MARGIN", margin)
    scores = torch.rand(40, 60, generator=torch.Generator().manual_seed(0))
    scores = {
        "random": scores,
        "ties": (scores * 5).round(),
        "columns": scores * torch.logspace(-9, 9, 60),
        "sorted": scores.flatten().sort().values,
        "constant": torch.ones(2400),
        "misleading": scores.flatten().clone().index_fill_(0, torch.arange(0, 2400, 2400 // 50 | 1), 9.0),
    }[kind].flatten()
    for num_zeros in (1, 2, 700, 1200, 2398, 2399):
        found = torch.as_tensor(smallest_kept(scores.numpy() if array else scores, num_zeros))
        assert torch.equal(found, scores.sort().values[num_zeros : num_zeros + 1])


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(300, 400), (1, 70000)])
def test_long_rows_are_masked_as_by_a_stable_sort(shape, sparsity):
    scores = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 1e4).round()
    num_zeros = int(scores.numel() * sparsity)
    expected = torch.ones(scores.numel(), dtype=torch.bool)
    expected[scores.flatten().sort(stable=True).indices[:num_zeros]] = False
    assert torch.equal(keep_largest(scores, num_zeros), expected.view(shape))


def test_ties_of_a_long_row_lose_from_the_left():
    """As on a GPU."""
    scores = (torch.rand(30, 20, generator=torch.Generator().manual_seed(0)) * 9).round()
    found = masks._keep_from(scores.reshape(1, -1), smallest_kept(scores.flatten(), 300), 300)
    assert torch.equal(found.view_as(scores), keep_largest(scores, 300)) and found.sum() == 300


def test_groups_of_transposed_scores():
    """Scores of a weight that is stored transposed have its strides."""
    scores = torch.rand(16, 32, generator=torch.Generator().manual_seed(0)).T
    found = keep_largest_of_groups(scores, Pattern(8, 16))
    assert torch.equal(found, keep_largest_of_groups(scores.contiguous(), Pattern(8, 16))) and found.sum() == scores.numel() / 2

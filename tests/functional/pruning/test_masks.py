"""How many zeros a sparsity means, and ties."""

import pytest
import torch

from functional.pruning import parse_pattern, zeros_wanted
from functional.pruning.masks import keep_largest, keep_largest_of_rows, zeros_of


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

"""Experts that stay."""

import pytest
import torch

from functional.pruning.experts import kept_experts


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.8])
def test_smallest_of_each_group_go(share, groups):
    scores = torch.rand(40, generator=torch.Generator().manual_seed(0))
    kept, size = kept_experts(scores, share, groups).tolist(), 40 // groups
    expected = []
    for group in range(groups):
        order = sorted(range(group * size, (group + 1) * size), key=lambda expert: -scores[expert].item())
        expected += sorted(order[: size - int(size * share + 1e-9)])
    assert kept == expected


def test_of_equal_experts_the_first_stay():
    assert kept_experts(torch.ones(6), 0.34).tolist() == [0, 1, 2, 3]

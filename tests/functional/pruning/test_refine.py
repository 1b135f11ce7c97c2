"""Rows that an update has harmed go back to their target; against errors over the tokens, in float64."""

import pytest
import torch

from functional.pruning import InputStatistics
from functional.pruning.refine import undo_harmful_updates
from functional.pruning.stack import Stack, energies_of

ROWS, COLUMNS = 6, 10


def rows_of(difference, x):
    """Σ (w x)² of each row over the tokens."""
    return (difference.double() @ x.double().flatten(0, 1).T).square().sum(1)


def problem(dtype, aims=True):
    """Two weights, their target, updates that harm the first three rows and the last one, a mask, and inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 30, COLUMNS, generator=generator)
    weights = [torch.randn(ROWS, COLUMNS, generator=generator).to(dtype) for _ in range(2)]
    target = torch.cat(weights).float()
    target += 0.3 * torch.randn(target.shape, generator=generator) * aims
    mask = torch.rand(target.shape, generator=generator) < 0.6
    updated = target.clone()
    updated[:3] = (target * mask)[:3] + 5 * mask[:3]
    updated[-1] = (target * mask)[-1] + 0.1 * mask[-1]
    return weights, target, [part.to(dtype) for part in updated.split(ROWS)], mask, x


@pytest.mark.parametrize("aims", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_harmed_rows_are_those_of_the_masked_target(dtype, aims):
    weights, target, updated, mask, x = problem(dtype, aims)
    inputs = InputStatistics(COLUMNS).update(x, 0)
    stack = Stack(weights, inputs)
    if aims:
        stack.aim_at(target)
    errors = energies_of(stack.differences(updated), inputs)
    found, after = undo_harmful_updates(list(updated), list(errors), stack, mask, inputs)
    for part, (new, old, error, goal, kept) in enumerate(
        zip(found, updated, after, target.split(ROWS), mask.split(ROWS), strict=True)
    ):
        masked = (goal * kept).to(dtype)
        before, without = (rows_of(goal.double() - w.double(), x) for w in (old, masked))
        undone = before.sum() > without.sum()
        assert undone == (part == 0) and (before > without).tolist() == ([True] * 3 + [False] * 3, [False] * 5 + [True])[part]
        expected = torch.where((undone & (before > without))[:, None], masked, old)
        assert torch.equal(new, expected) and new.dtype == dtype
        assert torch.allclose(error, rows_of(goal.double() - expected.double(), x), rtol=1e-3, atol=1e-6)


def test_rows_whose_target_the_dtype_cannot_hold_keep_their_update():
    weights, target, updated, mask, x = problem(torch.float16)
    inputs = InputStatistics(COLUMNS).update(x, 0)
    mask[0, 0] = True
    target[0, 0] = 1e5  # float16 ends at 65504
    stack = Stack(weights, inputs)
    stack.aim_at(target)
    errors = energies_of(stack.differences(updated), inputs)
    found, after = undo_harmful_updates(list(updated), list(errors), stack, mask, inputs)
    assert all(part.isfinite().all() for part in found) and torch.equal(found[0][0], updated[0][0])
    assert torch.equal(found[0][1:3], (target * mask)[1:3].half())
    for new, error, goal in zip(found, after, target.split(ROWS), strict=True):
        assert torch.allclose(error, rows_of(goal.double() - new.double(), x), rtol=1e-3, atol=1e-6)

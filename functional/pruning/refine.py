"""Improve solved weights row by row: undo updates that raise the error, continue OBS by ADMM where that lowers it."""

import logging

import torch
from torch import Tensor

from functional.pruning.admm import admm_update
from functional.pruning.hessian import preconditioned_of
from functional.pruning.precision import float32_matmul
from functional.pruning.stack import Stack, energies_of
from functional.pruning.statistics import InputStatistics

log = logging.getLogger(__name__)

LEAST_GAIN = 1e-4
"""Relative gain from which on a refined row is taken; float32 rounding stays below it."""

Rows = tuple[list[Tensor], list[Tensor]]
"""Weights of each part (O, I), and the errors of their rows (O,), float64 on the CPU."""


def undo_harmful_updates(
    pruned: list[Tensor], errors: list[Tensor], stack: Stack, mask: Tensor, inputs: InputStatistics
) -> Rows:
    """Put harmed rows back to their target, masked, in parts whose error after the update is larger than that leaves.

    The target T is W, or W⁺ of :mod:`functional.pruning.perturbation` if the stack aims at it. Errors are Σ ‖(T − Ŵ) x‖², so
    that M ⊙ T misses nothing but what the mask drops, as if T had been the weight; M ⊙ W would miss M ⊙ (T − W) as well.
    Rows of T that the weight's dtype cannot hold keep their update.

    Args:
        pruned: Updated weights of each part.
        errors: Errors of the rows of each part.
        stack: The targets.
        mask: (ΣO, I), True = kept.
        inputs: Statistics of x.

    Returns:
        Weights of each part, and the errors of their rows.
    """
    kept = [_masked(*part) for part in zip(stack.dense, stack.split(mask), pruned, strict=True)]
    without = energies_of(stack.differences(kept), inputs)
    for i, part in enumerate(kept):
        if errors[i].sum() <= without[i].sum():
            continue
        harmed = errors[i] > without[i]
        log.warning("The weight update raises the error: %d of %d rows stay without.", harmed.sum(), len(harmed))
        pruned[i] = torch.where(harmed.to(part.device)[:, None], part, pruned[i])
        errors[i] = torch.minimum(errors[i], without[i])
    return pruned, errors


def _masked(target: Tensor, mask: Tensor, updated: Tensor) -> Tensor:
    """Return the masked target in the dtype of the updated weight, whose rows stand in where that cannot hold it."""
    masked = target.masked_fill(~mask, 0).to(updated.dtype)
    return torch.where(masked.isfinite().all(1, keepdim=True), masked, updated)


def refine_by_admm(
    pruned: list[Tensor],
    errors: list[Tensor],
    stack: Stack,
    start: Tensor,
    mask: Tensor,
    inputs: InputStatistics,
    damping: float,
) -> Rows:
    """Replace rows by those of :func:`admm_update` where these have a lower error.

    Args:
        pruned: Weights of each part.
        errors: Errors of the rows of each part.
        stack: The targets.
        start: OBS solution of the whole stack, (ΣO, I), in the stack's units.
        mask: (ΣO, I), True = kept.
        inputs: Statistics of x.
        damping: Share of the Hessian's mean diagonal that is added to it.

    Returns:
        Weights of each part, and the errors of their rows.
    """
    with float32_matmul("highest", mask.device):
        refined = stack.in_own_units(admm_update(stack.scaled, start, mask, preconditioned_of(inputs, damping)))
    refined = [new.to(old.dtype) for new, old in zip(refined, pruned, strict=True)]
    for i, (new, found) in enumerate(zip(refined, energies_of(stack.differences(refined), inputs), strict=True)):
        better = found < (1 - LEAST_GAIN) * errors[i]  # False for NaN: the row has left the range of its dtype
        pruned[i] = torch.where(better.to(new.device)[:, None], new, pruned[i])
        errors[i] = torch.where(better, found, errors[i])
    return pruned, errors

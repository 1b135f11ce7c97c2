"""Solve a stack of linear maps: mask then update, mask and weights together, or mask alone."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from functional.pruning.checks import SolverName
from functional.pruning.hessian import inverse_factor_of, preconditioned_of
from functional.pruning.joint import joint_prune
from functional.pruning.masks import Pattern, mask_by_rows_or_matrix
from functional.pruning.perturbation import Perturbation, corrected_target
from functional.pruning.precision import float32_matmul
from functional.pruning.refine import refine_by_admm, undo_harmful_updates
from functional.pruning.scores import ScoreTerms
from functional.pruning.solver import obs_prune
from functional.pruning.stack import Stack, energies_of
from functional.pruning.statistics import InputStatistics


@dataclass
class Solved:
    """Result of a method for a stack: pruned weights and row errors of each part; mask and scores of the whole stack."""

    weights: list[Tensor]
    errors: list[Tensor]
    mask: Tensor
    scores: Tensor
    damping: float | None = None


def solve_with_update(
    stack: Stack,
    inputs: InputStatistics,
    terms_of: partial[ScoreTerms],
    shares: list[float],
    groups: Pattern | None,
    block_size: int,
    damping: float,
    solver: SolverName,
) -> Solved:
    """Run :func:`obs_prune` with the scores of the inverse Hessian, then `solver`; dead inputs score 0 if others live.

    Args:
        stack: The maps.
        inputs: Statistics of x.
        terms_of: Returns the score for an S_W / W², (I,).
        shares: Share of zeros of each map; not used with a pattern.
        groups: N:M, or None.
        block_size: Columns that the update handles, and compares, at a time.
        damping: Share of the Hessian's mean diagonal that is added to it.
        solver: obs or admm.
    """
    factor, dead, used_damping = inverse_factor_of(inputs, damping)
    dead = dead & ~dead.all()
    terms = terms_of(factor.diagonal().square().reciprocal().masked_fill(dead, 0))
    with float32_matmul("highest", factor.device):
        start, mask, scores = obs_prune(stack.scaled, factor, terms, shares, groups, block_size, stack.parts)
    start.masked_fill_(dead, 0)
    pruned = stack.in_own_dtypes(start)
    errors = energies_of(stack.differences(pruned), inputs)
    pruned, errors = undo_harmful_updates(pruned, errors, stack, mask, inputs)
    if solver == "admm":
        pruned, errors = refine_by_admm(pruned, errors, stack, start, mask, inputs, used_damping)
    return Solved(pruned, errors, mask, scores, used_damping)


def aim_at_dense_outputs(
    stack: Stack, inputs: InputStatistics, perturbation: Perturbation, damping: float, share: float
) -> float:
    """Let the stack's target be W⁺ of :func:`corrected_target`.

    Args:
        stack: The maps.
        inputs: Statistics of x.
        perturbation: What the inputs lack of those in the dense model.
        damping: Share of the Hessian's mean diagonal that is added to it.
        share: α.

    Returns:
        The damping that was used, larger if the Hessian could not be factorised otherwise.
    """
    factor, _, used_damping = inverse_factor_of(inputs, damping)
    with float32_matmul(inputs.precision, factor.device):
        stack.aim_at(corrected_target(torch.cat(stack.dense), perturbation, factor, share, stack.x_unit))
    return used_damping


def solve_jointly(
    stack: Stack,
    inputs: InputStatistics,
    terms_of: partial[ScoreTerms],
    shares: list[float],
    groups: Pattern | None,
    damping: float,
    by_rows: bool,
) -> Solved:
    """Run :func:`joint_prune` with the scores of the inputs' energies, S_W = W² diag(H).

    Args:
        stack: The maps.
        inputs: Statistics of x.
        terms_of: Returns the score for an S_W / W², (I,).
        shares: Share of zeros of each map; not used with a pattern.
        groups: N:M, or None.
        damping: Share of the Hessian's mean diagonal that is added to it.
        by_rows: Whether each row has its share of zeros, or each map.
    """
    preconditioned = preconditioned_of(inputs, damping)
    terms = terms_of(preconditioned.scale.square().reciprocal())
    with float32_matmul(inputs.precision, stack.scaled.device):
        new, mask, scores = joint_prune(stack.scaled, preconditioned, terms, shares, groups, stack.parts, by_rows)
    pruned = stack.in_own_dtypes(new)
    return Solved(pruned, energies_of(stack.differences(pruned), inputs), mask, scores, damping)


def solve_without_update(
    stack: Stack,
    inputs: InputStatistics,
    terms_of: partial[ScoreTerms],
    method: str,
    shares: list[float],
    groups: Pattern | None,
) -> Solved:
    """Mask by |W| or by the energies of the inputs; if all energies are 0, all inputs count alike.

    Args:
        stack: The maps.
        inputs: Statistics of x.
        terms_of: Returns the score for an S_W / W², (I,).
        method: magnitude, wanda or d2_wanda.
        shares: Share of zeros of each map; not used with a pattern.
        groups: N:M, or None.
    """
    if method == "magnitude":
        scores = stack.scaled.abs()
    else:
        energy = inputs.mean_square_norm() * stack.x_unit
        scores = terms_of(energy if energy.any() else torch.ones_like(energy))(stack.scaled)
    mask = mask_by_rows_or_matrix(scores, shares, groups, stack.parts, rows=method != "magnitude")
    pairs = zip(stack.originals, stack.split(mask), strict=True)
    pruned = [weight.to(mask.device).masked_fill(~kept, 0) for weight, kept in pairs]
    return Solved(pruned, energies_of(stack.differences(pruned), inputs), mask, scores)

"""Optimal-brain-surgeon weight update, column by column: SparseGPT's solver with any score.

With H⁻¹ = Uᵀ U, U upper triangular, U_jj² is the [H⁻¹]_jj that is left once all columns before j are fixed. Column by column
err = (w − q) / U_jj, where q is w on the kept rows and 0 elsewhere, and the later columns lose err · U_j,: . Columns are
worked off in blocks: inside a block one by one, after it all later columns at once.
"""

import logging
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from functional.pruning.dispatch import by_kernels
from functional.pruning.masks import Pattern, keep_largest_of_groups, keep_largest_of_rows, zeros_wanted
from functional.pruning.scores import ScoreTerms

log = logging.getLogger(__name__)

DAMPING_GROWTH = 10.0
SMALLEST_RETRY = 1e-4
LARGEST_DAMPING = 10.0

SWEPT_AT_A_TIME = 32
LARGEST_KERNEL_BLOCK = 256
LARGEST_KERNEL_GROUP = 32


class NotPositiveDefiniteError(ValueError):
    """The damped Hessian could not be factorised with any damping up to the limit."""


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
    """Upper triangular U with H⁻¹ = Uᵀ U of the damped Hessian.

    Dead inputs (H_jj = 0) get H_jj = 1; then `damping` · mean(diag H) is added to the diagonal. Where the Cholesky
    factorisation fails, the damping grows tenfold, logged as a warning, up to 10.

    U comes from one factorisation: H = R Rᵀ with R upper triangular (Cholesky from the last column to the first), U = R⁻¹.

    Args:
        hessian: (I, I), symmetric, float32.
        damping: Share of the mean diagonal, at least 0.

    Returns:
        U (I, I), the dead inputs (I,) as bool, and the damping that was used.

    Raises:
        NotPositiveDefiniteError: If no damping up to the limit helps, or the Hessian is not finite.
    """
    if not torch.isfinite(hessian).all():
        raise NotPositiveDefiniteError("The Hessian holds NaN or Inf: the calibration inputs of this linear are not finite.")
    dead = hessian.diagonal() == 0
    damped = hessian + torch.diag(dead.to(hessian.dtype))
    diagonal = damped.diagonal().clone()
    while True:
        damped.diagonal().copy_(diagonal + damping * diagonal.mean())
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not info.any():
            break
        stronger = max(damping * DAMPING_GROWTH, SMALLEST_RETRY)
        if stronger > LARGEST_DAMPING:
            raise NotPositiveDefiniteError(
                f"The Hessian is not positive definite even with a damping of {damping:g} (limit {LARGEST_DAMPING:g}). "
                "Use more calibration tokens, or look for inputs that are hugely scaled."
            )
        log.warning("Hessian not positive definite with damping %g; trying %g.", damping, stronger)
        damping = stronger
    identity = torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True), dead, damping


def obs_prune(
    weight: Tensor,
    factor: Tensor,
    terms: ScoreTerms,
    sparsity: float | Sequence[float],
    pattern: Pattern | None,
    block_size: int,
    parts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the mask and update the kept weights.

    Unstructured: every block of `block_size` columns drops its smallest scores over all rows, such that the zeros of all
    columns so far are always ⌊entries · sparsity⌋. N:M: each group of M columns is chosen when the sweep reaches it, from
    the weights as updated by then; `block_size` is then only a matter of speed and rounded to whole groups.

    Args:
        weight: (O, I), float32; not modified.
        factor: U of :func:`inverse_factor`, (I, I).
        terms: The score of a weight.
        sparsity: Share of zeros, without a pattern; of each of the parts, or one for all.
        pattern: N:M; M divides I.
        block_size: Columns a block.
        parts: Numbers of rows, which sum to O, if the weight is several matrices that read the same inputs, one below the
            other. Each gets its own share of zeros; the result is as if they were pruned one by one.

    Returns:
        New weights (O, I), mask (O, I; True = kept), and the scores that chose it (O, I).
    """
    if pattern is not None:
        block_size = max(block_size // pattern.group, 1) * pattern.group
    blocks = [(start, min(start + block_size, weight.shape[1])) for start in range(0, weight.shape[1], block_size)]
    parts = list(parts or [len(weight)])
    shares = list(sparsity) if isinstance(sparsity, Sequence) else [sparsity] * len(parts)
    task = Task(factor, terms, pattern, blocks, _runs(parts, shares))
    if _fits_kernel(block_size, pattern):
        return by_kernels(
            weight, lambda: _prune_by_kernels(weight.clone(), task), lambda: _prune_by_columns(weight.clone(), task)
        )
    return _prune_by_columns(weight.clone(), task)


class Run(NamedTuple):
    """Parts of one size and share of zeros that follow one another: what is done to one can be done to all in one call."""

    first: int
    last: int
    """Rows `first` to `last` - 1 of the weight."""
    rows: int
    """Of a part."""
    sparsity: float

    def num_zeros(self, start: int, end: int) -> int:
        """Of columns `start` to `end` - 1 of a part, such that those of all columns so far are ⌊entries · sparsity⌋."""
        return zeros_wanted(self.rows * end, self.sparsity) - zeros_wanted(self.rows * start, self.sparsity)


class Task(NamedTuple):
    """What is to be done to a weight: see `obs_prune`."""

    factor: Tensor
    terms: ScoreTerms
    pattern: Pattern | None
    blocks: list[tuple[int, int]]
    """First column and last column + 1 of each."""
    runs: list[Run]


Pruned = tuple[Tensor, Tensor, Tensor]
"""New weights, mask, scores; each (rows, columns)."""


def _prune_by_columns(weight: Tensor, task: Task) -> Pruned:
    """On any device; changes `weight`."""
    factor, terms, pattern = task.factor, task.terms, task.pattern
    mask = torch.ones_like(weight, dtype=torch.bool)
    scores = torch.zeros_like(weight)
    for start, end in task.blocks:
        block = slice(start, end)
        if pattern is None:
            scores[:, block] = terms(weight[:, block], block)
            for run in task.runs:
                chosen = slice(run.first, run.last), block
                entries = scores[chosen].reshape(-1, run.rows * (end - start))
                mask[chosen] = keep_largest_of_rows(entries, run.num_zeros(start, end)).view_as(mask[chosen])
        swept = _sweep(weight[:, block], mask[:, block], factor[block, block], terms, block, pattern)
        weight[:, block], mask[:, block], errors, chosen_by = swept
        if pattern is not None:
            scores[:, block] = chosen_by
        weight[:, end:].addmm_(errors, factor[block, end:], alpha=-1)
    return weight, mask, scores


def _prune_by_kernels(weight: Tensor, task: Task) -> Pruned:
    """The same by the kernels of `solver_triton`."""
    from functional.pruning.solver_triton import Sweeper

    sweeper = Sweeper(weight, task.factor.contiguous(), task.terms.coefficients(slice(None), len(weight)))
    for start, end in task.blocks:
        width = end - start
        errors = weight.new_empty(len(weight), width)
        if task.pattern is not None:
            sweeper.sweep_groups(start, width, errors, *task.pattern)
        else:
            scores = sweeper.score(start, width)
            for run in task.runs:
                sweeper.sweep(start, width, errors, run[:3], scores, run.num_zeros(start, end))
        weight[:, end:].addmm_(errors, task.factor[start:end, end:], alpha=-1)
    return sweeper.new, sweeper.kept.view(torch.bool), sweeper.scores


def _runs(parts: list[int], shares: list[float]) -> list[Run]:
    """Parts, by their numbers of rows, and their shares of zeros."""
    runs, first = [], 0
    for (rows, share), alike in groupby(zip(parts, shares, strict=True)):
        last = first + rows * len(list(alike))
        runs.append(Run(first, last, rows, share))
        first = last
    return runs


Swept = tuple[Tensor, Tensor, Tensor, Tensor]
"""Weights, mask, errors (w − q) / U_jj, and with N:M the scores that chose the mask; each (rows, columns)."""


def _sweep(weight: Tensor, mask: Tensor, factor: Tensor, terms: ScoreTerms, block: slice, pattern: Pattern | None) -> Swept:
    """One block of columns, column by column; held transposed: a column side by side is a quarter faster on a CPU.

    Columns beyond the next few get their share of the update later, all at once.
    """
    weight, kept = (x.T.clone(memory_format=torch.contiguous_format) for x in (weight, mask))
    errors, scores = torch.zeros_like(weight), torch.zeros_like(weight)
    width = SWEPT_AT_A_TIME if pattern is None else -(-SWEPT_AT_A_TIME // pattern.group) * pattern.group
    for start in range(0, len(weight), width):
        end = min(start + width, len(weight))
        for j in range(start, end):
            if pattern is not None and j % pattern.group == 0:
                within = slice(j, j + pattern.group)
                columns = slice(block.start + j, block.start + j + pattern.group)
                scores[within] = terms(weight[within].T, columns).T
                kept[within] = keep_largest_of_groups(scores[within].T, pattern).T
            torch.div(weight[j].masked_fill(kept[j], 0), factor[j, j], out=errors[j])
            weight[j].masked_fill_(~kept[j], 0)
            weight[j + 1 : end].addr_(factor[j, j + 1 : end], errors[j], alpha=-1)
        weight[end:].addmm_(factor[start:end, end:].T, errors[start:end], alpha=-1)
    return weight.T, kept.T, errors.T, scores.T


def _fits_kernel(block_size: int, pattern: Pattern | None) -> bool:
    """Whether a row of a block fits into the registers of solver_triton's kernels."""
    return block_size <= LARGEST_KERNEL_BLOCK and (pattern is None or pattern.group <= LARGEST_KERNEL_GROUP)

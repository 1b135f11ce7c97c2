"""Optimal-brain-surgeon weight update, column by column: SparseGPT's solver with any score.

With H⁻¹ = Uᵀ U, U upper triangular, U_jj² is the value of [H⁻¹]_jj once all columns before j are fixed. For each column,
err = (w − q) / U_jj, where q is w on the kept rows and 0 on the others, and err · U_j,: is subtracted from the later columns.
Columns are processed in blocks: one by one inside a block, then all later columns at once.
"""

import logging
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from functional.pruning.admm import triangular_inverse
from functional.pruning.dispatch import by_kernels
from functional.pruning.masks import Pattern, keep_largest_of_groups, keep_largest_of_rows, zeros_wanted
from functional.pruning.precision import float32_matmul
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
    """Factorise the inverse of the damped Hessian: H⁻¹ = Uᵀ U with U upper triangular.

    Dead inputs (H_jj = 0) get H_jj = 1; then `damping` · mean(diag H) is added to the diagonal. If the Cholesky factorisation
    fails, the damping grows tenfold, up to 10, and a warning says so.

    U comes from one factorisation: H = R Rᵀ with R upper triangular (Cholesky from the last column to the first), U = R⁻¹.

    Args:
        hessian: (I, I), symmetric, float32.
        damping: Share of the mean diagonal, at least 0.

    Returns:
        U (I, I), the dead inputs (I,) as bool, and the damping that was used.

    Raises:
        NotPositiveDefiniteError: If no damping up to the limit helps, or the Hessian is not finite.

    Examples:
        >>> factor, dead, damping = inverse_factor(torch.diag(torch.tensor([4.0, 0.0])), damping=0.0)
        >>> factor.tolist(), dead.tolist()
        ([[0.5, 0.0], [0.0, 1.0]], [False, True])
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
    if lower.is_cuda:
        with float32_matmul("highest", lower.device):
            return triangular_inverse(lower).flip(0, 1), dead, damping
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

    Unstructured: every block of `block_size` columns drops its smallest scores over all rows, so that the zeros of all columns
    so far are always ⌊entries · sparsity⌋. N:M: each group of M columns is chosen when the sweep reaches it, from the weights
    as updated by then; `block_size` then only matters for speed and is rounded to whole groups.

    Args:
        weight: (O, I), float32; not modified.
        factor: U of :func:`inverse_factor`, (I, I).
        terms: The score of a weight.
        sparsity: Share of zeros of each part, or one for all; not used with a pattern.
        pattern: N:M, or None; M divides I.
        block_size: Columns of a block.
        parts: Numbers of rows of the parts, which sum to O, if the weight stacks several matrices that read the same inputs.
            Each gets its own share of zeros; the result is as if they were pruned one by one.

    Returns:
        New weights (O, I), mask (O, I; True = kept), and the scores that chose it (O, I).

    Examples:
        Two correlated inputs: the kept weight takes over a half of the dropped one.

        >>> factor, _, _ = inverse_factor(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), damping=0.0)
        >>> terms = ScoreTerms(factor.diagonal().square().reciprocal())
        >>> weight, mask, _ = obs_prune(torch.tensor([[1.0, 2.0]]), factor, terms, 0.5, pattern=None, block_size=2)
        >>> weight, mask
        (tensor([[0.0000, 2.5000]]), tensor([[False,  True]]))
    """
    if pattern is not None:
        block_size = max(block_size // pattern.group, 1) * pattern.group
    blocks = [(start, min(start + block_size, weight.shape[1])) for start in range(0, weight.shape[1], block_size)]
    parts = list(parts or [len(weight)])
    shares = list(sparsity) if isinstance(sparsity, Sequence) else [sparsity] * len(parts)
    task = Task(factor, terms, pattern, blocks, _spans(parts, shares))
    if _fits_kernel(block_size, pattern):
        return by_kernels(
            weight, lambda: _prune_by_kernels(weight.clone(), task), lambda: _prune_by_columns(weight.clone(), task)
        )
    return _prune_by_columns(weight.clone(), task)


class Span(NamedTuple):
    """Consecutive parts with the same number of rows and share of zeros, which are handled in one call."""

    first: int
    last: int
    """The span has rows `first` to `last` - 1 of the weight."""
    rows: int
    """Number of rows of a part."""
    sparsity: float

    def num_zeros(self, start: int, end: int) -> int:
        """Return the zeros of columns `start` to `end` - 1 of a part; all columns so far have ⌊entries · sparsity⌋."""
        return zeros_wanted(self.rows * end, self.sparsity) - zeros_wanted(self.rows * start, self.sparsity)


class Task(NamedTuple):
    """Arguments of `obs_prune` as the sweeps need them."""

    factor: Tensor
    terms: ScoreTerms
    pattern: Pattern | None
    blocks: list[tuple[int, int]]
    """First column and last column + 1 of each block."""
    spans: list[Span]


Pruned = tuple[Tensor, Tensor, Tensor]
"""New weights, mask, scores; each (rows, columns)."""


def _prune_by_columns(weight: Tensor, task: Task) -> Pruned:
    """Prune with PyTorch's operators, on any device; changes `weight`."""
    factor, terms, pattern = task.factor, task.terms, task.pattern
    mask = torch.ones_like(weight, dtype=torch.bool)
    scores = torch.zeros_like(weight)
    for start, end in task.blocks:
        block = slice(start, end)
        if pattern is None:
            scores[:, block] = terms(weight[:, block], block)
            for span in task.spans:
                chosen = slice(span.first, span.last), block
                entries = scores[chosen].reshape(-1, span.rows * (end - start))
                mask[chosen] = keep_largest_of_rows(entries, span.num_zeros(start, end)).view_as(mask[chosen])
        swept = _sweep(weight[:, block], mask[:, block], factor[block, block], terms, block, pattern)
        weight[:, block], mask[:, block], errors, chosen_by = swept
        if pattern is not None:
            scores[:, block] = chosen_by
        weight[:, end:].addmm_(errors, factor[block, end:], alpha=-1)
    return weight, mask, scores


def _prune_by_kernels(weight: Tensor, task: Task) -> Pruned:
    """Prune with the kernels of `solver_triton`; changes `weight`."""
    from functional.pruning.solver_triton import Sweeper

    sweeper = Sweeper(weight, task.factor.contiguous(), task.terms.coefficients(slice(None), len(weight)))
    for start, end in task.blocks:
        width = end - start
        errors = weight.new_empty(len(weight), width)
        if task.pattern is not None:
            sweeper.sweep_groups(start, width, errors, *task.pattern)
        else:
            scores = sweeper.score(start, width)
            for span in task.spans:
                sweeper.sweep(start, width, errors, span[:3], scores, span.num_zeros(start, end))
        weight[:, end:].addmm_(errors, task.factor[start:end, end:], alpha=-1)
    return sweeper.new, sweeper.kept.view(torch.bool), sweeper.scores


def _spans(parts: list[int], shares: list[float]) -> list[Span]:
    """Join consecutive parts that have the same number of rows and share of zeros."""
    spans, first = [], 0
    for (rows, share), alike in groupby(zip(parts, shares, strict=True)):
        last = first + rows * len(list(alike))
        spans.append(Span(first, last, rows, share))
        first = last
    return spans


Swept = tuple[Tensor, Tensor, Tensor, Tensor]
"""Weights, mask, errors (w − q) / U_jj, and with N:M the scores that chose the mask; each (rows, columns)."""


def _sweep(weight: Tensor, mask: Tensor, factor: Tensor, terms: ScoreTerms, block: slice, pattern: Pattern | None) -> Swept:
    """Sweep one block column by column.

    The block is transposed, so that a column is contiguous: a quarter faster on a CPU. Columns beyond the next
    `SWEPT_AT_A_TIME` are updated later, all at once.
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
    """Return whether a row of a block fits into the registers of solver_triton's kernels."""
    return block_size <= LARGEST_KERNEL_BLOCK and (pattern is None or pattern.group <= LARGEST_KERNEL_GROUP)

"""Optimal-brain-surgeon weight update, column by column: SparseGPT's solver with any score.

With H⁻¹ = Uᵀ U, U upper triangular, U_jj² is the [H⁻¹]_jj that is left once all columns before j are fixed. Column by column
err = (w − q) / U_jj, where q is w on the kept rows and 0 elsewhere, and the later columns lose err · U_j,: . Columns are
worked off in blocks: inside a block one by one, after it all later columns at once.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from functional.pruning.masks import Pattern, keep_largest, keep_largest_of_rows, zeros_wanted

log = logging.getLogger(__name__)

DAMPING_GROWTH = 10.0
SMALLEST_RETRY = 1e-4
LARGEST_DAMPING = 10.0

ScoreColumns = Callable[[Tensor, slice], Tensor]
"""(current weights of some columns (O, c), which columns) -> scores (O, c), without the OBS term's factor."""


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
    score: ScoreColumns,
    sparsity: float,
    pattern: Pattern | None,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the mask and update the kept weights.

    Unstructured: every block of `block_size` columns drops its smallest scores over all rows, such that the zeros of all
    columns so far are always ⌊entries · sparsity⌋. N:M: each group of M columns is chosen when the sweep reaches it, from
    the weights as updated by then; `block_size` is then only a matter of speed and rounded to whole groups.

    Args:
        weight: (O, I), float32; not modified.
        factor: U of :func:`inverse_factor`, (I, I).
        score: Scores of some columns from their current weights.
        sparsity: Share of zeros, without a pattern.
        pattern: N:M; M divides I.
        block_size: Columns a block.

    Returns:
        New weights (O, I), mask (O, I; True = kept), and the scores that chose it (O, I).
    """
    weight = weight.clone()
    mask = torch.ones_like(weight, dtype=torch.bool)
    scores = torch.zeros_like(weight)
    rows, columns = weight.shape
    if pattern is not None:
        block_size = max(block_size // pattern.group, 1) * pattern.group
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        block = slice(start, end)
        if pattern is None:
            num_zeros = zeros_wanted(rows * end, sparsity) - zeros_wanted(rows * start, sparsity)
            scores[:, block] = score(weight[:, block], block)
            mask[:, block] = keep_largest(scores[:, block], num_zeros)
        columns_first = weight[:, block].T.contiguous()  # a column side by side in memory: a quarter faster on CPU
        errors = torch.zeros_like(columns_first)
        kept = mask[:, block].T.contiguous()
        for j, column in enumerate(range(start, end)):
            if pattern is not None and column % pattern.group == 0:
                group, within = slice(column, column + pattern.group), slice(j, j + pattern.group)
                scores[:, group] = score(columns_first[within].T, group)
                kept[within] = keep_largest_of_rows(scores[:, group], pattern.zeros).T
            torch.div(columns_first[j].masked_fill(kept[j], 0), factor[column, column], out=errors[j])
            columns_first[j].masked_fill_(~kept[j], 0)
            columns_first[j + 1 :].addr_(factor[column, column + 1 : end], errors[j], alpha=-1)
        weight[:, block], mask[:, block] = columns_first.T, kept.T
        weight[:, end:].addmm_(errors.T, factor[block, end:], alpha=-1)
    return weight, mask, scores

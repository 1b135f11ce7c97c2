"""Two published solvers, written here from their papers, to be measured in the place of ours on the same windows.

`as_solver` puts one of them where `solver: joint` calls :func:`functional.pruning.joint.joint_prune`; everything around it
(blocks, statistics, sparsity) is that of the project. Both work in coordinates in which the Hessian has ones in its diagonal,
with weights of dead inputs (always 0) at 0 from the start, as ours does: they change no output, so the papers' objective is the
same, and they must not take places in the mask.

    ladmm   "Fast and Effective Weight Update for Pruned Large Language Models" (arXiv 2401.02938), Algorithms 1 and 2
    alps    "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models" (arXiv 2406.07831)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from functional.pruning.admm import Preconditioned
from functional.pruning.joint import least_squares
from functional.pruning.masks import Pattern, mask_by_rows_or_matrix
from functional.pruning.scores import ScoreTerms

Pruned = tuple[Tensor, Tensor, Tensor]
"""Weights, mask, scores; each (rows, columns)."""


def ladmm(
    target: Tensor, preconditioned: Preconditioned, terms: ScoreTerms, shares: Sequence[float], pattern: Pattern | None,
    parts: Sequence[int], by_rows: bool, iterations: int = 20, ramp: int = 15,
) -> Pruned:  # fmt: skip
    """Choose gradual masks by |W + U| with a cubic ramp of the sparsity, penalty 1; then project.

    Args:
        target: W, (ΣO, I).
        preconditioned: G and D.
        terms: Not used: the paper's score is the magnitude in these coordinates.
        shares: Share of zeros of each part.
        pattern: N:M, or None.
        parts: Number of rows of each part.
        by_rows: Whether rows have their share, or matrices.
        iterations: Number of iterations.
        ramp: Iterations until all zeros are there.
    """
    dense = _coordinates(target, preconditioned)
    product, inverse = dense @ preconditioned.gram, preconditioned.inverse
    free, dual = dense, torch.zeros_like(dense)
    mask = torch.ones_like(dense, dtype=torch.bool)
    for iteration in range(1, iterations + 1):
        if iteration <= ramp:
            progress = 1 - (1 - iteration / ramp) ** 3
            present = [share * progress for share in shares]
            mask = mask_by_rows_or_matrix((free + dual).abs(), present, pattern, parts, by_rows)
        kept = (free + dual) * mask
        dual = dual + free - kept
        free = (product + kept - dual) @ inverse
    kept = (free + dual) * mask
    return kept * preconditioned.scale, mask, kept.abs()


def alps(
    target: Tensor, preconditioned: Preconditioned, terms: ScoreTerms, shares: Sequence[float], pattern: Pattern | None,
    parts: Sequence[int], by_rows: bool, most: int = 300, every: int = 3,
) -> Pruned:  # fmt: skip
    """Project on the best mask under a penalty that rises as the support settles; conjugate gradients on the last support.

    The penalty starts at 0.1; every third iteration it grows by 1.3, 1.2 or 1.1, as more than 10 %, more than 0.5 % or any of
    the kept weights have changed, and the iteration ends when none has.

    Args:
        target: W, (ΣO, I).
        preconditioned: G and D.
        terms: Not used: the paper's score is the magnitude in these coordinates.
        shares: Share of zeros of each part.
        pattern: N:M, or None.
        parts: Number of rows of each part.
        by_rows: Whether rows have their share, or matrices.
        most: Largest number of iterations.
        every: Iterations between two looks at the support.
    """
    dense, gram = _coordinates(target, preconditioned), preconditioned.gram
    values, vectors = torch.linalg.eigh(gram)
    product, penalty = dense @ gram, 0.1
    kept, dual = dense, torch.zeros_like(dense)
    before = mask = torch.ones_like(dense, dtype=torch.bool)
    for iteration in range(most):
        free = (((product - dual + penalty * kept) @ vectors) / (values + penalty)) @ vectors.T
        scores = (free + dual / penalty).abs()
        mask = mask_by_rows_or_matrix(scores, shares, pattern, parts, by_rows)
        kept = (free + dual / penalty) * mask
        dual = dual + penalty * (free - kept)
        if iteration % every == 0:
            changed = ((mask != before).sum() / (2 * mask.sum())).item()
            if iteration and not changed:
                break
            penalty *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
            before = mask
    return least_squares(dense, kept, mask, gram, steps=10) * preconditioned.scale, mask, kept.abs()


def _coordinates(target: Tensor, preconditioned: Preconditioned) -> Tensor:
    """Return W D⁻¹, 0 at dead inputs unless all are dead."""
    dead = preconditioned.dead
    return (target / preconditioned.scale).masked_fill(dead & ~dead.all(), 0)


@contextmanager
def as_solver(rival: str) -> Iterator[None]:
    """Let `solver: joint` be a rival within the context.

    Args:
        rival: ladmm or alps; empty for our own.
    """
    if not rival:
        yield
        return
    with mock.patch("functional.pruning.methods.joint_prune", {"ladmm": ladmm, "alps": alps}[rival]):
        yield

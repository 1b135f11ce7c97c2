"""Half a step of the joint solver: from F = B + U to what the next product needs (functional.pruning.joint).

With the mask M that a limit gives, Z = M ⊙ F and U = F − Z. The next iteration multiplies Z − U − B₀ and adds B₀ + U. U is in
units of 1 / ρ, so it shrinks by ρ / ρ' when the penalty rises to ρ'. A GPU does this in one launch, which reads every
matrix once; a CPU takes as many rows at a time as its cache holds.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from functional.pruning.dispatch import by_kernels
from functional.pruning.masks import Pattern, keep_largest_of_groups, zeros_wanted
from functional.pruning.scores import ScoreTerms

SAMPLE = 2**16
"""Scores that the limit of a matrix is searched for in."""
CACHED = 2**16
"""Weights that a CPU splits at a time."""


class Limits:
    """Finds the limit between scores that are dropped and kept, of matrices that lie one below the other.

    Args:
        terms: Score of a weight.
        shares: Share of zeros of each matrix.
        pattern: N:M, which has no limits, or None.
        parts: Number of rows of each matrix.
        by_rows: Whether each row has a limit of its own.
        like: A matrix of the shape and device of those that `of` takes.
    """

    def __init__(
        self,
        terms: ScoreTerms,
        shares: Sequence[float],
        pattern: Pattern | None,
        parts: Sequence[int],
        by_rows: bool,
        like: Tensor,
    ) -> None:
        self._terms, self._pattern, self._by_rows = terms, pattern, by_rows
        self._parts, self._shares = list(parts), list(shares)
        self._samples: list[tuple[int, Tensor, Tensor]] = []
        """Of each matrix: every how manieth entry is sampled, and coefficients of F² and |F| of these entries."""
        if pattern is None and not by_rows:
            columns, first = like.shape[1], 0
            square, linear, rows = terms.coefficients(slice(None), len(like))
            for part in self._parts:
                step = part * columns // SAMPLE or 1
                while math.gcd(step, columns) > 1:  # so that it walks through all columns
                    step += 1
                entries = torch.arange(0, part * columns, step, device=like.device)
                row, column = first + entries // columns, entries % columns
                self._samples.append((step, square[column], linear[column] * rows[row]))
                first += part

    def of(self, free: Tensor) -> Tensor | Pattern:
        """Return the limit of every row, (ΣO, 1): weights with a smaller score are dropped; or the pattern.

        That of a matrix, unless it is small, is the limit of a sample: the share is met within some tenths of a percent.

        Args:
            free: F, (ΣO, I), contiguous.
        """
        if self._pattern is not None:
            return self._pattern
        if self._by_rows:
            return self._of_rows(self._terms(free))
        found = []
        for part, share, (step, square, linear) in zip(free.split(self._parts), self._shares, self._samples, strict=True):
            size = part.view(-1)[::step].abs()
            scores = (square * size).add_(linear).mul_(size)
            zeros = zeros_wanted(part.numel(), share) * len(scores) // part.numel()
            found.append(limit_after(scores, zeros).expand(len(part), 1))
        return torch.cat(found)

    def _of_rows(self, scores: Tensor) -> Tensor:
        zeros = [zeros_wanted(scores.shape[1], share) for share in self._shares]
        pairs = zip(scores.split(self._parts), zeros, strict=True)
        return torch.cat([limit_after(part, number) for part, number in pairs])


def limit_after(scores: Tensor, number: int) -> Tensor:
    """Return the middle between the `number` smallest scores of every row and the others, (..., 1); −inf for none.

    Between two scores no rounding of them decides.

    Args:
        scores: (..., N), float32.
        number: Less than N.

    Examples:
        >>> limit_after(torch.tensor([4.0, 1.0, 2.0, 3.0]), 2)
        tensor([2.5000])
    """
    if not number:
        return scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    around = slice(number - 1, number + 1)
    if scores.device.type == "cpu":
        ordered = torch.from_numpy(np.partition(scores.numpy(), (number - 1, number), axis=-1)[..., around])
    else:
        ordered = scores.sort(-1).values[..., around]
    return ordered.mean(-1, keepdim=True)


def split(
    free: Tensor,
    dense: Tensor,
    terms: ScoreTerms,
    limits: Tensor | Pattern,
    ratio: float,
    base: Tensor,
    change: Tensor,
) -> None:
    """Fill `base` with B₀ + r U and `change` with Z − r U − B₀.

    Args:
        free: F, (ΣO, I), contiguous, as all matrices; not modified.
        dense: B₀, (ΣO, I).
        terms: Score of a weight.
        limits: Scores below which weights of each row are dropped, (ΣO, 1), or N:M.
        ratio: r, the penalty before divided by the next one.
        base: (ΣO, I), receives the first result.
        change: (ΣO, I), receives the second result.
    """

    def kernels() -> None:
        from functional.pruning.joint_triton import split_by_kernel

        split_by_kernel(free, dense, terms, limits, ratio, base, change)

    def plain() -> None:
        at_a_time = len(free) if free.is_cuda else max(1, CACHED // free.shape[1])
        for start in range(0, len(free), at_a_time):
            rows = slice(start, start + at_a_time)
            part, target = free[rows], dense[rows]
            scores = terms.of_rows(rows)(part)
            if isinstance(limits, Pattern):
                multipliers = part.masked_fill(keep_largest_of_groups(scores, limits), 0)
            else:
                multipliers = scores.lt_(limits[rows]).mul_(part)  # times 1 or 0, faster than a mask on a CPU
            torch.add(target, multipliers, alpha=ratio, out=base[rows])
            torch.sub(part, target, out=change[rows]).sub_(multipliers, alpha=1 + ratio)

    by_kernels(free, kernels, plain)

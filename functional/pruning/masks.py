"""From scores to masks: which entries of a (rows, columns) score matrix are kept.

Larger score = keep; True = kept; ties lose from the left (stable sort), so a mask is the same on every device.
"N:M" means N zeros in every M consecutive weights of a row: 3:4 is 75 % zeros.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from numbers import Real
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

Scores = TypeVar("Scores", Tensor, np.ndarray)

LARGEST_COMPARED_GROUP = 8
"""Largest group of an N:M pattern that is compared entry by entry; larger groups are sorted."""
LONG_ROW, LONG_ROW_ON_GPU = 2**16, 2**22
"""Least number of scores of a single row whose threshold is searched for."""
SAMPLED, SAMPLED_MARGIN = 2**14, 320
"""Number of scores that the search looks at first, and how far around the expected place it goes on: five deviations."""


class Pattern(NamedTuple):
    """N:M semi-structured sparsity."""

    zeros: int
    group: int

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.group

    def __str__(self) -> str:
        return f"{self.zeros}:{self.group}"


def parse_pattern(pattern: str | Pattern | None) -> Pattern | None:
    """Parse an N:M pattern; None and a Pattern are returned as they are.

    Raises:
        ValueError: If it is not of the form N:M with 0 < N < M.

    Examples:
        >>> parse_pattern("2:4")
        Pattern(zeros=2, group=4)
        >>> parse_pattern("2:4").sparsity
        0.5
    """
    if pattern is None or isinstance(pattern, Pattern):
        return pattern
    match = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", pattern) if isinstance(pattern, str) else None
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(
            f"Argument `pattern` expected to be N:M, N zeros in every M weights with 0 < N < M, such as '2:4', "
            f"but got {pattern!r}."
        )
    return Pattern(int(match[1]), int(match[2]))


def check_sparsity(sparsity: float) -> None:
    """Check that a sparsity is a share of zeros.

    Raises:
        ValueError: Unless 0 <= sparsity < 1.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real) or not 0 <= sparsity < 1:
        raise ValueError(f"Argument `sparsity` expected to be a share of zeros in [0, 1) but got {sparsity!r}.")


def zeros_wanted(numel: int, sparsity: float) -> int:
    """Return ⌊numel · sparsity⌋, undoing the binary rounding of the sparsity: 29 % of 100 is 29, and 2/3 of 6 is 4.

    A `Fraction` is taken as it is, so that any number of zeros can be asked for.

    Examples:
        >>> zeros_wanted(100, 0.29), int(100 * 0.29)
        (29, 28)
    """
    exact = sparsity if isinstance(sparsity, Fraction) else Fraction(float(sparsity)).limit_denominator(10**6)
    return int(numel * exact)


def zeros_of(shape: tuple[int, int], by_rows: bool, sparsity: float, pattern: str | Pattern | None) -> int:
    """Return the number of zeros that `prune_linear` puts into a weight.

    Args:
        shape: (O, I).
        by_rows: Whether every row loses equally many weights.
        sparsity: Share of zeros; not used with a pattern.
        pattern: N:M, or None.

    Examples:
        >>> [zeros_of((3, 5), by_rows, 0.5, None) for by_rows in (False, True)]
        [7, 6]
    """
    rows, columns = shape
    groups = parse_pattern(pattern)
    if groups is not None:
        return rows * columns // groups.group * groups.zeros
    if by_rows:
        return rows * zeros_wanted(columns, sparsity)
    return zeros_wanted(rows * columns, sparsity)


def keep_largest(scores: Tensor, num_zeros: int) -> Tensor:
    """Drop the `num_zeros` smallest scores of the whole matrix: bool, like `scores`.

    Examples:
        >>> keep_largest(torch.tensor([[4.0, 1.0], [2.0, 3.0]]), num_zeros=2)
        tensor([[ True, False],
                [False,  True]])
    """
    return keep_largest_of_rows(scores.reshape(1, -1), num_zeros).view_as(scores)


def keep_largest_of_rows(scores: Tensor, num_zeros: int) -> Tensor:
    """Drop the `num_zeros` smallest scores of every row (last dimension): bool, like `scores`.

    A CPU sorts rows partially, in linear time, a GPU as a whole. Of a single long row only the threshold is searched for.

    Examples:
        Ties lose from the left.

        >>> keep_largest_of_rows(torch.tensor([[4.0, 1.0, 2.0], [1.0, 1.0, 1.0]]), num_zeros=1)
        tensor([[ True, False,  True],
                [False,  True,  True]])
    """
    if num_zeros in (0, scores.shape[-1]) or scores.numel() == 0:
        return torch.full_like(scores, num_zeros == 0, dtype=torch.bool)
    single = scores.shape[-1] == scores.numel()
    if scores.device.type == "cpu":
        values = scores.detach().float().numpy()  # numpy knows no bfloat16; the order stays
        if single and scores.numel() >= LONG_ROW:
            smallest = smallest_kept(values.ravel(), num_zeros)
        else:
            smallest = np.partition(values, num_zeros, axis=-1)[..., num_zeros : num_zeros + 1]
        return _keep_from(scores, torch.from_numpy(smallest), num_zeros)
    if single and scores.numel() >= LONG_ROW_ON_GPU:
        return _keep_from(scores, smallest_kept(scores.flatten(), num_zeros), num_zeros)
    keep = torch.ones_like(scores, dtype=torch.bool)
    return keep.scatter_(-1, torch.sort(scores, dim=-1, stable=True).indices[..., :num_zeros], False)


def keep_largest_of_groups(scores: Tensor, pattern: Pattern) -> Tensor:
    """Drop the N smallest scores of every group of M consecutive columns: bool, like `scores`, (rows, columns).

    Raises:
        ValueError: If M does not divide the number of columns.

    Examples:
        >>> keep_largest_of_groups(torch.tensor([[4.0, 1.0, 2.0, 3.0]]), parse_pattern("2:4"))
        tensor([[ True, False, False,  True]])
    """
    check_divisible(scores.shape[1], pattern)
    groups = scores.reshape(scores.shape[0], -1, pattern.group)
    if pattern.group > LARGEST_COMPARED_GROUP:
        return keep_largest_of_rows(groups, pattern.zeros).view_as(scores)
    return (_rank(groups) >= pattern.zeros).reshape(scores.shape)


def mask_by_rows_or_matrix(
    scores: Tensor, shares: Sequence[float], pattern: Pattern | None, parts: Sequence[int], rows: bool
) -> Tensor:
    """Choose the masks of several stacked matrices, for methods without a weight update: bool, like `scores`.

    Args:
        scores: (ΣO, I).
        shares: Share of zeros of each matrix; not used with a pattern.
        pattern: N:M, or None.
        parts: Number of rows of each matrix.
        rows: Whether scores are compared within each row; if not, within the whole matrix.
    """
    if pattern is not None:
        return keep_largest_of_groups(scores, pattern)
    keep = keep_largest_of_rows if rows else keep_largest
    pairs = zip(scores.split(list(parts)), shares, strict=True)
    return torch.cat([keep(part, zeros_wanted(part.shape[1] if rows else part.numel(), share)) for part, share in pairs])


def check_divisible(in_features: int, pattern: Pattern) -> None:
    """Check that rows of `in_features` weights fall into whole groups.

    Raises:
        ValueError: If M does not divide `in_features`.
    """
    if in_features % pattern.group:
        raise ValueError(
            f"Argument `pattern`: {pattern} needs rows that fall into groups of {pattern.group}, but in_features is "
            f"{in_features}. Choose an M that divides it, or an unstructured `sparsity`."
        )


def smallest_kept(scores: Scores, num_zeros: int) -> Scores:
    """Return the smallest score that is kept, (1,), from a small part of the scores that is sorted.

    Every n-th score tells between which two values it nearly surely is; if it is not, all are sorted.

    Args:
        scores: (N,), a tensor or an array of numpy, which is faster on a CPU.
        num_zeros: Number of scores to drop, less than N.

    Examples:
        >>> smallest_kept(torch.tensor([4.0, 1.0, 2.0, 3.0]), num_zeros=2)
        tensor([3.])
    """
    step = len(scores) // SAMPLED | 1  # odd, so that it walks through all columns of a matrix
    sample = _ascending(scores[::step])
    place, last = num_zeros // step, len(sample) - 1
    low = sample[place - SAMPLED_MARGIN] if place > SAMPLED_MARGIN else -torch.inf
    high = sample[place + SAMPLED_MARGIN] if place + SAMPLED_MARGIN < last else torch.inf
    below = int((scores < low).sum())
    middle = scores[(scores >= low) & (scores <= high)]
    if not 0 <= num_zeros - below < len(middle):
        below, middle = 0, scores
    return _ascending(middle)[num_zeros - below :][:1]


def _ascending(scores: Scores) -> Scores:
    return np.sort(scores) if isinstance(scores, np.ndarray) else scores.sort().values


def _keep_from(scores: Tensor, smallest: Tensor, num_zeros: int) -> Tensor:
    """Keep scores from the smallest one on, (..., 1), and of those that equal it the right ones."""
    keep = (scores >= smallest).contiguous()  # of transposed scores too
    rows = keep.view(-1, scores.shape[-1])
    kept = rows.sum(-1, dtype=torch.int32)  # int64 is ten times slower on a CPU
    excess = kept - (scores.shape[-1] - num_zeros)  # ties with the smallest that have to go
    if excess.any():
        row, column = (scores == smallest).reshape(rows.shape).nonzero().unbind(1)
        counts = torch.bincount(row, minlength=len(rows))
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        goes = place < excess[row]
        rows[row[goes], column[goes]] = False
    return keep


def _rank(scores: Tensor) -> Tensor:
    """Count the scores of the same group (last dimension) that are smaller, or equal and further left; uint8."""
    places = scores.movedim(-1, 0).contiguous()  # comparisons of whole rows are many times faster than of every M-th entry
    rank = torch.zeros(places.shape, dtype=torch.uint8, device=scores.device)
    for left, right in combinations(range(len(places)), 2):
        right_wins = places[left] <= places[right]
        rank[right] += right_wins
        rank[left] += ~right_wins
    return rank.movedim(0, -1)

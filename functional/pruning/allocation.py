"""Share a total number of zeros out over the parts of a model. Pure functions; a part is a block or a linear.

    uniform   the same share S everywhere
    owl       parts with more outliers among their scores |W_ij| ‖X_j‖ keep more (OWL, arXiv 2310.05175):
              D_b = share of the scores of part b that are larger than M times their mean;
              S_b = S + Λ − 2Λ (D_b − min D) / (max D − min D) + δ, with the one δ that leaves S over all weights
    depth     shares fall from the first part to the last: S_b = S + Λ − 2Λ b / (B − 1) + δ, b = 0 ... B − 1, which is `owl`
              with D_b = b
    error     the last weight that is taken costs the same everywhere:
              minimise Σ_b E_b(S_b)  subject to  Σ_b n_b S_b = zeros,  low ≤ S_b ≤ high,
              so E_b'(S_b) / n_b = μ for every S_b that no bound stops, with one multiplier μ for all parts

E_b(S) estimates the relative error of the block's output h' if its input h is that of the dense model:

    E_b(S) = r_b · mean over its linears of e(S)     r_b = mean over tokens of ‖h' − h‖² / ‖h'‖²

r_b is the share of the hidden states that the block itself writes: the residual stream dilutes an error in that share.
e(S) is the relative error of a linear, estimated without a Gram matrix as if its inputs were uncorrelated. With
s_ij = W_ij² ‖X_j‖² it is the sum of the ⌊S · numel⌋ smallest s divided by the sum of all s: the error of a Wanda mask over the
whole matrix, without a weight update. Every token of X is scaled to length 1 first; otherwise a few huge tokens (attention
sinks) would decide.

The curve of a sorted sum is convex, and piecewise linear between its grid points, so taking pieces in the order of their slopes
per weight until the zeros are spent solves the problem exactly: the slope of the last piece is μ.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Allocation = Literal["uniform", "owl", "error", "depth"]

GRID = 1000
"""Number of pieces of an error curve."""
MOST_SCORES = 2**18
"""Largest number of scores that are sorted for the curve of a linear; larger linears are sampled at every n-th row."""
LARGEST_STEP = 0.1
"""Largest distance between the sparsity of a part and that of the model under `error`; at most half of the way to 0 or 1."""


def outlier_ratio_of_scores(scores: Sequence[Tensor], threshold: float) -> float:
    """Return D, the share of the scores that are larger than `threshold` times their mean.

    Args:
        scores: |W_ij| ‖X_j‖ of the linears of one part, float32, any shapes.
        threshold: M.

    Examples:
        >>> outlier_ratio_of_scores([torch.tensor([1.0, 1.0, 1.0]), torch.tensor([9.0])], threshold=2.0)
        0.25
    """
    count = sum(part.numel() for part in scores)
    mean = sum(part.sum(dtype=torch.float64).item() for part in scores) / count
    return sum(int((part > threshold * mean).sum()) for part in scores) / count


def owl_sparsities(ratios: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """Return S_b of every part; over all weights they average to `sparsity`.

    Parts that the shift δ would carry below 0 or above 1 are clipped, and δ makes up for it.

    Args:
        ratios: D_b.
        sizes: n_b, weights of each part.
        sparsity: S.
        spread: Λ.

    Examples:
        >>> [round(share, 3) for share in owl_sparsities([0.01, 0.02, 0.03], [10, 10, 10], sparsity=0.5, spread=0.08)]
        [0.58, 0.5, 0.42]
    """
    outliers, counts = np.asarray(ratios, dtype=float), np.asarray(sizes, dtype=float)
    width = outliers.max() - outliers.min()
    relative = (outliers - outliers.min()) / width if width > 0 else np.full_like(outliers, 0.5)
    wanted = sparsity + spread - 2 * spread * relative
    low, high = -1.0, 1.0
    for _ in range(100):  # δ by bisection: without bounds it is S minus the mean of `wanted`
        shift = (low + high) / 2
        too_many = counts @ np.clip(wanted + shift, 0, 1) > sparsity * counts.sum()
        low, high = (low, shift) if too_many else (shift, high)
    return np.clip(wanted + shift, 0, 1).tolist()


def depth_sparsities(sizes: Sequence[int], sparsity: float, slope: float) -> list[float]:
    """Return S_b of every part, linear in its number; over all weights they average to `sparsity`. One part has S.

    Args:
        sizes: n_b, weights of each part, in their order.
        sparsity: S.
        slope: Λ; below 0 shares rise.

    Examples:
        >>> [round(share, 3) for share in depth_sparsities([10, 10, 10], sparsity=0.6, slope=0.1)]
        [0.7, 0.6, 0.5]
    """
    return owl_sparsities(range(len(sizes)), sizes, sparsity, slope)


def unit_tokens(x: Tensor) -> Tensor:
    """Scale every token of x, (..., features), to length 1 in float32. A zero token stays zero."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)  # divided out first: float32 may not hold its square
    x = x / largest.masked_fill(largest == 0, 1)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.masked_fill(length == 0, 1)


def written_share(before: Tensor, after: Tensor) -> Tensor:
    """Sum ‖h' − h‖² / ‖h'‖² over tokens; a token with h' = 0 counts 0. Returns a float32 scalar.

    Args:
        before: h, (..., features).
        after: h', the same shape.
    """
    difference, length = (torch.linalg.vector_norm(x.float(), dim=-1) for x in (after.float() - before.float(), after))
    return (difference / length.masked_fill(length == 0, torch.inf)).square().sum()


def error_curve(weight: Tensor, square_norm: Tensor) -> Tensor:
    """Return e at the sparsities k / GRID, k = 0 ... GRID: float64, (GRID + 1,), from 0 to 1, convex.

    Args:
        weight: W, (O, I).
        square_norm: ‖X_j‖², (I,).

    Examples:
        Half of the weights carry a tenth of the energy.

        >>> curve = error_curve(torch.tensor([[1.0, 3.0]]), square_norm=torch.ones(2))
        >>> [round(float(curve[k]), 3) for k in (0, GRID // 2, GRID)]
        [0.0, 0.1, 1.0]
    """
    rows = weight[:: -(-weight.numel() // MOST_SCORES)]  # whole rows: every n-th weight might always be of the same inputs
    weights, norms = rows.to(square_norm.device, torch.float32), square_norm.float()
    units = weights.abs().max(), norms.max()  # float32 need not hold the products
    if not all(units):
        return torch.linspace(0, 1, GRID + 1, dtype=torch.float64)
    scores = (weights / units[0]).square_().mul_(norms / units[1]).flatten().sort().values
    sums = torch.cat([scores.new_zeros(1, dtype=torch.float64), scores.cumsum(0, dtype=torch.float64)]).cpu()
    place = torch.linspace(0, len(scores), GRID + 1, dtype=torch.float64)
    below = place.long().clamp_max(len(scores) - 1)
    return torch.lerp(sums[below], sums[below + 1], place - below) / sums[-1]


def equal_slopes(
    curves: Sequence[Sequence[float]], sizes: Sequence[int], sparsity: float, low: float, high: float
) -> list[float]:
    """Minimise Σ_b E_b(S_b) over shares S_b that average to `sparsity` over all weights.

    Args:
        curves: E_b at k / K, k = 0 ... K, each convex.
        sizes: n_b, weights of each part.
        sparsity: S, from `low` to `high`.
        low: Least S_b.
        high: Largest S_b.

    Returns:
        S_b of every part.

    Examples:
        The first part loses more, since its curve is flatter.

        >>> equal_slopes([[0.0, 0.1, 0.2], [0.0, 0.4, 1.0]], sizes=[10, 10], sparsity=0.5, low=0.4, high=0.6)
        [0.6, 0.4]
    """
    pieces = []
    for part, (curve, size) in enumerate(zip(curves, sizes, strict=True)):
        grid = np.linspace(0, 1, len(curve))
        at = np.concatenate([[low], grid[(grid > low) & (grid < high)], [high]])
        errors = np.interp(at, grid, curve)
        slopes = np.diff(errors) / np.maximum(np.diff(at), 1e-300) / size
        pieces += [(slope, part, width) for slope, width in zip(slopes.tolist(), np.diff(at).tolist(), strict=True)]
    found = [low] * len(sizes)
    left = (sparsity - low) * sum(sizes)
    for _, part, width in sorted(pieces):
        taken = min(width, max(left, 0.0) / sizes[part])
        found[part] += taken
        left -= taken * sizes[part]
    return found


def bounds(sparsity: float) -> tuple[float, float]:
    """Return the least and the largest sparsity that `error` may choose for a part."""
    step = min(LARGEST_STEP, sparsity / 2, (1 - sparsity) / 2)
    return sparsity - step, sparsity + step


def whole_numbers(shares: Sequence[float], sizes: Sequence[int], units: Sequence[int], zeros: int) -> list[int]:
    """Round shares to numbers of zeros that are multiples of the units and sum to `zeros`.

    First everything is rounded down. Then the linears with the largest remainders get one unit more. The rest is spread evenly
    over the linears whose unit is 1. Without such linears the sum may stay short of `zeros` by less than the smallest unit. No
    linear loses all of its weights.

    Args:
        shares: Wanted share of zeros of each linear, in [0, 1].
        sizes: Number of weights of each linear.
        units: Number of rows of each linear whose rows all lose equally many weights, else 1.
        zeros: Number of zeros of all linears together.

    Returns:
        Number of zeros of each linear.

    Examples:
        The first linear loses the same number in each of its 4 rows.

        >>> whole_numbers([0.5, 0.55], sizes=[12, 20], units=[4, 1], zeros=17)
        [4, 13]
    """
    wanted = [share * size / unit for share, size, unit in zip(shares, sizes, units, strict=True)]
    largest = [size - unit for size, unit in zip(sizes, units, strict=True)]
    found = [min(int(number) * unit, most) for number, unit, most in zip(wanted, units, largest, strict=True)]
    left = zeros - sum(found)
    by_remainder = sorted(range(len(sizes)), key=lambda i: (int(wanted[i]) - wanted[i], i))
    if left < 0:  # the shares sum to more than `zeros`
        for i in reversed(by_remainder):
            fewer = min(found[i] // units[i], -(left // units[i]))
            found[i], left = found[i] - fewer * units[i], left + fewer * units[i]
            if left >= 0:
                break
    for i in by_remainder:
        if units[i] <= left and found[i] < largest[i] and wanted[i] > int(wanted[i]):
            found[i], left = found[i] + units[i], left - units[i]
    free = [i for i in by_remainder if units[i] == 1 and found[i] < largest[i]]
    while left and free:
        each = max(left // len(free), 1)
        for i in free:
            more = min(each, left, largest[i] - found[i])
            found[i], left = found[i] + more, left - more
        free = [i for i in free if found[i] < largest[i]]
    for i in sorted(range(len(sizes)), key=lambda i: units[i]):  # only where no linear is free
        more = min(left // units[i], (largest[i] - found[i]) // units[i])
        found[i], left = found[i] + more * units[i], left - more * units[i]
    return found

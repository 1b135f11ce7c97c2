"""Gram matrices Σ x xᵀ over tokens, in panels of rows from the diagonal to the right: little more than half the products.

Products are float32, or exact products of half precision summed in float32; what is accumulated over batches is float64.
Letters: T tokens, I inputs.
"""

from typing import Literal

import torch
from torch import Tensor

from functional.pruning.precision import HALF, float32_matmul

PANEL, PANEL_ON_GPU = 256, 2048
"""Rows of a panel on a CPU and on a GPU, the fastest of those measured."""
EXPONENT = 15
"""Exponent of the largest power of two that float16 holds."""
SMALLEST = 2.0**-100
"""Smallest number that sets a unit: its unit is no subnormal number, which a GPU may take for 0."""


def add_products(gram: Tensor, tokens: Tensor, precision: Literal["highest", "high"]) -> None:
    """Add tokensᵀ tokens to a sum, on and right of the diagonal only.

    Args:
        gram: (I, I), float64; changed in place. `symmetric` fills in the rest.
        tokens: (T, I), any floating dtype.
        precision: Precision of the products, see :mod:`functional.pruning.precision`.

    Examples:
        >>> gram = torch.zeros(2, 2, dtype=torch.float64)
        >>> add_products(gram, torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "highest")
        >>> symmetric(gram).tolist()
        [[1.0, 2.0], [2.0, 5.0]]
    """
    exact_products = tokens.is_cuda and tokens.dtype in HALF and precision == "high"
    if not exact_products:
        tokens = tokens.to(torch.float32)
    features, width = tokens.shape[1], _panel(tokens)
    with float32_matmul(precision, tokens.device):
        for start in range(0, features, width):
            rows, left = gram[start : start + width, start:], tokens[:, start : start + width].T
            if exact_products:
                rows += torch.mm(left, tokens[:, start:], out_dtype=torch.float32)
            else:
                rows += left @ tokens[:, start:]


def add_cross_products(cross: Tensor, left: Tensor, right: Tensor, precision: Literal["highest", "high"]) -> None:
    """Add leftᵀ right to a sum.

    Args:
        cross: (L, R), float64; changed in place.
        left: (T, L), any floating dtype; with `high` and a half-precision `right` on a GPU it is rounded to that dtype, in a
            unit in which it fits.
        right: (T, R), any floating dtype.
        precision: Precision of the products, see :mod:`functional.pruning.precision`.
    """
    with float32_matmul(precision, left.device):
        if right.is_cuda and right.dtype in HALF and precision == "high":
            rounded, unit = in_half(left, right.dtype)
            cross += torch.mm(rounded.T, right, out_dtype=torch.float32) * unit
        else:
            cross += left.float().T @ right.float()


def in_half(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """Round to half precision in a unit, a power of two, in which the largest entry is near the largest number of the dtype.

    Args:
        x: Any floating dtype.
        dtype: torch.float16 or torch.bfloat16.

    Returns:
        x / unit, rounded, and the unit: a scalar on the device of `x`, for which nobody waits.

    Examples:
        >>> rounded, unit = in_half(torch.tensor([2.0**20, 3.0]), torch.float16)
        >>> (rounded.float() * unit).tolist()
        [1048576.0, 3.0]
    """
    if x.dtype == dtype:
        return x, 1.0
    largest = torch.stack(x.aminmax()).abs().max().float().clamp_min(SMALLEST)
    unit = torch.exp2(torch.ceil(torch.log2(largest)) - (EXPONENT if dtype == torch.float16 else 0))
    return torch.div(x, unit, out=torch.empty_like(x, dtype=dtype)), unit


def symmetric(gram: Tensor) -> Tensor:
    """Fill in the entries below the diagonal that `add_products` left out; changes and returns `gram`, (I, I)."""
    width = _panel(gram)
    for start in range(0, len(gram), width):
        panel, below = slice(start, start + width), slice(start + width, None)
        gram[panel, panel] = gram[panel, panel].triu() + gram[panel, panel].triu(1).T
        gram[below, panel] = gram[panel, below].T
    return gram


def _panel(like: Tensor) -> int:
    return PANEL_ON_GPU if like.is_cuda else PANEL

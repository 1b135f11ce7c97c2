"""Precision of float32 matrix products on tensor cores.

highest   inputs are multiplied as float32
high      inputs are multiplied as TF32 (10 bits of mantissa) on a GPU that has it; half precision inputs are multiplied as they
          are, which is exact; sums are float32
auto      highest for float32 inputs, high for half precision inputs: as exact as the inputs
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

Precision = Literal["auto", "highest", "high"]
HALF = (torch.float16, torch.bfloat16)


def check_precision(precision: str) -> None:
    """Check that a precision is known.

    Raises:
        ValueError: If it is not auto, highest or high.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"Argument `precision` expected to be auto, highest or high but got {precision!r}.")


def resolved(precision: Precision, dtype: torch.dtype) -> Literal["highest", "high"]:
    """Resolve `auto` for inputs of a dtype.

    Examples:
        >>> resolved("auto", torch.bfloat16), resolved("auto", torch.float32)
        ('high', 'highest')
    """
    if precision == "auto":
        return "high" if dtype in HALF else "highest"
    return precision


@contextmanager
def float32_matmul(precision: Literal["highest", "high"], device: torch.device) -> Iterator[None]:
    """Compute float32 products with a given precision within the context, whatever the program has set, autocast included."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)

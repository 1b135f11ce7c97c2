"""How exact float32 matrix products are on tensor cores.

highest   inputs are multiplied as float32
high      as TF32 on a GPU that has it, 10 bits of mantissa, with sums in float32; half precision inputs are multiplied as
          they are, which is exact, with sums in float32
auto      as exact as the inputs: float32 as by highest, half precision as by high
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

Precision = Literal["auto", "highest", "high"]
HALF = (torch.float16, torch.bfloat16)


def check_precision(precision: str) -> None:
    """Raise a ValueError unless `precision` is known."""
    if precision not in get_args(Precision):
        raise ValueError(f"Argument `precision` expected to be auto, highest or high but got {precision!r}.")


def resolved(precision: Precision, dtype: torch.dtype) -> Literal["highest", "high"]:
    """What `auto` is for inputs of a dtype."""
    if precision == "auto":
        return "high" if dtype in HALF else "highest"
    return precision


@contextmanager
def float32_matmul(precision: Literal["highest", "high"], device: torch.device) -> Iterator[None]:
    """While open, float32 products have this precision, whatever the program has set, autocast included."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)

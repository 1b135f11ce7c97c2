"""Choose between Triton kernels and PyTorch's own operators.

Kernels are used on a GPU where Triton works. Otherwise PyTorch's operators compute the same, and a warning says so once.
"""

import importlib.util
import logging
from collections.abc import Callable
from functools import cache
from typing import TypeVar

from torch import Tensor

log = logging.getLogger(__name__)

T = TypeVar("T")

MISSING: list[str] = []
"""Reasons why Triton cannot be used here. Once there is one, Triton is not tried again."""


def by_kernels(like: Tensor, kernels: Callable[[], T], plain: Callable[[], T]) -> T:
    """Run the kernels if they are available for a tensor, else the plain operators.

    Args:
        like: A tensor of the computation; its device decides.
        kernels: Computes the result by kernels.
        plain: Computes the same result by PyTorch's operators.
    """
    if not like.is_cuda or MISSING or not _has_triton():
        return plain()
    try:
        return kernels()
    except RuntimeError as error:
        if "C compiler" not in str(error):
            raise
        _without("Triton finds no C compiler")
    return plain()


@cache
def _has_triton() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        _without("Triton is not installed")
    return found


def _without(what: str) -> None:
    MISSING.append(what)
    log.warning("%s: PyTorch's own operators do the work; a weight update takes several times longer on a GPU.", what)

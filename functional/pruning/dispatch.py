"""Where Triton kernels are used: on a GPU, if Triton works there; else the same by PyTorch's own operators, said once."""

import importlib.util
import logging
from collections.abc import Callable
from functools import cache
from typing import TypeVar

from torch import Tensor

log = logging.getLogger(__name__)

T = TypeVar("T")

MISSING: list[str] = []
"""What Triton was found to lack; once found it is not tried again."""


def by_kernels(like: Tensor, kernels: Callable[[], T], plain: Callable[[], T]) -> T:
    """What the kernels give where they can be had for a tensor, else what the plain operators give."""
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

"""Where Triton kernels are used: on a GPU, if Triton works there; else the same by PyTorch's own operators, said once."""

import importlib.util
import logging
from collections.abc import Callable
from functools import cache
from typing import TypeVar

from torch import Tensor

log = logging.getLogger(__name__)

T = TypeVar("T")


def by_kernels(like: Tensor, kernels: Callable[[], T], plain: Callable[[], T]) -> T:
    """What the kernels give where they can be had for a tensor, else what the plain operators give."""
    if not like.is_cuda or not _has_triton():
        return plain()
    try:
        return kernels()
    except RuntimeError as error:
        if "C compiler" not in str(error):
            raise
        _warn_once("Triton finds no C compiler")
    return plain()


@cache
def _has_triton() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        _warn_once("Triton is not installed")
    return found


@cache
def _warn_once(reason: str) -> None:
    log.warning("%s: a weight update runs column by column, several times slower on a GPU.", reason)

"""Torch operator that multiplies 2:4 weights with many tokens on the sparse tensor cores, by cuSPARSELt.

Each call plans its launch again on the host: about 0.45 ms whatever the size, longer than the product takes. So it pays only
inside a graph of launches that is captured once and replayed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from functional.sparse24.decode import DTYPES

ROWS = 16
"""Inputs and outputs have to be multiples of this."""
TOKENS = 8
"""Tokens are padded to multiples of this."""


def pack(weight: Tensor) -> Tensor:
    """Convert a 2:4 matrix to cuSPARSELt's own form, 9/16 of its bytes.

    Args:
        weight: (O, I).

    Raises:
        ValueError: If the weight is not on a GPU, not bfloat16 or float16, or O or I is no multiple of 16.
        RuntimeError: If this build of torch has no cuSPARSELt.
    """
    if not weight.is_cuda or weight.dtype not in DTYPES or any(size % ROWS for size in weight.shape):
        raise ValueError(
            "Argument `weight` expected to be on a GPU, bfloat16 or float16, with multiples of 16 outputs and inputs, but got "
            f"{weight.dtype} of shape {tuple(weight.shape)} on {weight.device}. Leave its prefill dense."
        )
    if not torch.backends.cusparselt.is_available():
        raise RuntimeError("This build of torch has no cuSPARSELt. Install one for CUDA, or leave prefill dense.")
    return torch._cslt_compress(weight.contiguous())


_found: dict[tuple, list[int]] = {}


def fastest(packed: Tensor, x: Tensor) -> list[int]:
    """Measure the fastest algorithm of cuSPARSELt, once for all weights of one shape.

    Args:
        packed: Result of `pack`.
        x: Inputs, (tokens, I).

    Returns:
        The algorithm, the split of the inputs and the kind of split.
    """
    shape = (packed.numel(), *x.shape, x.dtype, x.device)
    if shape not in _found:
        _found[shape] = list(torch._C._cusparselt.mm_search(packed, _padded(x).t(), None, None, None, True)[:3])
    return _found[shape]


@torch.library.custom_op("sparse24::prefill", mutates_args=())
def multiply(x: Tensor, packed: Tensor, rows: int, algorithm: Sequence[int]) -> Tensor:
    """Compute x Wᵀ.

    Args:
        x: (tokens, I).
        packed: Result of `pack`.
        rows: O.
        algorithm: Result of `fastest`; [0, 1, -1] is cuSPARSELt's default.

    Returns:
        (tokens, rows).
    """
    chosen, split, kind = algorithm
    y = torch._cslt_sparse_mm(packed, _padded(x).t(), transpose_result=True, alg_id=chosen, split_k=split, split_k_mode=kind)
    return y[: len(x)].contiguous()


@multiply.register_fake
def _(x, packed, rows, algorithm):
    return x.new_empty(x.shape[0], rows)


def _padded(x: Tensor) -> Tensor:
    missing = -len(x) % TOKENS
    if missing:  # padding copies even if nothing is added
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
    return x.contiguous()

"""2:4 weights times many tokens on the sparse tensor cores, by cuSPARSELt: an operator of torch.

A call plans its launch anew on the host, about 0.45 ms whatever the size, which is more than the product takes: for where a
graph of launches is captured once and replayed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from functional.sparse24.decode import DTYPES

ROWS = 16
"""Inputs and outputs come in multiples of this, tokens of eight; these are filled up."""
TOKENS = 8


def pack(weight: Tensor) -> Tensor:
    """cuSPARSELt's own form of a 2:4 matrix (O, I): 9/16 of its bytes.

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
    """The algorithm, split of the inputs and kind of split that cuSPARSELt measures to be fastest for `x`, (tokens, I).

    Measured once for all weights of one shape.
    """
    shape = (packed.numel(), *x.shape, x.dtype, x.device)
    if shape not in _found:
        _found[shape] = list(torch._C._cusparselt.mm_search(packed, _padded(x).t(), None, None, None, True)[:3])
    return _found[shape]


@torch.library.custom_op("sparse24::prefill", mutates_args=())
def multiply(x: Tensor, packed: Tensor, rows: int, algorithm: Sequence[int]) -> Tensor:
    """x Wᵀ, (tokens, rows).

    Args:
        x: (tokens, I).
        packed: Of `pack`.
        rows: O.
        algorithm: Of `fastest`; [0, 1, -1] is cuSPARSELt's default.
    """
    chosen, split, kind = algorithm
    y = torch._cslt_sparse_mm(packed, _padded(x).t(), transpose_result=True, alg_id=chosen, split_k=split, split_k_mode=kind)
    return y[: len(x)].contiguous()


@multiply.register_fake
def _(x, packed, rows, algorithm):
    return x.new_empty(x.shape[0], rows)


def _padded(x: Tensor) -> Tensor:
    missing = -len(x) % TOKENS
    return (torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x).contiguous()  # padding copies, even by nothing

"""Torch operators that multiply a matrix in lanes with a few tokens, and that restore the dense matrix, by kernels.

As operators they can be captured by CUDA graphs and pass through torch.compile. They need a GPU; with ``TRITON_INTERPRET=1``
they run on a CPU too, for tests.
"""

import torch
from torch import Tensor

from functional.launches import overlapping
from functional.sparse.lanes import Lanes

OF_A_PASS = 8
"""Tokens of a pass over the weights."""
MOST_TOKENS = 32
"""Restoring the dense matrix takes as long as three to seven passes, by the shape and the zeros (results/sparse_decode.csv)."""
DTYPES = (torch.bfloat16, torch.float16)
TALL = 32
"""Rows of a slice from which a lane has two chunks on their way at a time: there are few lanes then."""


def decode(x: Tensor, weight: Lanes, bias: Tensor | None = None) -> Tensor:
    """Compute x Wᵀ + bias with float32 sums; repeated calls give the same bits.

    Args:
        x: (tokens, I), at most 32 tokens, bfloat16 or float16; eight at a time.
        weight: (O, I), of x's dtype, from `to_lanes`. A CUDA graph must not write what it multiplies (functional/launches.py).
        bias: (O,), of x's dtype.

    Returns:
        (tokens, O), of x's dtype.

    Raises:
        ValueError: If shapes or dtypes do not go together, or there are too many tokens.
    """
    if x.ndim != 2 or x.shape[1] != weight.columns or len(x) > MOST_TOKENS:
        raise ValueError(
            f"Argument `x` expected to be (tokens, {weight.columns}) with at most {MOST_TOKENS} tokens but got "
            f"{tuple(x.shape)}. Give the inputs of this weight, flattened to two dimensions; multiply more tokens by the dense "
            "weight, which `expand` makes."
        )
    if x.dtype not in DTYPES or weight.values.dtype != x.dtype:
        raise ValueError(
            f"Arguments `x` and `weight` expected one dtype of bfloat16, float16 but got {x.dtype} and {weight.values.dtype}. "
            "Multiply others by the dense weight, which `from_lanes` makes."
        )
    if bias is not None and (bias.shape != (weight.rows,) or bias.dtype != x.dtype):
        raise ValueError(
            f"Argument `bias` expected ({weight.rows},) of {x.dtype} but got {tuple(bias.shape)} of {bias.dtype}. Cast it, or "
            "give None."
        )
    passes = [_decode(some, *weight[:5], bias, weight.rows) for some in x.split(OF_A_PASS)]
    return passes[0] if len(passes) == 1 else torch.cat(passes)


def expand(weight: Lanes) -> Tensor:
    """Do the same as `from_lanes` in two launches, for bfloat16 and float16.

    Raises:
        ValueError: If the dtype is another.
    """
    if weight.values.dtype not in DTYPES:
        raise ValueError(f"Argument `weight` expected bfloat16 or float16 but got {weight.values.dtype}. Use `from_lanes`.")
    return _expand(*(part.contiguous() for part in weight[:5]), weight.rows, weight.columns)


@torch.library.custom_op("sparse_lanes::decode", mutates_args=())
def _decode(
    x: Tensor, values: Tensor, steps: Tensor, firsts: Tensor, starts: Tensor, order: Tensor, bias: Tensor | None, rows: int
) -> Tensor:
    from functional.sparse import decode_triton as kernels

    tokens, (slices, parts, height) = len(x), firsts.shape
    out = x.new_empty(tokens, rows)
    if tokens == 0:
        return out
    width = 1 << (tokens - 1).bit_length()
    given = x.contiguous()
    if width > 1:
        padded = x if tokens == width else torch.cat([x, x.new_zeros(width - tokens, x.shape[1])])
        given = padded.T.flatten().view(torch.int32)
    weights = [values, steps, firsts, starts, order]
    stored = [part.contiguous() for part in weights]
    with torch.cuda.device_of(x):  # Triton launches on the current device
        constant, launch = overlapping(x, weights, stored)
        kernels.decode_kernel[(slices,)](
            given, stored[0].view(torch.int32), *stored[1:], out if bias is None else bias.contiguous(), out, tokens, rows,
            constant, HAS_BIAS=bias is not None, BFLOAT16=x.dtype == torch.bfloat16, TOKENS=width, HEIGHT=height,
            PARTS=parts, UNROLL=2 if tokens == 1 and height == TALL else 1, num_warps=max(1, height * parts // 32), **launch,
        )  # fmt: skip
    return out


@_decode.register_fake
def _(x, values, steps, firsts, starts, order, bias, rows):
    return x.new_empty(x.shape[0], rows)


@torch.library.custom_op("sparse_lanes::expand", mutates_args=())
def _expand(values: Tensor, steps: Tensor, firsts: Tensor, starts: Tensor, order: Tensor, rows: int, columns: int) -> Tensor:
    from functional.sparse import decode_triton as kernels

    out = values.new_zeros(rows, columns)
    slices, parts, height = firsts.shape
    with torch.cuda.device_of(values):
        kernels.expand_kernel[(slices,)](
            values.view(torch.int32), steps, firsts, starts, order, out.view(torch.int16), rows, columns,
            EVEN=columns % 8 == 0, HEIGHT=height, PARTS=parts, INTERPRETED=not values.is_cuda,
            num_warps=max(1, height * parts // 32),
        )  # fmt: skip
    return out


@_expand.register_fake
def _(values, steps, firsts, starts, order, rows, columns):
    return values.new_empty(rows, columns)

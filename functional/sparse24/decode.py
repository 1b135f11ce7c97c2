"""Compressed 2:4 weights times a few tokens, and back to dense, by the kernels: operators of torch.

As operators they can be captured by CUDA graphs and pass through torch.compile. On a CPU they need ``TRITON_INTERPRET=1``,
which is for tests; `decompress` is the way there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MOST_TOKENS = 16
"""Rows of the smallest tile of the tensor cores; with more tokens the weights are no longer what a GPU waits for."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SMALLEST_PRODUCT = 16
"""Least inputs of one step of the tensor cores in Triton."""
EXPANDED = (16, 64)
"""Rows and bytes of a program of `expand`."""
SUMMED = 256


class Config(NamedTuple):
    """How `decode` shares out its work.

    Attributes:
        tensor_cores: Dense tiles on the tensor cores, for any number of tokens; 0 without, for one token.
        rows: Outputs of a program.
        bytes: Index bytes of a row that a program takes at a time, eight inputs each.
        splits: Programs that share the inputs of a row; if there are several, one more launch adds their sums.
        warps: Of a program.
        stages: Tiles on their way from memory at a time.
    """

    tensor_cores: int
    rows: int
    bytes: int
    splits: int
    warps: int
    stages: int


def default_config(tokens: int, rows: int, width: int, itemsize: int = 2) -> Config:
    """For a number of tokens, of outputs, and of bytes of a row, I / 8: the fastest for LLaMA-2-7B's linears on an H100.

    Tiles of float32, twice the bytes, are half as wide: the shared memory of smaller GPUs has to hold them.
    """
    if tokens == 1:
        return Config(0, rows=4, bytes=128, splits=1, warps=4, stages=4)
    # Two programs for each multiprocessor of a large GPU: fewer leave some of its memory's bandwidth unused.
    splits = min(-(-256 * 32 // rows), max(1, width // 64))
    return Config(1, rows=32, bytes=128 // max(itemsize, 2), splits=splits, warps=2, stages=3)


def decode(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None, config: Config | None = None) -> Tensor:
    """x Wᵀ + bias, summed in float32, the same at every call.

    Args:
        x: (tokens, I), at most 16 tokens, bfloat16, float16 or float32.
        values: (2, O, I / 4), of x's dtype, as `compress` makes them.
        indices: (O, I / 8), uint8.
        bias: (O,), of x's dtype.
        config: Chosen by the shape when None.

    Returns:
        (tokens, O), of x's dtype.

    Raises:
        ValueError: If shapes or dtypes do not go together, or there are too many tokens.
    """
    if x.ndim != 2 or x.shape[1] != 8 * indices.shape[1]:
        raise ValueError(f"Argument `x` expected to be (tokens, {8 * indices.shape[1]}) but got {tuple(x.shape)}.")
    if x.shape[0] > MOST_TOKENS:
        raise ValueError(
            f"Argument `x` expected at most {MOST_TOKENS} tokens but got {x.shape[0]}. Multiply more by the dense weight, "
            "which `expand` and `decompress` make."
        )
    if x.dtype not in DTYPES or values.dtype != x.dtype:
        raise ValueError(
            f"Arguments `x` and `values` expected one dtype of bfloat16, float16, float32 but got {x.dtype} and {values.dtype}."
        )
    rows, width = indices.shape
    if indices.dtype != torch.uint8 or values.shape != (2, rows, 2 * width) or (bias is not None and bias.shape != (rows,)):
        raise ValueError(
            f"Arguments `values`, `indices` and `bias` expected (2, {rows}, {2 * width}), uint8 ({rows}, {width}) and "
            f"({rows},) but got {tuple(values.shape)}, {indices.dtype} {tuple(indices.shape)} and "
            f"{None if bias is None else tuple(bias.shape)}. Take the first two from `compress`."
        )
    config = config or default_config(x.shape[0], rows, width, x.itemsize)
    if x.shape[0] != 1 and not config.tensor_cores:
        raise ValueError(f"Argument `config`: tensor_cores = 0 is for one token, but there are {x.shape[0]}.")
    return _decode(x, values.contiguous(), indices.contiguous(), bias, list(config))


def expand(values: Tensor, indices: Tensor) -> Tensor:
    """What `decompress` returns, in one launch."""
    return _expand(values.contiguous(), indices.contiguous())


@torch.library.custom_op("sparse24::decode", mutates_args=())
def _decode(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, config: Sequence[int]) -> Tensor:
    import triton

    from functional.sparse24 import kernels

    chosen = Config(*config)
    tokens, (rows, width) = len(x), indices.shape
    out = x.new_empty(tokens, rows)
    if tokens == 0:
        return out
    blocks = triton.cdiv(triton.cdiv(width, chosen.bytes), chosen.splits)
    splits = triton.cdiv(triton.cdiv(width, chosen.bytes), blocks)  # none of them empty
    partial = splits > 1
    target = x.new_empty(splits, tokens, rows, dtype=torch.float32) if partial else out
    has_bias = bias is not None
    by_two = chosen.tensor_cores and x.itemsize == 2 and width % 2 == 0 and chosen.bytes >= 2 * SMALLEST_PRODUCT
    if by_two:
        values, indices = values.view(torch.int32), indices.view(torch.int16)
    given = (x.contiguous(), *values, indices, bias if has_bias else out, target)
    options = {"ROWS": chosen.rows, "BYTES": chosen.bytes, "STAGES": chosen.stages, "num_warps": chosen.warps}
    options |= {"HAS_BIAS": has_bias and not partial, "PARTIAL": partial, "EVEN": width % chosen.bytes == 0}
    grid = (triton.cdiv(rows, chosen.rows), splits)
    with torch.cuda.device_of(x):  # Triton launches on the current one
        if chosen.tensor_cores:
            options |= {"TOKENS": MOST_TOKENS, "WIDEN": not x.is_cuda, "BY_TWO": bool(by_two)}
            kernels.tokens_kernel[grid](*given, tokens, rows, width, blocks, **options)
        else:
            kernels.token_kernel[grid](*given, rows, width, blocks, **options)
        if partial:
            kernels.sum_kernel[(triton.cdiv(out.numel(), SUMMED),)](
                target, bias if has_bias else out, out, out.numel(), rows, splits, HAS_BIAS=has_bias, SIZE=SUMMED, num_warps=2
            )
    return out


@_decode.register_fake
def _(x, values, indices, bias, config):
    return x.new_empty(x.shape[0], indices.shape[0])


@torch.library.custom_op("sparse24::expand", mutates_args=())
def _expand(values: Tensor, indices: Tensor) -> Tensor:
    import triton

    from functional.sparse24 import kernels

    rows, width = indices.shape
    out = values.new_empty(rows, 8 * width)
    grid = (triton.cdiv(rows, EXPANDED[0]), triton.cdiv(width, EXPANDED[1]))
    with torch.cuda.device_of(values):
        kernels.expand_kernel[grid](*values, indices, out, rows, width, ROWS=EXPANDED[0], BYTES=EXPANDED[1], num_warps=4)
    return out


@_expand.register_fake
def _(values, indices):
    return values.new_empty(indices.shape[0], 8 * indices.shape[1])

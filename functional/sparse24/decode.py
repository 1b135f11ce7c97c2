"""Torch operators that multiply compressed 2:4 weights with a few tokens, and that restore the dense weights, by kernels.

As operators they can be captured by CUDA graphs and pass through torch.compile. They need a GPU with sparse tensor cores
(compute capability 8.0 or more). On a CPU use `decompress`; with ``TRITON_INTERPRET=1`` they run there too, for tests.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from functional.sparse24.compress import STRIP, TILE, Compressed

MOST_TOKENS = 16
"""With more tokens a GPU no longer waits for the weights."""
DTYPES = (torch.bfloat16, torch.float16)
OF_A_PRODUCT = 8
"""Tokens that the sparse tensor cores take at a time."""
BYTES_OF_A_LOAD = 16
WARPS_TO_EXPAND = 8
WARPS = (1, 2, 4, 8, 16, 32)


class Config(NamedTuple):
    """Division of the work of `decode` among programs and warps.

    Attributes:
        tiles: Tiles of 16 outputs that a program computes; 1, 2 or 4.
        warps: Warps of a program, which share the inputs.
        stages: Strips on their way from memory to shared memory at a time; 1 to load straight into registers.
        unroll: Strips on their way into the registers of a warp at a time, if stages is 1.
    """

    tiles: int
    warps: int
    stages: int
    unroll: int


FASTEST = {
    (1, "few rows"): Config(1, 4, 1, 8), (1, "long rows"): Config(1, 4, 1, 8), (1, "many rows"): Config(2, 2, 1, 8),
    (4, "few rows"): Config(2, 4, 1, 8), (4, "long rows"): Config(1, 4, 1, 8), (4, "many rows"): Config(2, 2, 1, 8),
    (8, "few rows"): Config(2, 4, 6, 1), (8, "long rows"): Config(2, 4, 6, 1), (8, "many rows"): Config(2, 2, 1, 8),
    (16, "few rows"): Config(2, 4, 6, 1), (16, "long rows"): Config(2, 4, 6, 1), (16, "many rows"): Config(2, 2, 1, 8),
}  # fmt: skip
"""Largest number of tokens, and shape -> fastest configuration for LLaMA-2-7B's linears (q, down, gate): up to 4 tokens on an
H100, more on an H200 (benchmarks/sparse24_tuning.py)."""
MANY = 8192


def default_config(tokens: int, rows: int, columns: int) -> Config:
    """Return the entry of `FASTEST` for the nearest shape.

    Args:
        tokens: Number of tokens.
        rows: O.
        columns: I.

    Raises:
        ValueError: If there are too many tokens.

    Examples:
        >>> default_config(tokens=1, rows=4096, columns=4096)
        Config(tiles=1, warps=4, stages=1, unroll=8)
    """
    _check_tokens(tokens)
    most = next(most for most in sorted({most for most, _ in FASTEST}) if tokens <= most)
    chosen = FASTEST[most, "many rows" if rows > MANY else "long rows" if columns > MANY else "few rows"]
    strips = -(-columns // STRIP)
    return Config(chosen.tiles, min(chosen.warps, 1 << strips.bit_length() - 1), chosen.stages, chosen.unroll)


def decode(x: Tensor, weight: Compressed, bias: Tensor | None = None, config: Config | None = None) -> Tensor:
    """Compute x Wᵀ + bias with float32 sums; repeated calls give the same bits.

    Args:
        x: (tokens, I), at most 16 tokens, bfloat16 or float16.
        weight: (O, I), of x's dtype, from `compress`.
        bias: (O,), of x's dtype.
        config: Division of the work; chosen by the shape when None.

    Returns:
        (tokens, O), of x's dtype.

    Raises:
        ValueError: If shapes or dtypes do not go together, or there are too many tokens.
    """
    values, indices, rows, columns = weight
    if x.ndim != 2 or x.shape[1] != columns:
        raise ValueError(
            f"Argument `x` expected to be (tokens, {columns}) but got {tuple(x.shape)}. Give the inputs of this weight, "
            "flattened to two dimensions."
        )
    _check_tokens(x.shape[0])
    if x.dtype not in DTYPES or values.dtype != x.dtype:
        raise ValueError(
            f"Arguments `x` and `weight` expected one dtype of bfloat16, float16 but got {x.dtype} and {values.dtype}. "
            "Multiply others by the dense weight, which `decompress` makes."
        )
    _check(weight)
    if bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype):
        raise ValueError(
            f"Argument `bias` expected ({rows},) of {x.dtype} but got {tuple(bias.shape)} of {bias.dtype}. Cast it, or give "
            "None."
        )
    config = config or default_config(x.shape[0], rows, columns)
    if config.tiles not in (1, 2, 4) or config.warps not in WARPS or min(config.stages, config.unroll) != 1:
        raise ValueError(
            f"Argument `config` expected 1, 2 or 4 tiles, a power of two of at most {max(WARPS)} warps, and stages or unroll "
            f"of 1, but got {config}. Leave it out for the default."
        )
    return _decode(x, values, indices, bias, rows, list(config))


def expand(values: Tensor, indices: Tensor, rows: int, columns: int) -> Tensor:
    """Do the same as `decompress` in one launch, for bfloat16 and float16.

    Args:
        values: `Compressed.values`.
        indices: `Compressed.indices`.
        rows: O.
        columns: I.

    Raises:
        ValueError: If shapes or dtypes do not go together.
    """
    if values.dtype not in DTYPES:
        raise ValueError(f"Argument `values` expected bfloat16 or float16 but got {values.dtype}. Use `decompress`.")
    _check(Compressed(values, indices, rows, columns))
    return _expand(values, indices, rows, columns)


def _aligned(values: Tensor) -> Tensor:
    """Make values contiguous and aligned to 16 bytes, as the kernels load them."""
    values = values.contiguous()
    return values if values.data_ptr() % BYTES_OF_A_LOAD == 0 else values.clone()


def _check_tokens(tokens: int) -> None:
    if tokens > MOST_TOKENS:
        raise ValueError(
            f"Argument `x` expected at most {MOST_TOKENS} tokens but got {tokens}. Multiply more by the dense weight, which "
            "`expand` and `decompress` make."
        )


def _check(weight: Compressed) -> None:
    tiles, strips = -(-weight.rows // TILE), -(-weight.columns // STRIP)
    if (
        weight.indices.dtype != torch.int32
        or weight.indices.shape != (tiles, strips, 32)
        or weight.values.shape != (tiles, strips, 2, 32, 4, 2)
    ):
        raise ValueError(
            f"Arguments `values` and `indices` of a weight ({weight.rows}, {weight.columns}) expected ({tiles}, {strips}, 2, "
            f"32, 4, 2) and int32 ({tiles}, {strips}, 32) but got {tuple(weight.values.shape)} and {weight.indices.dtype} "
            f"{tuple(weight.indices.shape)}. Take them from `compress`."
        )


@torch.library.custom_op("sparse24::decode", mutates_args=())
def _decode(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, rows: int, config: Sequence[int]) -> Tensor:
    import triton

    from functional.sparse24 import decode_triton as kernels

    chosen = Config(*config)
    tokens, columns = x.shape
    out = x.new_empty(tokens, rows)
    if tokens == 0:
        return out
    tiles, strips = indices.shape[:2]
    words = _aligned(pad(x, (0, -columns % STRIP)) if columns % STRIP else x)  # padding copies even if nothing is added
    options: dict[str, int] = {"HAS_BIAS": bias is not None, "BFLOAT16": x.dtype == torch.bfloat16}
    options |= {"INTERPRETED": not x.is_cuda}
    options |= {"TOKENS": OF_A_PRODUCT if tokens <= OF_A_PRODUCT else MOST_TOKENS, "TILES": chosen.tiles}
    options |= {
        "EVEN": strips % (chosen.warps * chosen.unroll) == 0,
        "STAGES": chosen.stages,
        "UNROLL": chosen.unroll,
        "WARPS": chosen.warps,
        "num_warps": chosen.warps,
    }
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernels.decode_kernel[(triton.cdiv(tiles, chosen.tiles),)](
            words.view(torch.int32), _aligned(values).view(torch.int32), indices.contiguous(),
            out if bias is None else bias.contiguous(), out, tokens, rows, tiles, strips, **options,
        )  # fmt: skip
    return out


@_decode.register_fake
def _(x, values, indices, bias, rows, config):
    return x.new_empty(x.shape[0], rows)


@torch.library.custom_op("sparse24::expand", mutates_args=())
def _expand(values: Tensor, indices: Tensor, rows: int, columns: int) -> Tensor:
    import triton

    from functional.sparse24 import decode_triton as kernels

    out = values.new_empty(rows, columns)
    tiles, strips = indices.shape[:2]
    with torch.cuda.device_of(values):
        kernels.expand_kernel[(tiles, triton.cdiv(strips, WARPS_TO_EXPAND))](
            _aligned(values).view(torch.int32), indices.contiguous(), out.view(torch.int32), rows, columns, strips,
            WARPS=WARPS_TO_EXPAND, num_warps=WARPS_TO_EXPAND,
        )  # fmt: skip
    return out


@_expand.register_fake
def _(values, indices, rows, columns):
    return values.new_empty(rows, columns)

"""Torch operators that multiply compressed weights with a few tokens, and that restore the dense weights, by kernels.

Weights are 2:4, or the sum of a 2:4 matrix and a rest. As operators they can be captured by CUDA graphs and pass through
torch.compile. They need a GPU with sparse tensor cores (compute capability 8.0 or more). On a CPU use `decompress` or `join`;
with ``TRITON_INTERPRET=1`` they run there too, for tests.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from functional.launches import overlapping
from functional.sparse24.compress import DTYPES, STRIP, TILE, Compressed
from functional.sparse24.config import MOST_TOKENS, OF_A_PASS, Config, check_config, default_config
from functional.sparse24.rest import PLACES, ROUNDS, STRIPS, Rest

OF_A_PRODUCT = 8
"""Tokens that the sparse tensor cores take at a time."""
BYTES_OF_A_LOAD = 16
MOST_STRIPS = 2**23
"""Strips of all tiles of a weight; kernels count their words, 256 each, in 32 bits."""
WARPS_TO_EXPAND = 8
BYTES_OF_A_PATCH = 2 * PLACES + 16
"""Shared memory of a patch of a rest."""


def decode(
    x: Tensor, weight: Compressed, bias: Tensor | None = None, config: Config | None = None, rest: Rest | None = None
) -> Tensor:
    """Compute x Wᵀ + bias with float32 sums; repeated calls give the same bits.

    Args:
        x: (tokens, I), at most 32 tokens, bfloat16 or float16; 16 at a time.
        weight: (O, I), of x's dtype, from `compress`. A CUDA graph must not write what it multiplies (functional/launches.py).
        bias: (O,), of x's dtype.
        config: Division of the work; chosen by the shape when None.
        rest: What W has beside the 2:4 matrix, from `split`; None if that is all.

    Returns:
        (tokens, O), of x's dtype.

    Raises:
        ValueError: If shapes or dtypes do not go together, or there are too many tokens.
    """
    values, indices, rows, columns = weight
    if x.ndim != 2 or x.shape[1] != columns or len(x) > MOST_TOKENS:
        raise ValueError(
            f"Argument `x` expected to be (tokens, {columns}) with at most {MOST_TOKENS} tokens but got {tuple(x.shape)}. "
            "Give the inputs of this weight, flattened to two dimensions; multiply more tokens by the dense weight, which "
            "`expand` makes."
        )
    if x.dtype not in DTYPES or values.dtype != x.dtype:
        raise ValueError(
            f"Arguments `x` and `weight` expected one dtype of bfloat16, float16 but got {x.dtype} and {values.dtype}. "
            "Multiply others by the dense weight, which `decompress` makes."
        )
    _check(weight, rest)
    if bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype):
        raise ValueError(
            f"Argument `bias` expected ({rows},) of {x.dtype} but got {tuple(bias.shape)} of {bias.dtype}. Cast it, or give "
            "None."
        )
    chosen = config or default_config(min(len(x), OF_A_PASS), rows, columns, rest is not None)
    check_config(chosen, rest is not None)
    words, starts, rounds = (None, None, 0) if rest is None else rest
    passes = [_decode(some, values, indices, words, starts, bias, rows, rounds, list(chosen)) for some in x.split(OF_A_PASS)]
    return passes[0] if len(passes) == 1 else torch.cat(passes)


def expand(weight: Compressed, rest: Rest | None = None) -> Tensor:
    """Do the same as `decompress` or `join` by kernels, for bfloat16 and float16.

    Args:
        weight: (O, I), from `compress` or `split`.
        rest: What there is beside it, from `split`; None if that is all.

    Raises:
        ValueError: If shapes or dtypes do not go together.
    """
    values, indices, rows, columns = weight
    if values.dtype not in DTYPES:
        raise ValueError(f"Argument `weight` expected bfloat16 or float16 but got {values.dtype}. Use `decompress`.")
    _check(weight, rest)
    words, starts, rounds = (None, None, 0) if rest is None else rest
    return _expand(values, indices, words, starts, rows, columns, rounds)


def _aligned(values: Tensor) -> Tensor:
    """Make values contiguous and aligned to 16 bytes, as the kernels load them."""
    values = values.contiguous()
    return values if values.data_ptr() % BYTES_OF_A_LOAD == 0 else values.clone()


def _check(weight: Compressed, rest: Rest | None) -> None:
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
    if tiles * strips > MOST_STRIPS:
        raise ValueError(
            f"Argument `weight` expected at most {MOST_STRIPS} strips of {TILE} x {STRIP} but ({weight.rows}, "
            f"{weight.columns}) has {tiles * strips}. Split its rows."
        )
    if rest is None:
        return
    places = tiles * -(-strips // STRIPS) + 1
    if rest.words.dtype != torch.int32 or rest.starts.dtype != torch.int32 or rest.starts.shape != (places,):
        raise ValueError(
            f"Argument `rest` of a weight ({weight.rows}, {weight.columns}) expected int32 words and starts, ({places},) of "
            f"the latter, but got {rest.words.dtype} and {rest.starts.dtype} {tuple(rest.starts.shape)}. Take it from `split`."
        )
    if rest.rounds not in ROUNDS:  # with others words would be left out
        raise ValueError(f"Argument `rest` expected rounds of {ROUNDS} but got {rest.rounds}. Take it from `split`.")


@torch.library.custom_op("sparse24::decode", mutates_args=())
def _decode(
    x: Tensor, values: Tensor, indices: Tensor, rest: Tensor | None, starts: Tensor | None, bias: Tensor | None, rows: int,
    rounds: int, config: Sequence[int],
) -> Tensor:  # fmt: skip
    import triton

    from functional.sparse24.decode_triton import decode_kernel

    chosen = Config(*config)
    tokens, columns = x.shape
    out = x.new_empty(tokens, rows)
    if tokens == 0:
        return out
    tiles, strips = indices.shape[:2]
    words = _aligned(pad(x, (0, -columns % STRIP)) if columns % STRIP else x)  # padding copies even if nothing is added
    weights = [values, indices, indices if rest is None else rest, indices if starts is None else starts]
    stored = [_aligned(values).view(torch.int32), *(part.contiguous() for part in weights[1:])]
    options: dict[str, int | str] = {"HAS_BIAS": bias is not None, "BFLOAT16": x.dtype == torch.bfloat16}
    options |= {"TOKENS": OF_A_PRODUCT if tokens <= OF_A_PRODUCT else OF_A_PASS, "ROUNDS": rounds}
    options |= {"EVEN": strips % (chosen.warps * chosen.unroll) == 0, "INTERPRETED": not x.is_cuda}
    options |= {name.upper(): value for name, value in chosen._asdict().items()} | {"num_warps": chosen.warps}
    buffers = chosen.tiles * chosen.warps if rounds else 0
    with torch.cuda.device_of(x):  # Triton launches on the current device
        constant, launch = overlapping(x, weights, stored)
        decode_kernel[(triton.cdiv(tiles, chosen.tiles),)](
            words.view(torch.int32), *stored, out if bias is None else bias.contiguous(), out, tokens, rows, tiles, strips,
            constant, PATCH=STRIPS, BYTES=str(16 + BYTES_OF_A_PATCH * buffers), **options, **launch,
        )  # fmt: skip
    return out


@_decode.register_fake
def _(x, values, indices, rest, starts, bias, rows, rounds, config):
    return x.new_empty(x.shape[0], rows)


@torch.library.custom_op("sparse24::expand", mutates_args=())
def _expand(
    values: Tensor, indices: Tensor, rest: Tensor | None, starts: Tensor | None, rows: int, columns: int, rounds: int
) -> Tensor:  # fmt: skip
    import triton

    from functional.sparse24.expand_triton import expand_kernel

    out = values.new_empty(rows, columns)
    tiles, strips = indices.shape[:2]
    buffers = WARPS_TO_EXPAND // STRIPS if rounds else 0
    with torch.cuda.device_of(values):
        expand_kernel[(tiles, triton.cdiv(strips, WARPS_TO_EXPAND))](
            _aligned(values).view(torch.int32), indices.contiguous(), indices if rest is None else rest.contiguous(),
            indices if starts is None else starts.contiguous(), out.view(torch.int32), rows, columns, strips,
            ROUNDS=triton.cdiv(rounds, STRIPS), WARPS=WARPS_TO_EXPAND, PATCH=STRIPS, BYTES=str(16 + BYTES_OF_A_PATCH * buffers),
            INTERPRETED=not values.is_cuda, num_warps=WARPS_TO_EXPAND,
        )  # fmt: skip
    return out


@_expand.register_fake
def _(values, indices, rest, starts, rows, columns, rounds):
    return values.new_empty(rows, columns)

"""Triton kernels that restore the dense matrix from a compressed 2:4 one, alone or with a rest (rest.py).

Both are bound by memory.
"""

import triton
import triton.language as tl

from functional.sparse24.rest_triton import other_positions
from functional.sparse24.warp_triton import four_in_order, places


@triton.jit
def scatter_kernel(rest_ptr, starts_ptr, out_ptr, PLACES: tl.constexpr, LANES: tl.constexpr):
    """Store the words of a rest at their places; one program for each patch.

    Args:
        rest_ptr: `Rest.words`.
        starts_ptr: `Rest.starts`.
        out_ptr: Zeros, (patches, PLACES), of 16-bit numbers as int16.
        PLACES: Values of a patch.
        LANES: Words that are stored at a time.
    """
    patch, lane = tl.program_id(0), tl.arange(0, LANES)
    first, last = tl.load(starts_ptr + patch), tl.load(starts_ptr + patch + 1)
    out_at = out_ptr + patch.to(tl.int64) * PLACES
    for turn in range(0, tl.cdiv(last - first, LANES)):
        number = first + turn * LANES + lane
        word = tl.load(rest_ptr + number, mask=number < last, other=0)
        tl.store(out_at + (word & 0xFFFF) // 2, (word >> 16).to(tl.int16), mask=number < last)


@triton.jit
def expand_kernel(
    values_ptr, indices_ptr, rest_ptr, out_ptr, rows, columns, strips, rest_strips, HAS_REST: tl.constexpr, WARPS: tl.constexpr
):  # fmt: skip
    """Restore the dense matrix; each warp expands one strip of a tile, each lane two groups of four of its rows.

    Args:
        values_ptr: `Compressed.values`, as int32, two numbers each.
        indices_ptr: `Compressed.indices`.
        rest_ptr: Values of the rest in the same order, (tiles, rest_strips, ...); not read without HAS_REST.
        out_ptr: Dense matrix, (O, I), of 16-bit numbers as int32, two each.
        rows: O.
        columns: I.
        strips: Number of strips of a tile.
        rest_strips: Number of strips of a tile of the rest, whole patches.
        HAS_REST: Whether there is a rest.
        WARPS: Warps of a program.
    """
    place = tl.arange(0, 32 * WARPS)
    lane, tile = place % 32, tl.program_id(0)
    strip = tl.program_id(1) * WARPS + place // 32
    base, rest_base = tile * strips + strip, tile * rest_strips + strip
    step, u, k = lane % 8 // 4, lane % 4 // 2, lane % 2  # of the lane's groups 8 step + 4 u + 2 k + v, v = 0, 1
    word = (32 * strip + 4 * (lane % 8))[:, None] + tl.arange(0, 4)[None, :]
    for turn in tl.static_range(4):
        row = 4 * turn + lane // 8
        half, g = row // 8, row % 8
        here = (strip < strips) & (16 * tile + row < rows)
        index, shift = tl.load(indices_ptr + 32 * base + 4 * g + 2 * step + k, mask=here, other=0), 16 * half + 4 * u
        within = 128 * step + 4 * (4 * g + u) + 2 * k + half
        w0, w1, w2, w3 = _two_groups(values_ptr + 256 * base + within, index >> shift, here)
        if HAS_REST:
            r0, r1, r2, r3 = _two_groups(rest_ptr + 256 * rest_base + within, other_positions(index) >> shift, here)
            w0, w1, w2, w3 = w0 | r0, w1 | r1, w2 | r2, w3 | r3
        words = tl.reshape(four_in_order(w0, w1, w2, w3), (32 * WARPS, 4))
        out_at = out_ptr + (16 * tile + row).to(tl.int64)[:, None] * (columns // 2) + word
        tl.store(out_at, words, mask=here[:, None] & (word < columns // 2))


@triton.jit
def _two_groups(at, nibbles, here):
    """Return the eight 16-bit numbers of two groups, two in each of four words, from the values that are stored."""
    w0, w1 = _words(nibbles & 15, tl.load(at, mask=here, other=0))
    w2, w3 = _words(nibbles >> 8 & 15, tl.load(at + 8, mask=here, other=0))
    return w0, w1, w2, w3


@triton.jit
def _words(nibble, both):
    """Return the four 16-bit numbers of a group, two in each of two words, of which `both` has the two that are stored."""
    w0, w1, w2, w3 = places(nibble, both & 0xFFFF, both >> 16 & 0xFFFF)
    return w0 | w1 << 16, w2 | w3 << 16

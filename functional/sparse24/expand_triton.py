"""Triton kernel that restores the dense matrix from a compressed 2:4 one, alone or with a rest (rest.py).

It is bound by memory. A rest is scattered in shared memory first, so that every word of the dense matrix is stored once.
"""

import triton
import triton.language as tl

from functional.sparse24.rest_triton import (
    BYTES_OF_A_STRIP,
    bounds_of,
    load_word,
    other_positions,
    scatter,
    scattered_by_plain_operations,
    shared_memory,
    words_of,
)
from functional.sparse24.warp_triton import four_in_order, places


@triton.jit
def expand_kernel(
    values_ptr, indices_ptr, rest_ptr, starts_ptr, out_ptr, rows, columns, strips,
    ROUNDS: tl.constexpr, WARPS: tl.constexpr, PATCH: tl.constexpr, BYTES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Restore the dense matrix; each warp expands one strip of a tile, each lane two groups of four of its rows.

    Args:
        values_ptr: `Compressed.values`, as int32, two numbers each.
        indices_ptr: `Compressed.indices`.
        rest_ptr: `Rest.words`; not read without ROUNDS.
        starts_ptr: `Rest.starts`; not read without ROUNDS.
        out_ptr: Dense matrix, (O, I), of 16-bit numbers as int32, two each.
        rows: O.
        columns: I.
        strips: Number of strips of a tile.
        ROUNDS: Words that each of the 32 PATCH threads of a patch takes; 0 without a rest.
        WARPS: Warps of a program, a multiple of PATCH.
        PATCH: Strips of a patch.
        BYTES: Bytes of shared memory, as a string: 16, and those of WARPS / PATCH patches.
        INTERPRETED: Whether Triton's interpreter runs the kernel.
    """
    LANES: tl.constexpr = 32 * PATCH
    thread, tile = tl.arange(0, 32 * WARPS), tl.program_id(0)
    lane, warp = thread % 32, thread // 32
    strip = tl.program_id(1) * WARPS + warp
    base = tile * strips + strip
    step, u, k = lane % 8 // 4, lane % 4 // 2, lane % 2  # of the lane's groups 8 step + 4 u + 2 k + v, v = 0, 1
    word = (32 * strip + 4 * (lane % 8))[:, None] + tl.arange(0, 4)[None, :]
    if ROUNDS:
        bounds = bounds_of(starts_ptr, strip // PATCH, tile, tl.num_programs(0), tl.cdiv(strips, PATCH))
        left = words_of(rest_ptr, bounds, thread % LANES, ROUNDS, LANES)
        if INTERPRETED:
            values = scattered_by_plain_operations(left, 0, 512 * PATCH, ROUNDS, WARPS // PATCH, LANES)
            rest = tl.reshape(values, (256 * WARPS,))
        else:
            memory = shared_memory(thread % LANES, warp // PATCH, BYTES, 1, LANES, INTERPRETED)[1]
            tl.debug_barrier()
            scatter(left, memory, ROUNDS)
            tl.debug_barrier()
            rest = memory + BYTES_OF_A_STRIP * (warp % PATCH)
    for turn in tl.static_range(4):
        row = 4 * turn + lane // 8
        half, g = row // 8, row % 8
        here = (strip < strips) & (16 * tile + row < rows)
        index, shift = tl.load(indices_ptr + 32 * base + 4 * g + 2 * step + k, mask=here, other=0), 16 * half + 4 * u
        within = 128 * step + 4 * (4 * g + u) + 2 * k + half
        at = values_ptr + 256 * base + within
        first, second = tl.load(at, mask=here, other=0), tl.load(at + 8, mask=here, other=0)
        w0, w1, w2, w3 = _two_groups(index >> shift, first, second)
        if ROUNDS:
            if INTERPRETED:
                first, second = tl.gather(rest, 256 * warp + within, 0), tl.gather(rest, 256 * warp + within + 8, 0)
            else:
                first, second = load_word(rest + 4 * within), load_word(rest + 4 * within + 32)
            r0, r1, r2, r3 = _two_groups(other_positions(index) >> shift, first, second)
            w0, w1, w2, w3 = w0 | r0, w1 | r1, w2 | r2, w3 | r3
        words = tl.reshape(four_in_order(w0, w1, w2, w3), (32 * WARPS, 4))
        out_at = out_ptr + (16 * tile + row).to(tl.int64)[:, None] * (columns // 2) + word
        tl.store(out_at, words, mask=here[:, None] & (word < columns // 2))


@triton.jit
def _two_groups(nibbles, first, second):
    """Return the eight 16-bit numbers of two groups, two in each of four words, from the two that are stored of each."""
    w0, w1 = _words(nibbles & 15, first)
    w2, w3 = _words(nibbles >> 8 & 15, second)
    return w0, w1, w2, w3


@triton.jit
def _words(nibble, both):
    """Return the four 16-bit numbers of a group, two in each of two words, of which `both` has the two that are stored."""
    w0, w1, w2, w3 = places(nibble, both & 0xFFFF, both >> 16 & 0xFFFF)
    return w0 | w1 << 16, w2 | w3 << 16

"""Triton kernel that multiplies a compressed 2:4 matrix, alone or with a rest (rest.py), with up to 16 tokens.

It is bound by memory. Weights lie in memory as the registers of sparse tensor cores need them (compress.py), so nothing is
unpacked. A warp loads all that UNROLL strips need before it multiplies the first of them. Each step of a strip has its own
sums, since a product waits for the one that its sums come from. Inputs are loaded last: in a CUDA graph the first weights
are on their way before what the kernel ahead wrote can be read (launches.py).

With ``TRITON_INTERPRET=1`` the kernel runs on CPU tensors; INTERPRETED then replaces instructions by plain operations.
"""

import triton
import triton.language as tl

from functional.launches_triton import wait_before_inputs, wait_before_weights
from functional.sparse24.rest_triton import (
    BYTES_OF_A_PATCH,
    bounds_of,
    gather,
    load_word,
    other_positions,
    scatter,
    shared_memory,
    wait_for_warp,
    words_of,
)
from functional.sparse24.warp_triton import four_in_order, inputs, product, product_by_plain_operations
from functional.words_triton import four_words


@triton.jit
def _load(ptr, mask, EVEN: tl.constexpr):
    return tl.load(ptr) if EVEN else tl.load(ptr, mask=mask, other=0)


@triton.jit
def _place(block, ahead, warp, strips, EVEN: tl.constexpr, WARPS: tl.constexpr, UNROLL: tl.constexpr):
    """Return the strip whose turn it is in a warp, and whether it exists; if not, the strip is the last one."""
    strip = (block * WARPS + warp) * UNROLL + ahead
    return strip if EVEN else tl.minimum(strip, strips - 1), (strip < strips)[:, None]


@triton.jit
def _tile(values_at, indices_at, at, mask, EVEN: tl.constexpr, WARPS: tl.constexpr):
    """Load the registers of both steps of a strip of a tile, and its nibbles; zeros if there is no such strip."""
    a0 = four_words(_load(values_at + at[:, None] * 256, mask, EVEN), 32 * WARPS)
    a1 = four_words(_load(values_at + at[:, None] * 256 + 128, mask, EVEN), 32 * WARPS)
    return a0, a1, tl.load(indices_at + at * 32)


@triton.jit
def _two_products(
    sums, weights, b0, b1, BFLOAT16: tl.constexpr, WARPS: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """Multiply both steps of a strip, and return the sums of each."""
    a0, a1, index = weights
    if INTERPRETED:
        first = product_by_plain_operations(sums[0], a0, b0, index, 0, BFLOAT16, WARPS)
        return first, product_by_plain_operations(sums[1], a1, b1, index, 1, BFLOAT16, WARPS)
    first = product(sums[0], a0, b0, index, 0, BFLOAT16)
    return first, product(sums[1], a1, b1, index, 1, BFLOAT16)


@triton.jit
def _multiplied(
    sums, rest_sums, main, rest, x, odd, BFLOAT16: tl.constexpr, WARPS: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """Multiply a strip of each tile, and of its rest if there is one, with all tokens; return all sums."""
    TILES: tl.constexpr = len(main)
    added, rest_added = (), ()
    for eight in tl.static_range(len(x)):
        b0 = inputs(x[eight][0], odd, WARPS, INTERPRETED)
        b1 = inputs(x[eight][1], odd, WARPS, INTERPRETED)
        for turn in tl.static_range(TILES):
            before, rest_before = sums[TILES * eight + turn], rest_sums[TILES * eight + turn]
            added += (_two_products(before, main[turn], b0, b1, BFLOAT16, WARPS, INTERPRETED),)
            if len(rest):
                rest_added += (_two_products(rest_before, rest[turn], b0, b1, BFLOAT16, WARPS, INTERPRETED),)
            else:
                rest_added += (rest_before,)
    return added, rest_added


@triton.jit
def _total(main, rest):
    """Add the sums of the steps of both matrices."""
    found = ()
    for register in tl.static_range(4):
        found += ((main[0][register] + main[1][register]) + (rest[0][register] + rest[1][register]),)
    return found


@triton.jit
def _store(
    sums, bias_ptr, out_ptr, tile, first_token, tokens, rows, HAS_BIAS: tl.constexpr, WARPS: tl.constexpr
):  # fmt: skip
    """Add the sums of the warps, always in the same order, round and store."""
    y = tl.sum(tl.reshape(four_in_order(sums[0], sums[1], sums[2], sums[3]), (WARPS, 32, 4)), 0)
    lane, register = tl.arange(0, 32)[:, None], tl.arange(0, 4)[None, :]
    row = 16 * tile + lane // 4 + 8 * (register // 2)
    token = first_token + 2 * (lane % 4) + register % 2
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=row < rows, other=0).to(tl.float32)
    tl.store(out_ptr + token * rows + row, y.to(out_ptr.dtype.element_ty), mask=(token < tokens) & (row < rows))


@triton.jit(do_not_specialize=["tokens", "constant"])
def decode_kernel(
    x_ptr, values_ptr, indices_ptr, rest_ptr, starts_ptr, bias_ptr, out_ptr, tokens, rows, tiles, strips, constant,
    HAS_BIAS: tl.constexpr, BFLOAT16: tl.constexpr, EVEN: tl.constexpr, TOKENS: tl.constexpr, ROUNDS: tl.constexpr,
    TILES: tl.constexpr, WARPS: tl.constexpr, UNROLL: tl.constexpr, PATCH: tl.constexpr, BYTES: tl.constexpr,
    OVERLAPS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Multiply TILES (1, 2 or 4) tiles with up to TOKENS (8 or 16) tokens; warps take turns with UNROLL strips.

    Args:
        x_ptr: Inputs, (tokens, 64 strips), as int32, two numbers each.
        values_ptr: `Compressed.values`, as int32, two numbers each.
        indices_ptr: `Compressed.indices`.
        rest_ptr: `Rest.words`; not read without ROUNDS.
        starts_ptr: `Rest.starts`; not read without ROUNDS.
        bias_ptr: Bias, (rows,); not read without HAS_BIAS.
        out_ptr: Result, (tokens, rows).
        tokens: Number of tokens.
        rows: O.
        tiles: Number of tiles.
        strips: Number of strips of a tile.
        constant: Whether weights may be read before the kernel waits for the one ahead.
        HAS_BIAS: Whether a bias is added.
        BFLOAT16: Whether numbers are bfloat16; if not, float16.
        EVEN: Whether WARPS x UNROLL divides the strips, so that no load needs a mask.
        TOKENS: 8 or 16, at least `tokens`.
        ROUNDS: Words of a patch that a lane takes; 0 without a rest. Otherwise UNROLL is a multiple of PATCH.
        TILES: Tiles of a program, 1, 2 or 4.
        WARPS: Warps of a program.
        UNROLL: Strips that are loaded into registers at a time.
        PATCH: Strips of a patch.
        BYTES: Bytes of shared memory, as a string: 16, and those of a patch for each tile and warp if there is a rest.
        OVERLAPS: Whether the GPU can launch kernels early.
        INTERPRETED: Whether Triton's interpreter runs the kernel.
    """
    wait_before_weights(constant, OVERLAPS)
    EIGHTS: tl.constexpr = TOKENS // 8
    place, four = tl.arange(0, 32 * WARPS), tl.arange(0, 4)[None, :]
    warp, lane = place // 32, place % 32
    token, odd = lane // 4, lane % 2 == 1
    tile = tl.program_id(0) * TILES
    values_at = values_ptr + (4 * lane)[:, None] + four
    patches = tl.cdiv(strips, PATCH)
    zero = tl.zeros((32 * WARPS,), tl.float32)
    none = ((zero, zero, zero, zero), (zero, zero, zero, zero))
    x_at, sums, rest_sums = (), (), ()
    for eight in tl.static_range(EIGHTS):
        # In place of tokens past the last, the last is read again, which costs nothing: its cache line is there already.
        row = tl.minimum(token + 8 * eight, tokens - 1)
        x_at += (x_ptr + (row * (32 * strips) + 4 * (lane % 4))[:, None] + four,)
        for _ in tl.static_range(TILES):
            sums += (none,)
            rest_sums += (none,)
    shared, memory = shared_memory(lane, warp * TILES, BYTES, TILES if ROUNDS else 0, 32, INTERPRETED)
    bounds = _bounds_of_block(starts_ptr, 0, warp, tile, tiles, patches, ROUNDS, TILES, WARPS, UNROLL // PATCH)
    for block in range(0, tl.cdiv(strips, WARPS * UNROLL)):
        weights, x, words = (), (), ()
        for ahead in tl.static_range(UNROLL):
            strip, mask = _place(block, ahead, warp, strips, EVEN, WARPS, UNROLL)
            for turn in tl.static_range(TILES):
                at = tl.minimum(tile + turn, tiles - 1) * strips + strip  # past the last tile nothing is written
                weights += (_tile(values_at, indices_ptr + lane, at, mask, EVEN, WARPS),)
        for patch in tl.static_range(len(bounds)):
            words += (words_of(rest_ptr, bounds[patch], lane, ROUNDS, 32),)
        bounds = _bounds_of_block(starts_ptr, block + 1, warp, tile, tiles, patches, ROUNDS, TILES, WARPS, UNROLL // PATCH)
        wait_before_inputs(OVERLAPS)
        for ahead in tl.static_range(UNROLL):
            strip = _place(block, ahead, warp, strips, EVEN, WARPS, UNROLL)[0]
            for eight in tl.static_range(EIGHTS):
                here = x_at[eight] + 32 * strip[:, None]
                x += ((tl.load(here), tl.load(here + 16)),)
        # Without the barrier, and a zero from behind it that all products need, the compiler delays loads.
        tl.debug_barrier()
        nothing = lane & 0 if INTERPRETED else load_word(shared)
        for ahead in tl.static_range(UNROLL):
            if ROUNDS and ahead % PATCH == 0 and not INTERPRETED:
                for turn in tl.static_range(TILES):
                    scatter(words[ahead // PATCH * TILES + turn], memory + turn * BYTES_OF_A_PATCH, ROUNDS)
                wait_for_warp(lane)
            main, rest = (), ()
            for turn in tl.static_range(TILES):
                a0, a1, index = weights[TILES * ahead + turn]
                main += ((a0, a1, index | nothing),)
                if ROUNDS:
                    of_patch, at = words[ahead // PATCH * TILES + turn], memory + turn * BYTES_OF_A_PATCH
                    a0, a1 = gather(of_patch, at, lane, ahead % PATCH, ROUNDS, WARPS, INTERPRETED)
                    rest += ((a0, a1, other_positions(index)),)
            given = x[EIGHTS * ahead : EIGHTS * (ahead + 1)]
            sums, rest_sums = _multiplied(sums, rest_sums, main, rest, given, odd, BFLOAT16, WARPS, INTERPRETED)
            if ROUNDS and ahead % PATCH == PATCH - 1 and ahead + 1 < UNROLL and not INTERPRETED:
                wait_for_warp(lane)
    for eight in tl.static_range(EIGHTS):
        for turn in tl.static_range(TILES):
            y = _total(sums[TILES * eight + turn], rest_sums[TILES * eight + turn])
            _store(y, bias_ptr, out_ptr, tile + turn, 8 * eight, tokens, rows, HAS_BIAS, WARPS)


@triton.jit
def _bounds_of_block(
    starts_ptr, block, warp, tile, tiles, patches,
    ROUNDS: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr, PATCHES: tl.constexpr,
):  # fmt: skip
    """Return the bounds of a warp's PATCHES in a block, those of all tiles; none without a rest."""
    found = ()
    for ahead in tl.static_range(PATCHES if ROUNDS else 0):
        for turn in tl.static_range(TILES):
            patch = (block * WARPS + warp) * PATCHES + ahead
            found += (bounds_of(starts_ptr, patch, tile + turn, tiles, patches),)
    return found

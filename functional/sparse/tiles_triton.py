"""Triton kernels on matrices in tiles (tiles.py): multiply with up to 16 tokens on tensor cores, and restore the dense matrix.

Tensors of `tiles_kernel` have one element for each thread of a program, so that an element is a register. Only so can the kernel
call instructions of a whole warp, which Triton does not know. For each pair of weights a lane counts the bits of a mask below
its own, reads the two values there, and places them by its two bits.

With ``TRITON_INTERPRET=1`` the kernels run on CPU tensors; INTERPRETED then replaces those instructions by plain operations.
"""

import triton
import triton.language as tl

from functional.words_triton import four_words, two_numbers


@triton.jit
def _bits_below(mask, below, INTERPRETED: tl.constexpr):
    """Count the bits of masks that `below` has too."""
    if INTERPRETED:
        left = mask & below  # never the sign bit, since below has 30 bits at most
        left -= left >> 1 & 0x55555555
        left = (left & 0x33333333) + (left >> 2 & 0x33333333)
        left = (left + (left >> 4)) & 0x0F0F0F0F
        return (left + (left >> 8) + (left >> 16) + (left >> 24)) & 63
    return tl.inline_asm_elementwise(
        "{ .reg .b32 left; and.b32 left, $1, $2; popc.b32 $0, left; }", "=r,r,r", [mask, below], dtype=tl.int32, is_pure=True,
        pack=1,
    )  # fmt: skip


@triton.jit
def _placed(mask, shift, first, second, INTERPRETED: tl.constexpr):
    """Put two values of 16 bit where two bits of a mask say: both, the first in the lower or the upper half, or none."""
    if INTERPRETED:
        bits, lower, upper = mask >> shift & 3, first.to(tl.int32) & 0xFFFF, second.to(tl.int32) << 16
        return tl.where(bits == 3, lower | upper, tl.where(bits == 2, lower << 16, tl.where(bits == 1, lower, 0)))
    return tl.inline_asm_elementwise(
        """{ .reg .b32 bits, chosen, lower, upper;
        shr.u32 bits, $1, $2; and.b32 bits, bits, 3;
        mad.lo.u32 chosen, bits, 0x22, 0x10; prmt.b32 chosen, 0x22102222, 0x54101022, chosen;
        cvt.u32.u16 lower, $3; cvt.u32.u16 upper, $4;
        prmt.b32 $0, lower, upper, chosen; }""",
        "=r,r,r,h,h", [mask, shift, first, second], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _product(sums, a, b, BFLOAT16: tl.constexpr, WARPS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return sums + a (16 rows, 16 inputs) times b (16 inputs, 8 tokens), spread over the lanes of each warp."""
    if INTERPRETED:
        x = tl.reshape(_four(b[0], b[1], BFLOAT16), (WARPS, 1, 8, 16))
        upper = tl.sum(tl.reshape(_four(a[0], a[2], BFLOAT16), (WARPS, 8, 1, 16)) * x, 3)
        lower = tl.sum(tl.reshape(_four(a[1], a[3], BFLOAT16), (WARPS, 8, 1, 16)) * x, 3)
        y0, y1 = tl.split(tl.reshape(upper, (32 * WARPS, 2)))
        y2, y3 = tl.split(tl.reshape(lower, (32 * WARPS, 2)))
        return sums[0] + y0, sums[1] + y1, sums[2] + y2, sums[3] + y3
    TYPE: tl.constexpr = "bf16" if BFLOAT16 else "f16"
    ASM: tl.constexpr = (
        "mma.sync.aligned.m16n8k16.row.col.f32." + TYPE + "." + TYPE + ".f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    return tl.inline_asm_elementwise(
        ASM, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a[0], a[1], a[2], a[3], b[0], b[1], sums[0], sums[1], sums[2], sums[3]],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _four(first, second, BFLOAT16: tl.constexpr):
    """Return the four numbers of two registers of each lane, (lanes, 2, 2)."""
    w0, w1 = two_numbers(first, BFLOAT16)
    w2, w3 = two_numbers(second, BFLOAT16)
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def _address(values_ptr, place, INTERPRETED: tl.constexpr):
    """Return where a value lies: values_ptr + place, in one instruction, of which the loop has many."""
    if INTERPRETED:
        return values_ptr + place
    at = tl.inline_asm_elementwise(
        "mad.wide.u32 $0, $1, 2, $2;", "=l,r,l", [place, values_ptr.to(tl.int64)], dtype=tl.int64, is_pure=True, pack=1
    )
    return at.to(tl.pointer_type(tl.int16))


@triton.jit
def _found(values_ptr, masks, before, start, below, INTERPRETED: tl.constexpr):
    """Load for each register of a block the next two values from the lane's place on: 4 of (first, second)."""
    found = ()
    for register in tl.static_range(4):
        place = start + (before >> 8 * register & 255) + _bits_below(masks[register], below, INTERPRETED)
        at = _address(values_ptr, place, INTERPRETED)
        found += ((tl.load(at), tl.load(at + 1)),)
    return found


@triton.jit
def _block(masks, found, shift, INTERPRETED: tl.constexpr):
    """Registers of a block."""
    return (
        _placed(masks[0], shift, found[0][0], found[0][1], INTERPRETED),
        _placed(masks[1], shift, found[1][0], found[1][1], INTERPRETED),
        _placed(masks[2], shift, found[2][0], found[2][1], INTERPRETED),
        _placed(masks[3], shift, found[3][0], found[3][1], INTERPRETED),
    )


@triton.jit
def _heads(heads_at, strip, there, LANES: tl.constexpr):
    """Load the head of a strip: masks of its two blocks, then weights before them and starts. Without a strip it is zeros."""
    at = heads_at + (24 * strip)[:, None]
    masks0 = four_words(tl.load(at, mask=there[:, None], other=0), LANES)
    masks1 = four_words(tl.load(at + 4, mask=there[:, None], other=0), LANES)
    return masks0, masks1, four_words(tl.load(at + 8, mask=there[:, None], other=0), LANES)


@triton.jit(do_not_specialize=["tokens"])
def tiles_kernel(
    x_ptr, values_ptr, heads_ptr, bias_ptr, out_ptr, tokens, rows, strips,
    HAS_BIAS: tl.constexpr, BFLOAT16: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr, UNROLL: tl.constexpr,
    BARRIER: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Multiply a tile with up to TOKENS (8 or 16) tokens; warps take turns with its strips.

    Args:
        x_ptr: Inputs, (tokens, 32 strips), as int32, two numbers each.
        values_ptr: `Tiles.values`, as int16.
        heads_ptr: `Tiles.heads`.
        bias_ptr: Bias, (rows,); not read without HAS_BIAS.
        out_ptr: Result, (tokens, rows).
        tokens: Number of tokens.
        rows: O.
        strips: Number of strips of a tile.
        HAS_BIAS: Whether a bias is added.
        BFLOAT16: Whether numbers are bfloat16; if not, float16.
        TOKENS: 8 or 16, at least `tokens`.
        WARPS: Warps of a program.
        UNROLL: Strips of a warp on their way at a time.
        INTERPRETED: Whether Triton's interpreter runs the kernel.
    """
    LANES: tl.constexpr = 32 * WARPS
    place, four = tl.arange(0, LANES), tl.arange(0, 4)[None, :]
    warp, lane, tile = place // 32, place % 32, tl.program_id(0)
    half, shift, token = lane // 16, 2 * (lane % 16), lane // 4
    below = (1 << shift) - 1
    # In place of tokens past the last, the last is read again, which costs nothing: its cache line is there already.
    x_at = x_ptr + (tl.minimum(token, tokens - 1) * (16 * strips) + 4 * (lane % 4))[:, None] + four
    next_x_at = x_ptr + (tl.minimum(token + 8, tokens - 1) * (16 * strips) + 4 * (lane % 4))[:, None] + four
    zero = tl.zeros((LANES,), tl.float32)
    sums, next_sums = (zero, zero, zero, zero), (zero, zero, zero, zero)
    heads_at = heads_ptr + (tile * strips * 24 + 12 * half)[:, None] + four
    heads = ()
    for ahead in tl.static_range(UNROLL):
        heads += (_heads(heads_at, ahead * WARPS + warp, ahead * WARPS + warp < strips, LANES),)
    for first in range(0, strips, WARPS * UNROLL):
        found, following = (), ()
        for ahead in tl.static_range(UNROLL):
            masks0, masks1, rest = heads[ahead]
            found += (_found(values_ptr, masks0, rest[0], rest[2], below, INTERPRETED),)
            found += (_found(values_ptr, masks1, rest[1], rest[3], below, INTERPRETED),)
        for ahead in tl.static_range(UNROLL):
            strip = first + (UNROLL + ahead) * WARPS + warp
            following += (_heads(heads_at, strip, strip < strips, LANES),)
        if BARRIER:
            tl.debug_barrier()  # without it the compiler delays loads that are not needed at once
        for ahead in tl.static_range(UNROLL):
            a0 = _block(heads[ahead][0], found[2 * ahead], shift, INTERPRETED)
            a1 = _block(heads[ahead][1], found[2 * ahead + 1], shift, INTERPRETED)
            word = 16 * tl.minimum(first + ahead * WARPS + warp, strips - 1)[:, None]
            w0, w1, w2, w3 = four_words(tl.load(x_at + word), LANES)
            sums = _product(sums, a0, (w0, w1), BFLOAT16, WARPS, INTERPRETED)
            sums = _product(sums, a1, (w2, w3), BFLOAT16, WARPS, INTERPRETED)
            if TOKENS == 16:
                w0, w1, w2, w3 = four_words(tl.load(next_x_at + word), LANES)
                next_sums = _product(next_sums, a0, (w0, w1), BFLOAT16, WARPS, INTERPRETED)
                next_sums = _product(next_sums, a1, (w2, w3), BFLOAT16, WARPS, INTERPRETED)
        heads = following
    _store(sums, bias_ptr, out_ptr, tile, 0, tokens, rows, HAS_BIAS, WARPS)
    if TOKENS == 16:
        _store(next_sums, bias_ptr, out_ptr, tile, 8, tokens, rows, HAS_BIAS, WARPS)


@triton.jit
def _store(sums, bias_ptr, out_ptr, tile, first_token, tokens, rows, HAS_BIAS: tl.constexpr, WARPS: tl.constexpr):
    """Add the sums of the warps, always in the same order, round and store."""
    four = tl.join(tl.join(sums[0], sums[2]), tl.join(sums[1], sums[3]))
    y = tl.sum(tl.reshape(four, (WARPS, 32, 4)), 0)
    lane, register = tl.arange(0, 32)[:, None], tl.arange(0, 4)[None, :]
    row = 16 * tile + lane // 4 + 8 * (register // 2)
    token = first_token + 2 * (lane % 4) + register % 2
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=row < rows, other=0).to(tl.float32)
    tl.store(out_ptr + token * rows + row, y.to(out_ptr.dtype.element_ty), mask=(token < tokens) & (row < rows))


@triton.jit
def expand_kernel(
    values_ptr, heads_ptr, out_ptr, rows, columns, strips, EVEN: tl.constexpr, WARPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Restore the dense matrix; each warp expands one strip of a tile.

    Args:
        values_ptr: `Tiles.values`, as int16.
        heads_ptr: `Tiles.heads`.
        out_ptr: Dense matrix, (O, I), of 16-bit numbers: as int32, two each, if EVEN, otherwise as int16.
        rows: O.
        columns: I.
        strips: Number of strips of a tile.
        EVEN: Whether 32 divides the columns, so that lanes store 16 bytes at a time.
        WARPS: Warps of a program.
        INTERPRETED: Whether Triton's interpreter runs the kernel.
    """
    LANES: tl.constexpr = 32 * WARPS
    place, tile = tl.arange(0, LANES), tl.program_id(0)
    lane, strip = place % 32, tl.program_id(1) * WARPS + place // 32
    half, shift, inside = lane // 16, 2 * (lane % 16), strip < strips
    below = (1 << shift) - 1
    heads_at = heads_ptr + (tile * strips * 24 + 12 * half)[:, None] + tl.arange(0, 4)[None, :]
    masks0, masks1, rest = _heads(heads_at, strip, inside, LANES)
    a0 = _block(masks0, _found(values_ptr, masks0, rest[0], rest[2], below, INTERPRETED), shift, INTERPRETED)
    a1 = _block(masks1, _found(values_ptr, masks1, rest[1], rest[3], below, INTERPRETED), shift, INTERPRETED)
    for lower in tl.static_range(2):
        row = (16 * tile + 8 * lower + lane // 4)[:, None]
        words = tl.join(tl.join(a0[lower], a1[lower]), tl.join(a0[2 + lower], a1[2 + lower]))
        here = inside[:, None] & (row < rows)
        if EVEN:
            word = (16 * strip + 4 * (lane % 4))[:, None] + tl.arange(0, 4)[None, :]
            tl.store(out_ptr + row.to(tl.int64) * (columns // 2) + word, tl.reshape(words, (LANES, 4)), mask=here)
        else:
            word = (16 * strip + 4 * (lane % 4))[:, None] + tl.arange(0, 4)[None, :]
            words, left = tl.reshape(words, (LANES, 4)), row.to(tl.int64) * columns + 2 * word
            tl.store(out_ptr + left, words.to(tl.int16), mask=here & (2 * word < columns))
            tl.store(out_ptr + left + 1, (words >> 16).to(tl.int16), mask=here & (2 * word + 1 < columns))

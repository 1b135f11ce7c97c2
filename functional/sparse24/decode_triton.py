"""Triton kernels on compressed 2:4 weights: multiply with up to 16 tokens on sparse tensor cores, and restore the dense matrix.

Both are bound by memory. Weights lie in memory as registers need them (see compress.py), so nothing is unpacked. Tensors of
`decode_kernel` have one element for each thread of a program, so that an element is a register. Only so can the kernel call
instructions of a whole warp, which Triton does not know. Loads run STAGES strips ahead, through shared memory, or UNROLL strips
at a time, into registers.

With ``TRITON_INTERPRET=1`` the kernels run on CPU tensors; INTERPRETED then replaces those instructions by plain operations.
"""

import triton
import triton.language as tl

from functional.words_triton import four_words, two_numbers


@triton.jit
def _places(nibble, first_value, second_value):
    """Return the values at the four positions; the first index is at most 2, the second at least 1 and larger."""
    first, second = nibble & 3, nibble & 12
    nothing = tl.zeros(first_value.shape, first_value.dtype)
    w0 = tl.where(first == 0, first_value, nothing)
    w1 = tl.where(first == 1, first_value, tl.where(second == 1 << 2, second_value, nothing))
    w2 = tl.where(first == 2, first_value, tl.where(second == 2 << 2, second_value, nothing))
    w3 = tl.where(second == 3 << 2, second_value, nothing)
    return w0, w1, w2, w3


@triton.jit
def _four_in_order(w0, w1, w2, w3):
    """Join four tensors of one shape to (..., 2, 2); the last two axes flatten to their order."""
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def _product(sums, a, b, index, STEP: tl.constexpr, BFLOAT16: tl.constexpr):
    """Return sums + a (16 rows, 32 inputs, 2:4) times b (32 inputs, 8 tokens), spread over the lanes of each warp."""
    TYPE: tl.constexpr = "bf16" if BFLOAT16 else "f16"
    ASM: tl.constexpr = (
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." + TYPE + "." + TYPE + ".f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$12,$13,$14,$15}, $16, " + ("0x0;" if STEP == 0 else "0x1;")
    )
    return tl.inline_asm_elementwise(
        ASM, "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r",
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], sums[0], sums[1], sums[2], sums[3], index],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _dense_rows(a, index, HALF: tl.constexpr, STEP: tl.constexpr, BFLOAT16: tl.constexpr, WARPS: tl.constexpr):
    """Return rows g (HALF 0) or g + 8 (HALF 1) of `a` with their zeros: (WARPS, 8, 32)."""
    member = tl.arange(0, 4)[None, None, :]
    index = tl.reshape(index, (WARPS, 8, 4))
    nibbles0 = tl.sum(tl.where(member == 2 * STEP, index, 0), 2)[:, :, None] >> (16 * HALF + 4 * member) & 15
    nibbles1 = tl.sum(tl.where(member == 2 * STEP + 1, index, 0), 2)[:, :, None] >> (16 * HALF + 4 * member) & 15
    first0, second0 = two_numbers(tl.reshape(a[HALF], (WARPS, 8, 4)), BFLOAT16)
    first1, second1 = two_numbers(tl.reshape(a[2 + HALF], (WARPS, 8, 4)), BFLOAT16)
    w0, w1, w2, w3 = _places(nibbles0, first0, second0)
    left = tl.reshape(_four_in_order(w0, w1, w2, w3), (WARPS, 8, 16))
    w0, w1, w2, w3 = _places(nibbles1, first1, second1)
    right = tl.reshape(_four_in_order(w0, w1, w2, w3), (WARPS, 8, 16))
    return tl.reshape(tl.permute(tl.join(left, right), (0, 1, 3, 2)), (WARPS, 8, 32))


@triton.jit
def _product_by_plain_operations(
    sums, a, b, index, STEP: tl.constexpr, BFLOAT16: tl.constexpr, WARPS: tl.constexpr
):  # fmt: skip
    """Compute the same as `_product`."""
    low0, high0 = two_numbers(b[0], BFLOAT16)
    low1, high1 = two_numbers(b[1], BFLOAT16)
    low2, high2 = two_numbers(b[2], BFLOAT16)
    low3, high3 = two_numbers(b[3], BFLOAT16)
    words = tl.join(_four_in_order(low0, low1, low2, low3), _four_in_order(high0, high1, high2, high3))
    x = tl.reshape(tl.permute(tl.reshape(words, (WARPS, 8, 4, 4, 2)), (0, 1, 3, 2, 4)), (WARPS, 1, 8, 32))
    upper = tl.sum(_dense_rows(a, index, 0, STEP, BFLOAT16, WARPS)[:, :, None, :] * x, 3)
    lower = tl.sum(_dense_rows(a, index, 1, STEP, BFLOAT16, WARPS)[:, :, None, :] * x, 3)
    y0, y1 = tl.split(tl.reshape(upper, (32 * WARPS, 2)))
    y2, y3 = tl.split(tl.reshape(lower, (32 * WARPS, 2)))
    return sums[0] + y0, sums[1] + y1, sums[2] + y2, sums[3] + y3


@triton.jit
def _of_neighbour(words, WARPS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return the words of the lane whose number differs in the last bit."""
    if INTERPRETED:
        even, odd = tl.split(tl.reshape(words, (16 * WARPS, 2)))
        return tl.reshape(tl.join(odd, even), (32 * WARPS,))
    return tl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 1, 0x1f, 0xffffffff;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _load(ptr, mask, EVEN: tl.constexpr):
    return tl.load(ptr) if EVEN else tl.load(ptr, mask=mask, other=0)


@triton.jit
def _inputs(words, odd, WARPS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Bring the inputs of a step into the order of groups of compress.py.

    Lane t of four has loaded groups 2 t and 2 t + 1 of a token's 32 inputs. Afterwards register i of lanes 2 u and 2 u + 1 has
    the two halves of group 4 u + i.
    """
    w0, w1, w2, w3 = four_words(words, 32 * WARPS)
    other0 = _of_neighbour(tl.where(odd, w0, w1), WARPS, INTERPRETED)
    other1 = _of_neighbour(tl.where(odd, w2, w3), WARPS, INTERPRETED)
    return tl.where(odd, other0, w0), tl.where(odd, other1, w2), tl.where(odd, w1, other0), tl.where(odd, w3, other1)


@triton.jit
def _place(turn, warp, strips, EVEN: tl.constexpr, WARPS: tl.constexpr):
    """Return the strip whose turn it is in a warp, and whether it exists; if not, the strip is the last one."""
    strip = turn * WARPS + warp
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
    """Multiply both steps of a strip."""
    a0, a1, index = weights
    if INTERPRETED:
        sums = _product_by_plain_operations(sums, a0, b0, index, 0, BFLOAT16, WARPS)
        return _product_by_plain_operations(sums, a1, b1, index, 1, BFLOAT16, WARPS)
    sums = _product(sums, a0, b0, index, 0, BFLOAT16)
    return _product(sums, a1, b1, index, 1, BFLOAT16)


@triton.jit
def _store(
    sums, bias_ptr, out_ptr, tile, first_token, tokens, rows, HAS_BIAS: tl.constexpr, WARPS: tl.constexpr
):  # fmt: skip
    """Add the sums of the warps, always in the same order, round and store."""
    y = tl.sum(tl.reshape(_four_in_order(sums[0], sums[1], sums[2], sums[3]), (WARPS, 32, 4)), 0)
    lane, register = tl.arange(0, 32)[:, None], tl.arange(0, 4)[None, :]
    row = 16 * tile + lane // 4 + 8 * (register // 2)
    token = first_token + 2 * (lane % 4) + register % 2
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=row < rows, other=0).to(tl.float32)
    tl.store(out_ptr + token * rows + row, y.to(out_ptr.dtype.element_ty), mask=(token < tokens) & (row < rows))


@triton.jit(do_not_specialize=["tokens"])
def decode_kernel(
    x_ptr, values_ptr, indices_ptr, bias_ptr, out_ptr, tokens, rows, tiles, strips,
    HAS_BIAS: tl.constexpr, BFLOAT16: tl.constexpr, EVEN: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr,
    WARPS: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Multiply TILES (1, 2 or 4) tiles with up to TOKENS (8 or 16) tokens; warps take turns with the strips.

    Args:
        x_ptr: Inputs, (tokens, 64 strips), as int32, two numbers each.
        values_ptr: `Compressed.values`, as int32, two numbers each.
        indices_ptr: `Compressed.indices`.
        bias_ptr: Bias, (rows,); not read without HAS_BIAS.
        out_ptr: Result, (tokens, rows).
        tokens: Number of tokens.
        rows: O.
        tiles: Number of tiles.
        strips: Number of strips of a tile.
        HAS_BIAS: Whether a bias is added.
        BFLOAT16: Whether numbers are bfloat16; if not, float16.
        EVEN: Whether WARPS x UNROLL divides the strips, so that no load needs a mask.
        TOKENS: 8 or 16, at least `tokens`.
        TILES: Tiles of a program, 1, 2 or 4.
        WARPS: Warps of a program.
        STAGES: Strips that are loaded ahead through shared memory.
        UNROLL: Strips that are loaded into registers at a time.
        INTERPRETED: Whether Triton's interpreter runs the kernel.
    """
    place, four = tl.arange(0, 32 * WARPS), tl.arange(0, 4)[None, :]
    warp, lane = place // 32, place % 32
    token, odd = lane // 4, lane % 2 == 1
    tile = tl.program_id(0) * TILES
    values_at = values_ptr + (4 * lane)[:, None] + four
    zero = tl.zeros((32 * WARPS,), tl.float32)
    x_at, sums = (), ()
    for eight in tl.static_range(TOKENS // 8):
        # In place of tokens past the last, the last is read again, which costs nothing: its cache line is there already.
        row = tl.minimum(token + 8 * eight, tokens - 1)
        x_at += (x_ptr + (row * (32 * strips) + 4 * (lane % 4))[:, None] + four,)
        for _ in tl.static_range(TILES):
            sums += ((zero, zero, zero, zero),)
    for block in tl.range(0, tl.cdiv(strips, WARPS * UNROLL), num_stages=STAGES):
        weights = ()
        for ahead in tl.static_range(UNROLL):
            strip, mask = _place(block * UNROLL + ahead, warp, strips, EVEN, WARPS)
            for turn in tl.static_range(TILES):
                at = tl.minimum(tile + turn, tiles - 1) * strips + strip  # past the last tile nothing is written
                weights += (_tile(values_at, indices_ptr + lane, at, mask, EVEN, WARPS),)
        if UNROLL > 1:
            tl.debug_barrier()  # without it the compiler delays loads that are not needed at once
        for ahead in tl.static_range(UNROLL):
            strip, mask = _place(block * UNROLL + ahead, warp, strips, EVEN, WARPS)
            added = ()
            for eight in tl.static_range(TOKENS // 8):
                b0 = _inputs(tl.load(x_at[eight] + 32 * strip[:, None]), odd, WARPS, INTERPRETED)
                b1 = _inputs(tl.load(x_at[eight] + 32 * strip[:, None] + 16), odd, WARPS, INTERPRETED)
                for turn in tl.static_range(TILES):
                    given = sums[TILES * eight + turn], weights[TILES * ahead + turn]
                    added += (_two_products(given[0], given[1], b0, b1, BFLOAT16, WARPS, INTERPRETED),)
            sums = added
    for eight in tl.static_range(TOKENS // 8):
        for turn in tl.static_range(TILES):
            _store(sums[TILES * eight + turn], bias_ptr, out_ptr, tile + turn, 8 * eight, tokens, rows, HAS_BIAS, WARPS)


@triton.jit
def expand_kernel(values_ptr, indices_ptr, out_ptr, rows, columns, strips, WARPS: tl.constexpr):  # fmt: skip
    """Restore the dense matrix; each warp expands one strip of a tile, each lane two groups of four of its rows.

    Args:
        values_ptr: `Compressed.values`, as int32, two numbers each.
        indices_ptr: `Compressed.indices`.
        out_ptr: Dense matrix, (O, I), of 16-bit numbers as int32, two each.
        rows: O.
        columns: I.
        strips: Number of strips of a tile.
        WARPS: Warps of a program.
    """
    place = tl.arange(0, 32 * WARPS)
    lane, tile = place % 32, tl.program_id(0)
    strip = tl.program_id(1) * WARPS + place // 32
    base = tile * strips + strip
    step, u, k = lane % 8 // 4, lane % 4 // 2, lane % 2  # of the lane's groups 8 step + 4 u + 2 k + v, v = 0, 1
    word = (32 * strip + 4 * (lane % 8))[:, None] + tl.arange(0, 4)[None, :]
    for turn in tl.static_range(4):
        row = 4 * turn + lane // 8
        half, g = row // 8, row % 8
        here = (strip < strips) & (16 * tile + row < rows)
        nibbles = tl.load(indices_ptr + 32 * base + 4 * g + 2 * step + k, mask=here, other=0) >> (16 * half + 4 * u)
        at = values_ptr + 256 * base + 128 * step + 4 * (4 * g + u) + 2 * k + half
        w0, w1 = _words(nibbles & 15, tl.load(at, mask=here, other=0))
        w2, w3 = _words(nibbles >> 8 & 15, tl.load(at + 8, mask=here, other=0))
        words = tl.reshape(_four_in_order(w0, w1, w2, w3), (32 * WARPS, 4))
        out_at = out_ptr + (16 * tile + row).to(tl.int64)[:, None] * (columns // 2) + word
        tl.store(out_at, words, mask=here[:, None] & (word < columns // 2))


@triton.jit
def _words(nibble, both):
    """Return the four 16-bit numbers of a group, two in each of two words, of which `both` has the two that are stored."""
    w0, w1, w2, w3 = _places(nibble, both & 0xFFFF, both >> 16 & 0xFFFF)
    return w0 | w1 << 16, w2 | w3 << 16

"""Triton kernels on matrices in lanes (lanes.py): multiply with up to 8 tokens, and restore the dense matrix.

A lane keeps the sums of its part of a row in registers. For each entry it moves on by a step and reads the inputs of that
column from the cache; lanes of a warp are near each other, so that these are in a few lines. Tensors have one element for each
lane of a program, so that an element is a register. Parts are added at the end, always in the same order.

With ``TRITON_INTERPRET=1`` the kernels run on CPU tensors, by the same operations.
"""

import triton
import triton.language as tl

from functional.launches_triton import wait_before_inputs, wait_before_weights
from functional.words_triton import four_words, two_numbers


@triton.jit
def _inputs(x_ptr, column, TOKENS: tl.constexpr, BFLOAT16: tl.constexpr, LANES: tl.constexpr):
    """Load the inputs of each lane's column: TOKENS of (lanes,), float32."""
    if TOKENS == 1:
        found = (tl.load(x_ptr + column).to(tl.float32),)
    elif TOKENS == 2:
        found = two_numbers(tl.load(x_ptr + column), BFLOAT16)
    elif TOKENS == 4:
        w0, w1 = tl.split(tl.load(x_ptr + (2 * column)[:, None] + tl.arange(0, 2)[None, :]))
        a, b = two_numbers(w0, BFLOAT16)
        c, d = two_numbers(w1, BFLOAT16)
        found = (a, b, c, d)
    else:
        w0, w1, w2, w3 = four_words(tl.load(x_ptr + (4 * column)[:, None] + tl.arange(0, 4)[None, :]), LANES)
        a, b = two_numbers(w0, BFLOAT16)
        c, d = two_numbers(w1, BFLOAT16)
        e, f = two_numbers(w2, BFLOAT16)
        g, h = two_numbers(w3, BFLOAT16)
        found = (a, b, c, d, e, f, g, h)
    return found


@triton.jit(do_not_specialize=["tokens", "rows", "constant"])
def decode_kernel(
    x_ptr, values_ptr, steps_ptr, firsts_ptr, starts_ptr, order_ptr, bias_ptr, out_ptr, tokens, rows, constant,
    HAS_BIAS: tl.constexpr, BFLOAT16: tl.constexpr, TOKENS: tl.constexpr, HEIGHT: tl.constexpr, PARTS: tl.constexpr,
    UNROLL: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Multiply a slice with up to TOKENS tokens.

    Args:
        x_ptr: Inputs by columns, (I, TOKENS), as int32, two tokens each; for one token (I,), of the matrix's dtype.
        values_ptr: `Lanes.values`, as int32, two numbers each.
        steps_ptr: `Lanes.steps`.
        firsts_ptr: `Lanes.firsts`.
        starts_ptr: `Lanes.starts`.
        order_ptr: `Lanes.order`.
        bias_ptr: Bias, (O,); not read without HAS_BIAS.
        out_ptr: Result, (tokens, O).
        tokens: Number of tokens.
        rows: O.
        constant: Whether weights may be read before the kernel waits for the one ahead.
        HAS_BIAS: Whether a bias is added.
        BFLOAT16: Whether numbers are bfloat16; if not, float16.
        TOKENS: 1, 2, 4 or 8, at least `tokens`.
        HEIGHT: H.
        PARTS: P.
        UNROLL: Chunks on their way into the registers of a lane at a time.
        OVERLAPS: Whether the GPU can launch kernels early.
    """
    wait_before_weights(constant, OVERLAPS)
    LANES: tl.constexpr = HEIGHT * PARTS
    lane, four = tl.arange(0, LANES), tl.arange(0, 4)[None, :]
    part, piece = lane // HEIGHT, tl.program_id(0)
    start = tl.load(starts_ptr + piece)
    chunks = tl.load(starts_ptr + piece + 1) - start
    column = tl.load(firsts_ptr + piece * LANES + lane).to(tl.int32)
    count = chunks // PARTS + (part < chunks % PARTS).to(tl.int32)
    values_at = values_ptr + (start.to(tl.int64) * (4 * HEIGHT) + 4 * lane)[:, None] + four
    steps_at = steps_ptr + (start.to(tl.int64) * HEIGHT + lane)
    zero = tl.zeros((LANES,), tl.float32)
    sums = (zero,)
    for _ in tl.static_range(TOKENS - 1):
        sums += (zero,)
    for block in range(0, tl.cdiv(tl.cdiv(chunks, PARTS), UNROLL)):
        words, steps = (), ()
        for ahead in tl.static_range(UNROLL):
            chunk = block * UNROLL + ahead
            here = chunk < count
            at = values_at + chunk * (4 * LANES)
            words += (tl.load(at, mask=here[:, None], other=0, eviction_policy="evict_first"),)
            steps += (tl.load(steps_at + chunk * LANES, mask=here, other=0, eviction_policy="evict_first"),)
        wait_before_inputs(OVERLAPS)
        if UNROLL > 1:
            tl.debug_barrier()  # without it the compiler delays loads that are not needed at once
        for ahead in tl.static_range(UNROLL):
            x = ()
            for entry in tl.static_range(8):
                column += steps[ahead] >> (4 * entry) & 15
                x += (_inputs(x_ptr, column, TOKENS, BFLOAT16, LANES),)
            w0, w1, w2, w3 = four_words(words[ahead], LANES)
            pairs = (w0, w1, w2, w3)
            for pair in tl.static_range(4):
                low, high = two_numbers(pairs[pair], BFLOAT16)
                added = ()
                for token in tl.static_range(TOKENS):
                    added += (sums[token] + low * x[2 * pair][token] + high * x[2 * pair + 1][token],)
                sums = added
    wait_before_inputs(OVERLAPS)  # a slice without chunks has not waited
    row = tl.load(order_ptr + piece * HEIGHT + tl.arange(0, HEIGHT))
    for token in tl.static_range(TOKENS):
        y = tl.sum(tl.reshape(sums[token], (PARTS, HEIGHT)), 0)
        if HAS_BIAS:
            y += tl.load(bias_ptr + row, mask=row < rows, other=0).to(tl.float32)
        tl.store(out_ptr + token * rows + row, y.to(out_ptr.dtype.element_ty), mask=(row < rows) & (token < tokens))


@triton.jit
def expand_kernel(
    values_ptr, steps_ptr, firsts_ptr, starts_ptr, order_ptr, out_ptr, rows, columns,
    EVEN: tl.constexpr, HEIGHT: tl.constexpr, PARTS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write the entries of a slice into a dense matrix of zeros.

    A lane gathers the entries of eight columns, a window, in four registers, and stores them together when it leaves the
    window, since 16 bytes take a GPU as long as 2. Lanes share their first and last windows with others, so there they store
    entries one by one; all of them if the matrix is not EVEN.

    Args:
        values_ptr: `Lanes.values`, as int32, two numbers each.
        steps_ptr: `Lanes.steps`.
        firsts_ptr: `Lanes.firsts`.
        starts_ptr: `Lanes.starts`.
        order_ptr: `Lanes.order`.
        out_ptr: Matrix of zeros, (O, I), of 16-bit numbers as int16.
        rows: O.
        columns: I.
        EVEN: Whether 8 divides I.
        HEIGHT: H.
        PARTS: P.
        INTERPRETED: Whether Triton's interpreter runs the kernel.
    """
    LANES: tl.constexpr = HEIGHT * PARTS
    lane, four = tl.arange(0, LANES), tl.arange(0, 4)[None, :]
    part, piece = lane // HEIGHT, tl.program_id(0)
    start = tl.load(starts_ptr + piece)
    chunks = tl.load(starts_ptr + piece + 1) - start
    column = tl.load(firsts_ptr + piece * LANES + lane).to(tl.int32)
    row = tl.load(order_ptr + piece * HEIGHT + lane % HEIGHT)
    count = tl.where(row < rows, chunks // PARTS + (part < chunks % PARTS).to(tl.int32), 0)
    out_at = out_ptr + row.to(tl.int64) * columns
    words_at = values_ptr + (start.to(tl.int64) * (4 * HEIGHT) + 4 * lane)[:, None] + four
    steps_at = steps_ptr + (start.to(tl.int64) * HEIGHT + lane)
    next_words = tl.load(words_at, mask=(count > 0)[:, None], other=0)
    next_steps = tl.load(steps_at, mask=count > 0, other=0)
    first, window, here = column & -8, column & -8, column
    for entry in tl.static_range(8 if EVEN else 0):  # those of the first window are in the first chunk
        here += next_steps >> (4 * entry) & 15
        number = _entry(four_words(next_words, LANES), entry)
        tl.store(out_at + here, number.to(tl.int16), mask=(number != 0) & ((here & -8) == first))
    zero = tl.zeros((LANES,), tl.int32)
    a0, a1, a2, a3 = zero, zero, zero, zero
    for chunk in range(0, tl.cdiv(chunks, PARTS)):
        words, steps, following = four_words(next_words, LANES), next_steps, chunk + 1
        next_words = tl.load(words_at + following * (4 * LANES), mask=(following < count)[:, None], other=0)
        next_steps = tl.load(steps_at + following * LANES, mask=following < count, other=0)
        for entry in tl.static_range(8):
            column += steps >> (4 * entry) & 15  # past the last chunk steps and values are 0
            number = _entry(words, entry)
            if EVEN:
                kept = _store_left(out_at, window, column & -8, first, (a0, a1, a2, a3), INTERPRETED)
                window, placed = column & -8, number << 16 * (column & 1)
                a0 = a0 & kept | tl.where((column & 6) == 0, placed, 0)
                a1 = a1 & kept | tl.where((column & 6) == 2, placed, 0)
                a2 = a2 & kept | tl.where((column & 6) == 4, placed, 0)
                a3 = a3 & kept | tl.where((column & 6) == 6, placed, 0)
            else:
                tl.store(out_at + column, number.to(tl.int16), mask=number != 0)
    if EVEN:
        for place in tl.static_range(8):
            number = _entry((a0, a1, a2, a3), place)
            tl.store(out_at + window + place, number.to(tl.int16), mask=number != 0)


@triton.jit
def _entry(words, entry: tl.constexpr):
    """Return one of the eight numbers of four registers, as the lower half of 32 bits."""
    return words[entry // 2] >> 16 & 0xFFFF if entry % 2 else words[entry // 2] & 0xFFFF


@triton.jit
def _store_left(out_at, window, following, first, words, INTERPRETED: tl.constexpr):
    """Store a window that a lane leaves, 16 bytes, if it is not its first; return 0 for lanes that leave one, otherwise -1."""
    at = (out_at + window).to(tl.pointer_type(tl.int32))
    if INTERPRETED:
        for word in tl.static_range(4):
            tl.store(at + word, words[word], mask=(window != following) & (window != first))
        return tl.where(window == following, -1, 0)
    return tl.inline_asm_elementwise(
        """{ .reg .pred left, stored;
        setp.ne.s32 left, $1, $2; setp.ne.and.s32 stored, $1, $3, left;
        @stored st.global.v4.b32 [$4], {$5, $6, $7, $8};
        selp.b32 $0, 0, -1, left; }""",
        "=r,r,r,r,l,r,r,r,r", [window, following, first, at.to(tl.int64), words[0], words[1], words[2], words[3]],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip

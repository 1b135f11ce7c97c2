"""Triton kernels on matrices in lanes (lanes.py): multiply with up to 8 tokens, and restore the dense matrix.

A lane keeps the sums of its part of a row in registers. For each entry it moves on by a step and reads the inputs of that
column from the cache; lanes of a warp are near each other, so that these are in a few lines. Tensors have one element for each
lane of a program, so that an element is a register. Parts are added at the end, always in the same order.

With ``TRITON_INTERPRET=1`` the kernels run on CPU tensors, by the same operations.
"""

import triton
import triton.language as tl

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


@triton.jit(do_not_specialize=["tokens", "rows"])
def decode_kernel(
    x_ptr, values_ptr, steps_ptr, firsts_ptr, starts_ptr, order_ptr, bias_ptr, out_ptr, tokens, rows,
    HAS_BIAS: tl.constexpr, BFLOAT16: tl.constexpr, TOKENS: tl.constexpr, HEIGHT: tl.constexpr, PARTS: tl.constexpr,
    UNROLL: tl.constexpr,
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
        HAS_BIAS: Whether a bias is added.
        BFLOAT16: Whether numbers are bfloat16; if not, float16.
        TOKENS: 1, 2, 4 or 8, at least `tokens`.
        HEIGHT: H.
        PARTS: P.
        UNROLL: Chunks on their way into the registers of a lane at a time.
    """
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
    row = tl.load(order_ptr + piece * HEIGHT + tl.arange(0, HEIGHT))
    for token in tl.static_range(TOKENS):
        y = tl.sum(tl.reshape(sums[token], (PARTS, HEIGHT)), 0)
        if HAS_BIAS:
            y += tl.load(bias_ptr + row, mask=row < rows, other=0).to(tl.float32)
        tl.store(out_ptr + token * rows + row, y.to(out_ptr.dtype.element_ty), mask=(row < rows) & (token < tokens))


@triton.jit
def expand_kernel(
    values_ptr, steps_ptr, firsts_ptr, starts_ptr, order_ptr, out_ptr, rows, columns,
    HEIGHT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write the entries of a slice into a dense matrix of zeros.

    Args:
        values_ptr: `Lanes.values`, as int32, two numbers each.
        steps_ptr: `Lanes.steps`.
        firsts_ptr: `Lanes.firsts`.
        starts_ptr: `Lanes.starts`.
        order_ptr: `Lanes.order`.
        out_ptr: Matrix, (O, I), of 16-bit numbers as int16.
        rows: O.
        columns: I.
        HEIGHT: H.
        PARTS: P.
    """
    LANES: tl.constexpr = HEIGHT * PARTS
    lane = tl.arange(0, LANES)
    part, piece = lane // HEIGHT, tl.program_id(0)
    start = tl.load(starts_ptr + piece)
    chunks = tl.load(starts_ptr + piece + 1) - start
    column = tl.load(firsts_ptr + piece * LANES + lane).to(tl.int32)
    count = chunks // PARTS + (part < chunks % PARTS).to(tl.int32)
    row = tl.load(order_ptr + piece * HEIGHT + lane % HEIGHT)
    out_at = out_ptr + row.to(tl.int64) * columns
    for chunk in range(0, tl.cdiv(chunks, PARTS)):
        here = (chunk < count) & (row < rows)
        at = (start + chunk * PARTS + part).to(tl.int64) * HEIGHT + lane % HEIGHT
        steps = tl.load(steps_ptr + at, mask=here, other=0)
        for entry in tl.static_range(8):
            word = tl.load(values_ptr + at * 4 + entry // 2, mask=here, other=0)
            value = (word >> (16 * (entry % 2))).to(tl.int16)
            column += steps >> (4 * entry) & 15
            tl.store(out_at + column, value, mask=here & (value != 0))

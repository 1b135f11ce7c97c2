"""Triton kernels on compressed 2:4 weights: times one token, times up to sixteen, and back to the dense matrix.

All are bound by memory: a program takes a tile of index bytes and the four tiles of values that these belong to, all of them
consecutive in memory, and puts them together in registers. Run on CPU tensors too under ``TRITON_INTERPRET=1``.

Letters: `rows` O, `width` I / 8 bytes of a row, ROWS and BYTES the tile, EVEN whether BYTES divides `width`. Rows past the last
are read as the last one, and not written: this needs no mask. Tokens past the last are not read: when they were, as the last,
four tokens took longer than sixteen.
"""

import triton
import triton.language as tl

COUNTS = ["tokens", "blocks_of_split", "splits"]
"""Not compiled anew where they happen to be 1 or a multiple of 16."""


@triton.jit
def _load(ptr, mask, EVEN: tl.constexpr):
    return tl.load(ptr) if EVEN else tl.load(ptr, mask=mask, other=0)


@triton.jit
def _places(nibble, first_value, second_value):
    """What stands at each of the four positions; the first index is at most 2, the second at least 1 and larger."""
    first, second = nibble & 3, nibble & 12
    nothing = tl.zeros(first_value.shape, first_value.dtype)
    w0 = tl.where(first == 0, first_value, nothing)
    w1 = tl.where(first == 1, first_value, tl.where(second == 1 << 2, second_value, nothing))
    w2 = tl.where(first == 2, first_value, tl.where(second == 2 << 2, second_value, nothing))
    w3 = tl.where(second == 3 << 2, second_value, nothing)
    return w0, w1, w2, w3


@triton.jit
def _places_of_two(nibbles, first_values, second_values):
    """The same for two groups in the halves of 32 bits, with half of the instructions: each bit of an index becomes a mask."""
    b0, b1 = (nibbles & 0x10001) * 0xFFFF, (nibbles >> 1 & 0x10001) * 0xFFFF
    c0, c1 = (nibbles >> 2 & 0x10001) * 0xFFFF, (nibbles >> 3 & 0x10001) * 0xFFFF
    w0 = first_values & ~(b0 | b1)
    w1 = (first_values & b0) | (second_values & c0 & ~c1)
    w2 = (first_values & b1) | (second_values & c1 & ~c0)
    w3 = second_values & c0 & c1
    return w0, w1, w2, w3


@triton.jit
def _add_product(y, x, index, first_values, second_values, TOKENS: tl.constexpr, SIZE: tl.constexpr, WIDEN: tl.constexpr):
    """y + x times groups that come one by one: x (TOKENS, 4 SIZE), the others (SIZE, rows)."""
    if WIDEN:
        first_values, second_values, x = first_values.to(tl.float32), second_values.to(tl.float32), x.to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (TOKENS, SIZE, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    w0, w1, w2, w3 = _places(index, first_values, second_values)
    y = tl.dot(x0, w0, y, input_precision="ieee")
    y = tl.dot(x1, w1, y, input_precision="ieee")
    y = tl.dot(x2, w2, y, input_precision="ieee")
    return tl.dot(x3, w3, y, input_precision="ieee")


@triton.jit
def _add_product_of_two(
    y, x, index, first_values, second_values, TOKENS: tl.constexpr, SIZE: tl.constexpr, WIDEN: tl.constexpr
):
    """y + x times groups that come by twos: x (TOKENS, 8 SIZE), the others (SIZE, rows)."""
    even, odd = tl.split(tl.reshape(x, (TOKENS, SIZE, 2, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    w0, w1, w2, w3 = _places_of_two(index, first_values, second_values)
    y = _dot_of_two(x0, w0, y, WIDEN)
    y = _dot_of_two(x1, w1, y, WIDEN)
    y = _dot_of_two(x2, w2, y, WIDEN)
    return _dot_of_two(x3, w3, y, WIDEN)


@triton.jit
def _dot_of_two(x, both, y, WIDEN: tl.constexpr):
    """The lower 16 bits of `both` belong to the groups of even, the upper ones to those of odd number."""
    x_low, x_high = tl.split(x)
    low, high = both.to(tl.int16).to(x.dtype, bitcast=True), (both >> 16).to(tl.int16).to(x.dtype, bitcast=True)
    if WIDEN:
        x_low, x_high, low, high = x_low.to(tl.float32), x_high.to(tl.float32), low.to(tl.float32), high.to(tl.float32)
    y = tl.dot(x_low, low, y)
    return tl.dot(x_high, high, y)


@triton.jit(do_not_specialize=COUNTS)
def token_kernel(
    x_ptr, first_ptr, second_ptr, indices_ptr, bias_ptr, out_ptr, rows, width, blocks_of_split,
    HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, BYTES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One token: the two inputs that a group's values want are chosen, no tensor core is needed."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    read = tl.minimum(row, rows - 1).to(tl.int64)[:, None]
    column, four = tl.arange(0, BYTES), tl.arange(0, 4 * BYTES)
    index_at = indices_ptr + read * width
    first_at, second_at = first_ptr + read * (2 * width), second_ptr + read * (2 * width)
    total = tl.zeros((ROWS, BYTES), tl.float32)
    begin = split * blocks_of_split
    end = tl.minimum(begin + blocks_of_split, tl.cdiv(width, BYTES))
    for block in tl.range(begin, end, num_stages=STAGES):
        at = block * BYTES + column
        inside = (at < width)[None, :]
        at = at[None, :]
        byte = _load(index_at + at, inside, EVEN).to(tl.int32)
        fours = 4 * block * BYTES + four
        for half in tl.static_range(2):
            first_value = _load(first_at + half * width + at, inside, EVEN).to(tl.float32)
            second_value = _load(second_at + half * width + at, inside, EVEN).to(tl.float32)
            x = _load(x_ptr + 4 * half * width + fours, fours < 4 * width, EVEN).to(tl.float32)
            even, odd = tl.split(tl.reshape(x, (BYTES, 2, 2)))
            x0, x2 = tl.split(even)
            x1, x3 = tl.split(odd)
            # Single bits tell: the first index is 0, 1 or 2, the second 1, 2 or 3.
            b0, b1 = byte & (1 << 4 * half) != 0, byte & (2 << 4 * half) != 0
            c0, c1 = byte & (4 << 4 * half) != 0, byte & (8 << 4 * half) != 0
            total += first_value * tl.where(b1, x2[None, :], tl.where(b0, x1[None, :], x0[None, :]))
            total += second_value * tl.where(c0, tl.where(c1, x3[None, :], x1[None, :]), x2[None, :])
    y = tl.sum(total, 1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=row < rows, other=0).to(tl.float32)
    out_at = out_ptr + row
    if PARTIAL:
        out_at += split * rows
    tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=COUNTS)
def tokens_kernel(
    x_ptr, first_ptr, second_ptr, indices_ptr, bias_ptr, out_ptr, tokens, rows, width, blocks_of_split,
    HAS_BIAS: tl.constexpr, PARTIAL: tl.constexpr, EVEN: tl.constexpr, BY_TWO: tl.constexpr,
    ROWS: tl.constexpr, BYTES: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Up to TOKENS tokens: the weights of each position of the groups make a dense tile for the tensor cores.

    With BY_TWO, for 16 bits and an even `width`, values come as int32, those of two groups each, and index bytes as int16.
    WIDEN is for Triton's interpreter, whose product takes the bits of bfloat16 for integers.
    """
    STEP: tl.constexpr = 2 if BY_TWO else 1
    SIZE: tl.constexpr = BYTES // STEP
    length = width // STEP
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    token = tl.arange(0, TOKENS)
    read = tl.minimum(row, rows - 1).to(tl.int64)[None, :]
    column, four = tl.arange(0, SIZE), tl.arange(0, 4 * BYTES)
    x_at = x_ptr + token[:, None] * (8 * width)
    there = (token < tokens)[:, None]
    # Tiles lie as (SIZE, ROWS), as the product wants them; bytes of a row are still consecutive in memory.
    index_at = indices_ptr + read * length
    first_at, second_at = first_ptr + read * (2 * length), second_ptr + read * (2 * length)
    y = tl.zeros((TOKENS, ROWS), tl.float32)
    begin = split * blocks_of_split
    end = tl.minimum(begin + blocks_of_split, tl.cdiv(width, BYTES))
    for block in tl.range(begin, end, num_stages=STAGES):
        at = block * SIZE + column
        inside = (at < length)[:, None]
        at = at[:, None]
        index = _load(index_at + at, inside, EVEN).to(tl.int32)
        if BY_TWO:
            index = index & 0xFFFF
            index = index | index << 8  # the first byte in the lower half, the second in the upper
        fours = 4 * block * BYTES + four
        for half in tl.static_range(2):
            first_values = _load(first_at + half * length + at, inside, EVEN)
            second_values = _load(second_at + half * length + at, inside, EVEN)
            known = there if EVEN else there & (fours < 4 * width)[None, :]
            x = tl.load(x_at + (4 * half * width + fours)[None, :], mask=known, other=0)
            if BY_TWO:
                y = _add_product_of_two(y, x, index >> 4 * half, first_values, second_values, TOKENS, SIZE, WIDEN)
            else:
                y = _add_product(y, x, (index >> 4 * half) & 15, first_values, second_values, TOKENS, SIZE, WIDEN)
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=row < rows, other=0).to(tl.float32)[None, :]
    out_at = out_ptr + token[:, None] * rows + row[None, :]
    if PARTIAL:
        out_at += split * tokens * rows
    tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=there & (row < rows)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def sum_kernel(
    partial_ptr, bias_ptr, out_ptr, numel, rows, splits,
    HAS_BIAS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Sum over the splits, always in the same order; bias; rounding."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    y = tl.zeros((SIZE,), tl.float32)
    for split in range(splits):
        y += tl.load(partial_ptr + split * numel + at, mask=at < numel, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + at % rows, mask=at < numel, other=0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=at < numel)


@triton.jit
def expand_kernel(
    first_ptr, second_ptr, indices_ptr, out_ptr, rows, width,
    ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """The dense matrix, (O, I)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    block = tl.program_id(1)
    column, four = tl.arange(0, BYTES), tl.arange(0, 4 * BYTES)
    read = tl.minimum(row, rows - 1).to(tl.int64)
    at = (block * BYTES + column)[None, :]
    inside = at < width
    byte = tl.load(indices_ptr + read * width + at, mask=inside, other=0).to(tl.int32)
    first_at, second_at = first_ptr + read * (2 * width) + at, second_ptr + read * (2 * width) + at
    fours = (4 * block * BYTES + four)[None, :]
    out_at = out_ptr + read * (8 * width) + fours
    for half in tl.static_range(2):
        first_value = tl.load(first_at + half * width, mask=inside, other=0)
        second_value = tl.load(second_at + half * width, mask=inside, other=0)
        w0, w1, w2, w3 = _places((byte >> 4 * half) & 15, first_value, second_value)
        dense = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, 4 * BYTES))
        tl.store(out_at + 4 * half * width, dense, mask=(fours < 4 * width) & (row < rows))

"""Parts of Triton kernels on compressed 2:4 weights: what the lanes of a warp do together.

Tensors have one element for each thread of a program, so that an element is a register. Only so can kernels call instructions
of a whole warp, which Triton does not know. With ``TRITON_INTERPRET=1`` plain operations replace them (INTERPRETED).
"""

import triton
import triton.language as tl

from functional.words_triton import four_words, two_numbers


@triton.jit
def places(nibble, first_value, second_value):
    """Return the values at the four positions; the first index is at most 2, the second at least 1 and larger.

    Args:
        nibble: Both indices, the second one from bit 2 on.
        first_value: Value at the first index.
        second_value: Value at the second index.
    """
    first, second = nibble & 3, nibble & 12
    nothing = tl.zeros(first_value.shape, first_value.dtype)
    w0 = tl.where(first == 0, first_value, nothing)
    w1 = tl.where(first == 1, first_value, tl.where(second == 1 << 2, second_value, nothing))
    w2 = tl.where(first == 2, first_value, tl.where(second == 2 << 2, second_value, nothing))
    w3 = tl.where(second == 3 << 2, second_value, nothing)
    return w0, w1, w2, w3


@triton.jit
def four_in_order(w0, w1, w2, w3):
    """Join four tensors of one shape to (..., 2, 2); the last two axes flatten to their order.

    Args:
        w0: First tensor.
        w1: Second tensor.
        w2: Third tensor.
        w3: Fourth tensor.
    """
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def product(sums, a, b, index, STEP: tl.constexpr, BFLOAT16: tl.constexpr):
    """Return sums + a (16 rows, 32 inputs, 2:4) times b (32 inputs, 8 tokens), spread over the lanes of each warp.

    Args:
        sums: Four registers of float32.
        a: Four registers of a's values.
        b: Four registers of b.
        index: Nibbles of a, of both steps.
        STEP: Which step of the strip, 0 or 1.
        BFLOAT16: Whether numbers are bfloat16; if not, float16.
    """
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
    w0, w1, w2, w3 = places(nibbles0, first0, second0)
    left = tl.reshape(four_in_order(w0, w1, w2, w3), (WARPS, 8, 16))
    w0, w1, w2, w3 = places(nibbles1, first1, second1)
    right = tl.reshape(four_in_order(w0, w1, w2, w3), (WARPS, 8, 16))
    return tl.reshape(tl.permute(tl.join(left, right), (0, 1, 3, 2)), (WARPS, 8, 32))


@triton.jit
def product_by_plain_operations(
    sums, a, b, index, STEP: tl.constexpr, BFLOAT16: tl.constexpr, WARPS: tl.constexpr
):  # fmt: skip
    """Compute the same as `product`.

    Args:
        sums: Four registers of float32.
        a: Four registers of a's values.
        b: Four registers of b.
        index: Nibbles of a, of both steps.
        STEP: Which step of the strip, 0 or 1.
        BFLOAT16: Whether numbers are bfloat16; if not, float16.
        WARPS: Warps of the program.
    """
    low0, high0 = two_numbers(b[0], BFLOAT16)
    low1, high1 = two_numbers(b[1], BFLOAT16)
    low2, high2 = two_numbers(b[2], BFLOAT16)
    low3, high3 = two_numbers(b[3], BFLOAT16)
    words = tl.join(four_in_order(low0, low1, low2, low3), four_in_order(high0, high1, high2, high3))
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
def inputs(words, odd, WARPS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Bring the inputs of a step into the order of groups of compress.py.

    Lane t of four has loaded groups 2 t and 2 t + 1 of a token's 32 inputs. Afterwards register i of lanes 2 u and 2 u + 1 has
    the two halves of group 4 u + i.

    Args:
        words: 16 bytes of each thread, (threads, 4).
        odd: Whether the number of a thread's lane is odd.
        WARPS: Warps of the program.
        INTERPRETED: Whether plain operations take the place of instructions.
    """
    w0, w1, w2, w3 = four_words(words, 32 * WARPS)
    other0 = _of_neighbour(tl.where(odd, w0, w1), WARPS, INTERPRETED)
    other1 = _of_neighbour(tl.where(odd, w2, w3), WARPS, INTERPRETED)
    return tl.where(odd, other0, w0), tl.where(odd, other1, w2), tl.where(odd, w1, other0), tl.where(odd, w3, other1)

"""Parts of Triton kernels that read numbers of 16 bit as words of 32."""

import triton
import triton.language as tl


@triton.jit
def two_numbers(words, BFLOAT16: tl.constexpr):
    """Return the lower and the upper half of 32 bits as float32; halves are bfloat16 or float16."""
    if BFLOAT16:
        return (words << 16).to(tl.float32, bitcast=True), (words >> 16 << 16).to(tl.float32, bitcast=True)
    low, high = words.to(tl.int16).to(tl.float16, bitcast=True), (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def four_words(words, THREADS: tl.constexpr):
    """Split (threads, 4), 16 bytes of each thread, into four registers."""
    even, odd = tl.split(tl.reshape(words, (THREADS, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3

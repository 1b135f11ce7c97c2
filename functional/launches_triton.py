"""Parts of Triton kernels that begin before the kernel ahead of them has ended (launches.py)."""

import triton
import triton.language as tl


@triton.jit
def wait_before_weights(constant, OVERLAPS: tl.constexpr):
    """Wait until all kernels ahead have ended, unless none of them writes weights.

    Args:
        constant: Whether none does.
        OVERLAPS: Whether the GPU can launch a kernel before the one ahead has ended.
    """
    if OVERLAPS:
        if constant == 0:
            tl.extra.cuda.gdc_wait()


@triton.jit
def wait_before_inputs(OVERLAPS: tl.constexpr):
    """Wait until all kernels ahead have ended, so that what they write can be read, and what they read be written.

    Args:
        OVERLAPS: Whether the GPU can launch a kernel before the one ahead has ended.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()

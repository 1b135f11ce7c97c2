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
    if OVERLAPS and constant == 0:
        _wait()


@triton.jit
def wait_before_inputs(OVERLAPS: tl.constexpr):
    """Wait until all kernels ahead have ended, so that what they write can be read, and what they read be written.

    Args:
        OVERLAPS: Whether the GPU can launch a kernel before the one ahead has ended.
    """
    if OVERLAPS:
        _wait()


@triton.jit
def _wait():
    """Do as `tl.extra.cuda.gdc_wait`, which Triton 3.4 cannot compile; a wait that is over costs nothing."""
    tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)

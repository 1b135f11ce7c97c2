"""Parts of Triton kernels that are launched early (launches.py)."""

import triton
import triton.language as tl


@triton.jit
def wait_before_weights(constant, OVERLAPS: tl.constexpr):
    """Wait until what all kernels ahead wrote can be read, unless weights are constant.

    Args:
        constant: Whether they are.
        OVERLAPS: Whether the GPU can launch kernels early.
    """
    if OVERLAPS and constant == 0:
        _wait()


@triton.jit
def wait_before_inputs(OVERLAPS: tl.constexpr):
    """Wait until what all kernels ahead wrote can be read, and what they read can be written.

    Args:
        OVERLAPS: Whether the GPU can launch kernels early.
    """
    if OVERLAPS:
        _wait()


@triton.jit
def _wait():
    """Do as `tl.extra.cuda.gdc_wait`, which Triton 3.4 cannot compile; a wait that is over costs nothing."""
    tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)

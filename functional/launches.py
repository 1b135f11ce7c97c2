"""Launch a kernel early: programmatic dependent launch (CUDA C++ programming guide).

A product of a few tokens waits for its weights, and these are there before its inputs are. In a CUDA graph its kernel starts as
soon as the last program of the kernel ahead has ended, asks for its first weights, and only then waits until what that kernel
wrote can be read (launches_triton.py). So the launch and the first loads take less time of their own. Outside of a graph the
kernel ahead may be what writes the weights, such as a copy; there the kernel waits first, and gains only the launch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST_CAPABILITY = (9, 0)


def overlapping(x: Tensor, weights: Sequence[Tensor], read: Sequence[Tensor]) -> tuple[bool, dict[str, bool]]:
    """Return whether a kernel may read its weights before it waits, and the options of its launch.

    Call it where the current device is that of the launch.

    Args:
        x: Input of the kernel.
        weights: Weights of the kernel. In a CUDA graph they are taken for constant: no kernel of the graph may write them.
        read: The tensors that the kernel reads: the weights, or copies that were made just before.

    Returns:
        The argument `constant`, and the options OVERLAPS and `launch_pdl`.
    """
    able = x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= LEAST_CAPABILITY
    constant = all(part.data_ptr() == copy.data_ptr() for part, copy in zip(weights, read, strict=True))
    return able and constant and torch.cuda.is_current_stream_capturing(), {"OVERLAPS": able, "launch_pdl": able}

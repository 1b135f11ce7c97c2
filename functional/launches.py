"""Launch a kernel before the one ahead of it has ended: programmatic dependent launch (CUDA C++ programming guide).

A product of a few tokens waits for its weights. They are there before its inputs are: in a CUDA graph the kernel begins while
the last programs of the kernel ahead still run, asks for its first weights, and waits for that kernel only then
(launches_triton.py). Outside of a graph the kernel ahead may be what writes the weights, such as a copy; there the kernel waits
first, and saves the launch alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST_CAPABILITY = (9, 0)


def overlapping(x: Tensor, weights: Sequence[Tensor], read: Sequence[Tensor]) -> tuple[bool, dict[str, bool]]:
    """Return what a kernel and its launch need for it.

    Args:
        x: Input of the kernel.
        weights: Weights of the kernel. In a CUDA graph they are taken for constant: no kernel of it writes them.
        read: The same as the kernel reads them; perhaps copies, which a kernel makes.

    Returns:
        Whether the kernel may read weights before it waits; and its options OVERLAPS and `launch_pdl`.
    """
    able = x.is_cuda and torch.cuda.get_device_capability(x.device) >= LEAST_CAPABILITY
    constant = all(part.data_ptr() == copy.data_ptr() for part, copy in zip(weights, read, strict=True))
    return able and constant and torch.cuda.is_current_stream_capturing(), {"OVERLAPS": able, "launch_pdl": able}

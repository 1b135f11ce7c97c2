"""Timing on a GPU without the time of launches: what is measured is captured once, and replayed.

On a CPU nothing is captured, and a function is called as it is: this tries a benchmark, the times mean little.
"""

import copy
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from lightning_modules.parts import fastest_form

COLD_BYTES = 400 * 2**20
"""Bytes of all copies of a weight: several times the L2 cache of the largest GPU."""
REPLAYS = 30


def wait() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def captured(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Capture the launches of a function, and return their replay; it is called twice before, and once while capturing."""
    if device.type == "cpu":
        return function
    function()  # compiles; the library's calls it once more before it captures
    return fastest_form.captured(function, device)


def seconds(run: Callable[[], object], device: torch.device, repeats: int = REPLAYS) -> float:
    """Return the median time of a call after a first one, on the GPU's own clock."""
    times = []
    run()
    for _ in range(repeats):
        wait()
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
    return median(times)


def cold_copies(module: nn.Module) -> list[nn.Module]:
    """Return a module and, on a GPU, copies of it, so many that the cache does not hold all of them."""
    tensors = (*module.parameters(), *module.buffers())
    if not any(tensor.is_cuda for tensor in tensors):
        return [module]
    size = sum(tensor.nbytes for tensor in tensors)
    return [module, *(copy.deepcopy(module) for _ in range(-(-COLD_BYTES // size) - 1))]

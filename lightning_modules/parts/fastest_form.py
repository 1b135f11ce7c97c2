"""Choose the fastest form of a linear by times that are measured once on a machine and kept in a file.

The file lies in ``$XDG_CACHE_HOME/d2prune``, or ``~/.cache/d2prune``: one for each device, version of torch and `KERNELS`. It
holds microseconds of forms, by shape, dtype, share of zeros and number of tokens. One that is broken, or of another machine, is
measured anew.
"""

import copy
import json
import logging
import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from utilities.files import write_json

log = logging.getLogger(__name__)

DENSE = "dense"
KERNELS = 6
"""Version of this package's kernels; raised when one changes its speed."""
GAIN = 0.95
"""Largest share of the dense time that another form may take to be chosen; times differ by less from run to run."""
STEP = 5
"""Shares of zeros are rounded to this many percent."""
COLD_BYTES = 256 * 2**20
"""Bytes of all copies of a weight while it is timed, so that no cache holds them, as none holds a whole model."""
MOST_COPIES = 2048
"""Largest number of copies of a weight: a model does not have more, and of a tiny one they would take minutes."""
SECONDS, LEAST_ROUNDS = 0.2, 5
"""Time that the forms of a linear are measured for, and how many rounds there are at least."""

Measure = Callable[[Mapping[str, nn.Module], int], dict[str, float]]


def fastest(times: Mapping[str, float]) -> str:
    """Return the fastest form; the dense one unless another takes at most `GAIN` of its time.

    Args:
        times: Form -> time of the same product.

    Examples:
        >>> fastest({"dense": 10.0, "2:4": 6.0, "unstructured": 8.0}), fastest({"dense": 10.0, "2:4": 9.9})
        ('2:4', 'dense')
    """
    found = min(times, key=times.__getitem__)
    return found if DENSE not in times or times[found] <= GAIN * times[DENSE] else DENSE


class FormTimes:
    """Times of the forms of linears on one device.

    Args:
        device: The device.
        measure: Measures modules, form -> module, with a number of tokens, and returns form -> microseconds; `measure_forms`
            when None.
    """

    def __init__(self, device: torch.device, measure: Measure | None = None) -> None:
        self.facts = {"device": device_name(device), "torch": torch.__version__, "kernels": KERNELS}
        """What the times depend on."""
        names = [re.sub(r"[^\w.+]+", "_", str(fact)) for fact in self.facts.values()]
        self.path = cache_folder() / f"linears-{'-'.join(names)}.json"
        self._measure = measure or measure_forms
        self._times = _read(self.path, self.facts)
        self._warned = False

    def of(
        self, forms: Mapping[str, Callable[[], nn.Module]], linear: nn.Linear, zeros: float, tokens: int = 1
    ) -> dict[str, float]:
        """Return the times of the forms of a linear; if one is not known, all are measured beside one another, and kept.

        Args:
            forms: Form -> what makes it of the linear.
            linear: The dense linear.
            zeros: Its share of zeros.
            tokens: Number of tokens that are multiplied at a time.

        Returns:
            Form -> microseconds.
        """
        keys = {form: key_of(form, linear, zeros, tokens) for form in forms}
        if any(key not in self._times for key in keys.values()):
            found = self._measure({form: make() for form, make in forms.items()}, tokens)
            self._times |= {keys[form]: value for form, value in found.items()}
            self._write()
        return {form: self._times[key] for form, key in keys.items()}

    def _write(self) -> None:
        self._times = _read(self.path, self.facts) | self._times  # another process may have added some
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.facts | {"microseconds": dict(sorted(self._times.items()))})
        except OSError as error:
            if not self._warned:
                log.warning(
                    "Times of linears are not kept for the next run: %s cannot be written (%s).", self.path, error.strerror
                )
            self._warned = True


def key_of(form: str, linear: nn.Linear, zeros: float, tokens: int) -> str:
    """Return the name of a time in the file: form, shape, dtype, share of zeros, number of tokens.

    Examples:
        >>> key_of("2:4", nn.Linear(64, 32), zeros=0.51, tokens=1)
        '2:4 32x64 float32, 50% zeros, tokens: 1'
    """
    rows, columns = linear.weight.shape
    dtype = str(linear.weight.dtype).removeprefix("torch.")
    return f"{form} {rows}x{columns} {dtype}, {STEP * round(100 * zeros / STEP)}% zeros, tokens: {tokens}"


def cache_folder() -> Path:
    """Return the folder of files that a later run can use, but could make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "d2prune"


def device_name(device: torch.device) -> str:
    """Return the name of a GPU; of a CPU with its instructions and number of threads, on which its times depend."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        name = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)[1]
    except (OSError, TypeError):  # another system, or none of its lines says
        name = platform.processor() or platform.machine()
    return f"{name} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"


@torch.inference_mode()
def measure_forms(modules: Mapping[str, nn.Module], tokens: int) -> dict[str, float]:
    """Return form -> median microseconds of a product; forms take turns, so that all meet the same load of the machine.

    Args:
        modules: Form -> module.
        tokens: Number of tokens that are multiplied at a time.
    """
    runs = {form: _over_copies(module, tokens) for form, module in modules.items()}
    found: dict[str, list[float]] = {form: [] for form in modules}
    for run, _ in runs.values():
        run()
    begun = time.perf_counter()
    while len(found[next(iter(found))]) < LEAST_ROUNDS or time.perf_counter() - begun < SECONDS:
        for form, (run, calls) in runs.items():
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            found[form].append(1e6 * (time.perf_counter() - start) / calls)
    return {form: median(times) for form, times in found.items()}


def _over_copies(module: nn.Module, tokens: int) -> tuple[Callable[[], Any], int]:
    """Return what runs a linear and enough copies of it on some tokens, from a CUDA graph on a GPU; and how many."""
    tensor = next(tensor for tensor in (*module.parameters(), *module.buffers()))
    size = getattr(module, "nbytes", None) or sum(parameter.nbytes for parameter in module.parameters())
    turns = [module, *(copy.deepcopy(module) for _ in range(min(math.ceil(COLD_BYTES / size), MOST_COPIES) - 1))]
    x = torch.ones(tokens, module.in_features, dtype=_dtype_of(module), device=tensor.device)

    def run() -> None:
        for turn in turns:
            turn(x)

    return captured(run, tensor.device) if tensor.is_cuda else run, len(turns)


def captured(run: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """Capture the launches of a function, which is called once before, in a CUDA graph, and return its replay."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels, which must not happen while capturing
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    return partial(_replay, graph, run)


def _replay(graph: torch.cuda.CUDAGraph, run: Callable[[], Any]) -> None:
    """Replay a graph. It does not hold the tensors that it reads, but the function whose launches it has does."""
    graph.replay()


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(tensor.dtype for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point())


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _read(path: Path, facts: Mapping[str, Any]) -> dict[str, float]:
    """Return the times of a file; none if it is missing, broken, or of another machine."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        times = content["microseconds"]
        whole = all(isinstance(value, (int, float)) and value > 0 for value in times.values())
        return dict(times) if whole and all(content[name] == fact for name, fact in facts.items()) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}

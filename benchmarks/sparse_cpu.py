"""Time of linears with zeros anywhere on a CPU, dense and compressed -> results/sparse_cpu.csv.

    python -m benchmarks.sparse_cpu                     float32 and bfloat16, 50 to 90 % zeros, 1, 16 and 128 tokens
    python -m benchmarks.sparse_cpu --dtypes float32 --tokens 1 --threads 2

dense is nn.Linear; packed, the dense weight in oneDNN's own layout; csr, sparse rows of torch (`CsrLinear`), which it
multiplies in float32 only; bitmap, `SparseLinear`, which makes the dense weight for every call. Forms take turns, and each
takes turns among enough copies of its weight that no cache holds them. `speedup` is the median of dense / csr over the turns,
so that other work on the machine meets both. Rows that a file has are not measured again.
"""

import argparse
import copy
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.quality import ENVIRONMENT, append, environment, finished
from lightning_modules.parts.csr_linear import CsrLinear
from lightning_modules.parts.sparse_linear import SparseLinear

SHAPES = {
    "SmolLM2-135M q": (576, 576),
    "SmolLM2-135M gate": (1536, 576),
    "SmolLM2-135M down": (576, 1536),
    "LLaMA-2-7B q": (4096, 4096),
    "LLaMA-2-7B gate": (11008, 4096),
}
"""Name -> outputs, inputs."""
FORMS = ("dense", "packed", "csr", "bitmap")
SETTING = ("what", "outputs", "inputs", "dtype", "zeros", "tokens", "threads", "seed")
TIMES = tuple(f"{form}{end}" for form in FORMS for end in ("_us", "_min_us"))
COLUMNS = (*SETTING, *TIMES, "speedup", "rounds", *ENVIRONMENT)


class Packed(nn.Module):
    """A dense linear whose weight oneDNN has put into its own layout for a number of tokens.

    Args:
        linear: The linear, without bias.
        tokens: Number of tokens.
    """

    def __init__(self, linear: nn.Linear, tokens: int) -> None:
        super().__init__()
        self._tokens, self._weight = tokens, linear.weight.detach()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight, tokens)

    def __deepcopy__(self, memo: dict) -> "Packed":
        other = copy.copy(self)
        other._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight, self._tokens)
        return other

    def forward(self, x: Tensor) -> Tensor:
        """Multiply tokens, (tokens, I)."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")


def linear_with_zeros(outputs: int, inputs: int, zeros: float, dtype: torch.dtype) -> nn.Linear:
    """Make a linear without bias of which a share of the weights, drawn at random, is zero."""
    linear = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
    linear.weight.normal_(0, 0.02).masked_fill_(torch.rand_like(linear.weight) < zeros, 0)
    return linear.to(dtype)


def packs(dtype: torch.dtype) -> bool:
    """Return whether oneDNN has a layout for a dtype on this CPU; it has none for bfloat16 without AVX-512 or the like."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def forms_of(linear: nn.Linear, tokens: int) -> dict[str, nn.Module]:
    """Return the forms of a linear that torch can multiply here."""
    found: dict[str, nn.Module] = {"dense": linear}
    if packs(linear.weight.dtype):
        found["packed"] = Packed(linear, tokens)
    if linear.weight.dtype == torch.float32:
        found["csr"] = CsrLinear.from_linear(linear)
    return found | {"bitmap": SparseLinear.from_linear(linear)}


def in_turn(module: nn.Module, x: Tensor, size: int, cold_bytes: int) -> Callable[[], Tensor]:
    """Return what runs a linear and copies of it, one in each call."""
    turns = itertools.cycle([module, *(copy.deepcopy(module) for _ in range(math.ceil(cold_bytes / size) - 1))])
    return lambda: next(turns)(x)


def interleaved(runs: dict[str, Callable[[], Tensor]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Return form -> microseconds of each of its turns."""
    found: dict[str, list[float]] = {form: [] for form in runs}
    for run in runs.values():
        run()
    begun = time.perf_counter()
    while len(found["dense"]) < options.least_rounds or time.perf_counter() - begun < options.seconds:
        for form, run in runs.items():
            start = time.perf_counter()
            run()
            found[form].append(1e6 * (time.perf_counter() - start))
    return found


def measure(row: dict, options: argparse.Namespace) -> dict:
    """Return the times of one shape, dtype, share of zeros and number of tokens."""
    linear = linear_with_zeros(row["outputs"], row["inputs"], row["zeros"], getattr(torch, row["dtype"]))
    x = torch.randn(row["tokens"], row["inputs"], dtype=linear.weight.dtype)
    modules = forms_of(linear, row["tokens"])
    expected = linear(x).float()
    for form, module in modules.items():
        torch.testing.assert_close(
            module(x).float(), expected, rtol=2e-2, atol=2e-2, msg=lambda text, form=form: f"{form}: {text}"
        )
    size = linear.weight.nbytes
    runs = {form: in_turn(module, x, size, options.cold_mib * 2**20) for form, module in modules.items()}
    times = interleaved(runs, options)
    found = {f"{form}_us": median(values) for form, values in times.items()}
    found |= {f"{form}_min_us": min(values) for form, values in times.items()}
    if "csr" in times:
        found["speedup"] = median(dense / csr for dense, csr in zip(times["dense"], times["csr"], strict=True))
    return {name: float(f"{value:.4g}") for name, value in found.items()} | {"rounds": len(times["dense"])}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/sparse_cpu.csv"))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="time of a row")
    parser.add_argument("--least-rounds", type=int, default=11)
    parser.add_argument("--cold-mib", type=int, default=128, help="MiB of all copies of a dense weight")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    """Measure what a file lacks, and append it row by row."""
    options = parse()
    torch.set_num_threads(options.threads)
    done, facts = finished(options.out, SETTING), environment()
    for dtype, what, zeros, tokens in itertools.product(options.dtypes, options.shapes, options.zeros, options.tokens):
        outputs, inputs = SHAPES[what]
        row = {"what": what, "outputs": outputs, "inputs": inputs, "dtype": dtype, "zeros": zeros, "tokens": tokens}
        row |= {"threads": options.threads, "seed": 0}
        if tuple(str(row[name]) for name in SETTING) in done:
            continue
        torch.manual_seed(0)
        row |= measure(row, options)
        print({name: value for name, value in row.items() if name not in ("outputs", "inputs", "seed")}, flush=True)
        append(options.out, row | facts, COLUMNS)


if __name__ == "__main__":
    main()

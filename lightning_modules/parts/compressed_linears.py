"""Replace the linears of a model's blocks by compressed ones: `compressed` of CausalLM."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from functional.sparse24 import DTYPES
from lightning_modules.parts.compressed_base import is_plain, on_gpu, zeros_of
from lightning_modules.parts.csr_linear import CsrLinear
from lightning_modules.parts.fastest_form import DENSE, FormTimes, fastest
from lightning_modules.parts.lane_linear import LaneLinear, try_lanes
from lightning_modules.parts.linear24 import Linear24, try_kernels
from lightning_modules.parts.merged_linears import MergedLinears, MergedPart, concatenated, sharing_linears
from lightning_modules.parts.sparse_linear import LEAST_ZEROS, SparseLinear
from lightning_modules.parts.split_linear import SplitLinear, try_split

Kind = Literal["none", "auto", "2:4", "unstructured"]
REST = "2:4 and rest"
FORMS = {"2:4": Linear24, REST: SplitLinear, "unstructured": SparseLinear, "lanes": LaneLinear, "csr": CsrLinear}
"""Name of a form -> its module."""
ON_GPU, ON_CPU = ("2:4", REST, "lanes"), ("csr",)
"""Forms with a product of their own on a device; the others make the dense weight for every call."""
ASKED = {"2:4": "2:4", "lanes": "unstructured"}
"""Form of a GPU -> kind that asks for it; only auto takes the others."""
ONE, MANY = 1, 128
"""Tokens at a time with which forms are timed: of decoding one window, and of evaluation."""


@dataclass
class Compression:
    """What was compressed.

    Attributes:
        forms: Form -> number of linears that have it now.
        total: Number of linears.
        merged: Number of linears that are parts of one product.
        before: Bytes of all linears before.
        after: Bytes of all linears now.
    """

    forms: Counter = field(default_factory=Counter)
    total: int = 0
    merged: int = 0
    before: int = 0
    after: int = 0

    @property
    def replaced(self) -> int:
        """Number of linears that were replaced."""
        return self.forms.total()


def compress_linears(
    blocks: Sequence[nn.Module],
    kind: Kind = "2:4",
    device: torch.device | None = None,
    timed: Sequence[str] | None = None,
    tokens: int = ONE,
    run_model: Callable[[], Any] | None = None,
) -> Compression:
    """Replace linears of some blocks by compressed ones.

    Args:
        blocks: Blocks, changed in place.
        kind: 2:4: every linear that is. unstructured: those with enough zeros, on a GPU in lanes if they are of 16 bit, on a
            CPU as sparse rows where these are faster than dense. auto: each as it is fastest, perhaps dense.
        device: Device of the work and of its result; that of the weights when None.
        timed: Forms that are timed on the device; those of `ON_GPU` or `ON_CPU` when None.
        tokens: Tokens at a time that they are timed with.
        run_model: Runs the model on a few tokens. Linears that share their input, and can have the same forms, become one
            product then; dense ones on a GPU only. None leaves each by itself.
    """
    found, times = Compression(), {}
    for block, together in _together(blocks, [] if run_model is None else sharing_linears(blocks, run_model)):
        for fitting, paths in _alike(block, together, kind, device, timed).items():
            linears = [block.get_submodule(path) for path in paths]
            sizes = [linear.out_features for linear in linears]
            before = sum(_nbytes(linear) for linear in linears)
            whole = linears[0] if len(paths) == 1 else concatenated(linears)
            form = _form_of(whole, kind, fitting, times, tokens)
            found.total, found.before = found.total + len(paths), found.before + before
            if form == DENSE and (len(paths) == 1 or not on_gpu(whole.weight)):  # merged dense ones are slower on a CPU
                found.after += before
                continue
            linears.clear()  # else the weights would be held twice
            found.after += _nbytes(_replace(block, paths, sizes, whole, form))
            found.merged += len(paths) if len(paths) > 1 else 0
            if form != DENSE:
                found.forms[form] += len(paths)
    return found


def _together(blocks: Sequence[nn.Module], groups: list[list[nn.Linear]]) -> list[tuple[nn.Module, list[str]]]:
    """Return the paths of all linears of each block, those of a group together."""
    number = {linear: index for index, group in enumerate(groups) for linear in group}
    found: dict[tuple[nn.Module, int | str], list[str]] = {}
    seen: set[tuple[nn.Module, str]] = set()
    for block in blocks:
        for path, linear in block.named_modules():
            place = block.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
            if is_plain(linear) and place not in seen:  # blocks may share a module
                seen.add(place)
                found.setdefault((block, number.get(linear, path)), []).append(path)
    return [(block, paths) for (block, _), paths in found.items()]


def _alike(
    block: nn.Module, paths: list[str], kind: Kind, device: torch.device | None, timed: Sequence[str] | None
) -> dict[tuple[str, ...], list[str]]:
    """Move linears to their device, and return forms -> paths of those that can have these forms."""
    found: dict[tuple[str, ...], list[str]] = {}
    for path in paths:
        linear = block.get_submodule(path)
        linear.to(device or linear.weight.device)
        found.setdefault(_fitting(linear, kind, timed), []).append(path)
    return found


def _replace(block: nn.Module, paths: list[str], sizes: list[int], whole: nn.Linear, form: str) -> nn.Module:
    """Put a linear, or what several were merged into, in its form into a block, and return it."""
    if len(paths) == 1:
        compressed = FORMS[form].from_linear(whole)
        block.set_submodule(paths[0], compressed)
        return compressed
    merged = MergedLinears(whole, sizes)
    for index, path in enumerate(paths):
        block.set_submodule(path, MergedPart(merged, index))
    if form != DENSE:
        merged.linear = FORMS[form].from_linear(whole)
    return merged.linear


def _nbytes(linear: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*linear.parameters(), *linear.buffers()))


def compress_model(
    blocks: Sequence[nn.Module],
    kind: Kind,
    path: str,
    dtype: torch.dtype,
    device: torch.device | None,
    tokens: int = ONE,
    run_model: Callable[[], Any] | None = None,
) -> None:
    """Compress a model that was loaded for inference, and tell what became of it.

    Args:
        blocks: Its blocks.
        kind: As in `compress_linears`, not none.
        path: Name of the model, for the error.
        dtype: Dtype of its weights.
        device: Device that it will run on; None if that is not known.
        tokens: Tokens at a time that it will run on.
        run_model: As in `compress_linears`.

    Raises:
        ValueError: If there is no linear, or none has the zeros for it, or kernels do not run on the device.
    """
    has_kernels = device is not None and device.type == "cuda"
    timed = [form for form in ON_GPU if _runs(form, kind, device)] if has_kernels else None
    found = compress_linears(blocks, kind, device, timed, tokens, run_model)
    if not found.total and kind != "auto":
        raise ValueError(
            f"Argument `compressed` = {kind} replaces nn.Linear, but the blocks of {path!r} have none: GPT-2 has Conv1D, and "
            "those of a model in memory may be compressed already. Leave `compressed` out."
        )
    if not found.replaced and kind != "auto":
        lacking = {
            "2:4": "2:4 with a multiple of 4 inputs. Give a model that was pruned with `pattern` = 2:4",
            "unstructured": f"zero to at least {LEAST_ZEROS:.0%}. Give a pruned model",
        }
        raise ValueError(
            f"Argument `compressed` = {kind}, but none of the {found.total} linears in the blocks of {path!r} is "
            f"{lacking[kind]}, or leave `compressed` out."
        )
    forms = ", ".join(f"{count} as {name}" for name, count in found.forms.items()) or "each is fastest dense"
    rank_zero_info(
        f"{found.replaced} of {found.total} linears were compressed ({forms}): {found.before / 2**20:.1f} -> "
        f"{found.after / 2**20:.1f} MiB."
        + f" {found.merged} that share their input with others were merged with these."
        * bool(found.merged)
    )
    unread = dtype not in DTYPES or (device is not None and not has_kernels)
    if (found.forms["2:4"] and unread) or found.forms["unstructured"]:
        rank_zero_warn(
            f"Weights of {dtype} on {device or 'this device'} are compressed, but no kernel multiplies them: every product "
            "makes them dense anew, which is many times slower than without `compressed`. Give `dtype` = bfloat16 or float16 "
            "on a GPU, or `compressed` = auto for the fastest form."
        )


def _fitting(linear: nn.Linear, kind: Kind, timed: Sequence[str] | None) -> tuple[str, ...]:
    """Return the forms other than dense that a linear, which is on its final device, can have."""
    if kind == "2:4":
        return (kind,) if Linear24.fits(linear) else ()
    if timed is None:
        timed = ON_CPU if linear.weight.device.type == "cpu" else ON_GPU
    if kind == "auto":
        return tuple(name for name in timed if FORMS[name].fits(linear))
    if not SparseLinear.fits(linear):
        return ()
    if "lanes" in timed and LaneLinear.fits(linear):
        return ("lanes",)
    # The memory counts; sparse rows only where they are fast.
    return (*(name for name in timed if name in ON_CPU and FORMS[name].fits(linear)), "unstructured")


def _form_of(linear: nn.Linear, kind: Kind, fitting: tuple[str, ...], times: dict[torch.device, FormTimes], tokens: int) -> str:
    """Return the form that a linear gets, of those that fit."""
    timed = [name for name in fitting if kind == "auto" or name in ON_CPU]
    if timed:
        device = linear.weight.device
        if device not in times:
            times[device] = FormTimes(device)
        makes = {DENSE: lambda: linear} | {name: lambda made=FORMS[name]: made.from_linear(linear) for name in timed}
        chosen = fastest(times[device].of(makes, linear, zeros_of(linear), tokens))
        if chosen != DENSE:
            return chosen
    return DENSE if kind == "auto" or not fitting else fitting[-1]


def _runs(form: str, kind: Kind, device: torch.device) -> bool:
    """Return whether the kernels of a form run on a GPU; where the form was asked for, they have to."""
    asked = ASKED.get(form, "auto")
    if kind not in (asked, "auto"):
        return True
    try:
        {"2:4": try_kernels, REST: try_split, "lanes": try_lanes}[form](device)
    except ValueError as error:
        if kind == ASKED.get(form):
            raise
        rank_zero_warn(f"Argument `compressed` = auto leaves {ASKED.get(form, form)} out. {error}")
        return False
    return True

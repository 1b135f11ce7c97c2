"""Stages of a block: linears that read the same tensor, in the order in which the block calls them: q, k, v; o; gate, up; down.

The gate and up of all experts of a mixture are one stage, and so are their downs.

A stage is pruned before the inputs of the next one are measured. Of the block's forward a stage takes the part up to its last
linear, where a hook leaves. Everything here is found by running the block; no forward is copied.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from callbacks.blockwise.endings import Ending, finding_endings
from lightning_modules.parts.architectures import PrunableLinear

SMALLEST_FACTOR = 0.02
"""Least factor with which a linear's outputs count as added to the hidden states."""
LARGEST_MISFIT = 0.02
"""Relative misfit, beside rounding, up to which hidden states count as a sum."""
FITTED_TOKENS = 256
"""Tokens that the factors are fitted on."""


class _StageSeen(Exception):
    """Leaves the block's forward once all linears of a stage were called; never leaves this file."""


@dataclass(frozen=True)
class BlockStages:
    """What one run of a block shows.

    Attributes:
        names: Linears of each stage. They read the same tensor, unless they are those of experts.
        writers: Linear whose outputs the block adds to its hidden states -> factor, in the order of the calls; empty if the
            block does more than add.
        endings: Linear -> submodule that ends in it.
    """

    names: list[list[str]]
    writers: dict[str, float]
    endings: dict[str, Ending] = field(default_factory=dict)


class Trace:
    """What linears of a block read and write during a run.

    Args:
        hidden: Hidden states that the block is run on.
        writers: As in `BlockStages`.
    """

    def __init__(self, hidden: Tensor, writers: Mapping[str, float]) -> None:
        self.inputs: dict[str, Tensor] = {}
        """Linear -> its inputs."""
        self.outputs: dict[str, Tensor] = {}
        """Linear -> its outputs."""
        self._hidden, self._writers = hidden, writers

    def sum_up_to(self, name: str) -> list[tuple[Tensor, float]]:
        """Return the tensors and factors whose sum are the hidden states once a writer's outputs have been added."""
        shape, writers = self._hidden.shape, list(self._writers)
        added = writers[: writers.index(name) + 1]
        return [(self._hidden, 1.0), *((self.outputs[other].reshape(shape), self._writers[other]) for other in added)]


def stages_of(
    block: nn.Module,
    hidden: Tensor,
    run_block: Callable[[], Tensor],
    linears: Mapping[str, PrunableLinear],
    pruned: Iterable[str],
) -> BlockStages:
    """Run a block once, and find its stages, writers and endings.

    A linear that is not pruned and called twice is none of the writers; if its outputs are added to the hidden states, these
    are no sum of the others' outputs, and there are no writers at all.

    Args:
        block: The block.
        hidden: Hidden states that it is run on, (samples, tokens, features).
        run_block: Runs the block and returns its hidden states.
        linears: Name -> linear of the block, pruned or not, and layers of experts as if they were linears.
        pruned: Linears that the stages consist of.

    Raises:
        RuntimeError: If a pruned linear is called twice, or never.
    """
    trace, pruned = Trace(hidden, {}), list(pruned)
    with (
        tracing(trace, linears, inputs=linears, outputs=linears, once=pruned),
        finding_endings(block, linears, pruned) as endings,
    ):
        after = run_block()
    if missing := [name for name in pruned if name not in trace.inputs]:
        raise RuntimeError(f"The linear {missing[0]!r} was never called while calibrating, so it cannot be pruned.")
    stages: list[tuple[Tensor, list[str]]] = []
    for name in (name for name in trace.inputs if name in pruned):
        same = linears[name].parameter if linears[name].is_routed else trace.inputs[name]
        stage = next((names for other, names in stages if other is same), None)
        if stage is None:
            stages.append((same, stage := []))
        stage.append(name)
    return BlockStages([names for _, names in stages], _writers(hidden, after, trace.outputs), endings)


@contextmanager
def tracing(
    trace: Trace,
    linears: Mapping[str, PrunableLinear],
    inputs: Iterable[str] = (),
    outputs: Iterable[str] = (),
    once: Iterable[str] | None = None,
) -> Iterator[None]:
    """Fill a trace with the inputs and outputs of linears, within the context.

    Args:
        trace: Trace to fill.
        linears: Name -> linear.
        inputs: Linears whose inputs are wanted.
        outputs: Linears whose outputs are wanted.
        once: Those of them that must not be called twice, all when None; others that are called twice are left out.

    Raises:
        RuntimeError: If a linear is called twice that must not be.
    """
    inputs, outputs, called = set(inputs), set(outputs), set()
    once = inputs | outputs if once is None else set(once)

    def note_inputs(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name in called and name in once:
                raise RuntimeError(f"The linear {name!r} is called more than once a forward pass; it cannot be pruned.")
            if name in inputs and name not in called:
                trace.inputs[name] = args[0]
            elif name in called:
                trace.inputs.pop(name, None)
                trace.outputs.pop(name, None)
                outputs.discard(name)
            called.add(name)

        return hook

    def note_outputs(name: str, linear: PrunableLinear) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            if name in outputs:
                trace.outputs[name] = (output[0] if isinstance(output, tuple) else output)[..., linear.rows]

        return hook

    # Inputs before the call: a stage of experts ends within that of their layer.
    handles = [
        linears[name].module.register_forward_pre_hook(note_inputs(name)) for name in linears if name in inputs | outputs
    ]
    handles += [
        linear.module.register_forward_hook(note_outputs(name, linear)) for name, linear in linears.items() if name in outputs
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def leaving_after(linears: Iterable[PrunableLinear]) -> Iterator[None]:
    """Leave the body, as if it had ended, once each of these linears was called."""
    waiting = {linear.module for linear in linears}

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        waiting.discard(module)
        if not waiting:
            raise _StageSeen

    handles = [module.register_forward_hook(leave) for module in list(waiting)]
    try:
        yield
    except _StageSeen:
        pass
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def leaving_before(linear: PrunableLinear) -> Iterator[None]:
    """Leave the body, as if it had ended, once this linear is to run."""

    def leave(module: nn.Module, args: Any) -> None:
        raise _StageSeen

    handle = linear.module.register_forward_pre_hook(leave)
    try:
        yield
    except _StageSeen:
        pass
    finally:
        handle.remove()


@contextmanager
def weights_in_place(weights: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Let parameters have these values within the context, and their own again afterwards. Nothing is copied."""
    own = {parameter: parameter.data for parameter in weights}
    try:
        for parameter, weight in weights.items():
            parameter.data = weight
        yield
    finally:
        for parameter, weight in own.items():
            parameter.data = weight


def difference(dense: Iterable[tuple[Tensor, float]], own: Iterable[tuple[Tensor, float]]) -> Tensor:
    """Return the difference of two sums of tensors times factors, float32."""
    signed = chain(dense, ((tensor, -factor) for tensor, factor in own))
    first, factor = next(signed)
    total = first.to(torch.float32, copy=True)
    if factor != 1:
        total *= factor
    for tensor, factor in signed:
        total.add_(tensor, alpha=factor)
    return total


def _writers(before: Tensor, after: Tensor, outputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Fit after − before as a sum of outputs times factors, in the first sample; empty unless it is one."""
    alike = {name: y.reshape(before.shape) for name, y in outputs.items() if y.numel() == before.numel()}
    alike = {name: y for name, y in alike.items() if outputs[name].shape[-1] == before.shape[-1]}
    # What is within another is part of its outputs.
    alike = {name: y for name, y in alike.items() if not any(name.startswith(f"{other}.") for other in alike)}
    if not alike or before.shape != after.shape:
        return {}

    def flat(x: Tensor) -> Tensor:
        return x[0, :FITTED_TOKENS].flatten().double().cpu()

    wanted, columns = flat(after) - flat(before), {name: flat(y) for name, y in alike.items()}
    if not all(x.isfinite().all() for x in (wanted, *columns.values())):
        return {}  # statistics find it, and say where
    chosen = {name: factor for name, factor in _fit(columns, wanted).items() if abs(factor) > SMALLEST_FACTOR}
    if not chosen:
        return {}
    fitted = _fit({name: columns[name] for name in chosen}, wanted)
    misfit = (sum(columns[name] * factor for name, factor in fitted.items()) - wanted).norm()
    if misfit > LARGEST_MISFIT * wanted.norm() + torch.finfo(after.dtype).eps * flat(after).norm():
        return {}
    return {name: float(f"{factor:.3g}") for name, factor in fitted.items()}  # without the noise of rounding


def _fit(columns: Mapping[str, Tensor], wanted: Tensor) -> dict[str, float]:
    factors = torch.linalg.lstsq(torch.stack(list(columns.values()), dim=1), wanted[:, None]).solution[:, 0]
    return dict(zip(columns, factors.tolist(), strict=True))

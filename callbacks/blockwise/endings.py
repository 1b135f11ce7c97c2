"""Submodules that end in a pruned linear, such as attentions and feed-forwards: they return what that linear returns.

From the stage of that linear on its inputs stay as they are, since all pruned linears before it have their new weights. Later
stages, and the pass through the pruned block, then need no more of the submodule than linear(inputs). Submodules are found by
running the block, like stages.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_modules.parts.architectures import PrunableLinear


@dataclass(frozen=True)
class Ending:
    """A submodule that returns what a linear within it returns.

    Attributes:
        submodule: Name of the submodule within the block.
        entries: Length of the tuple that it returns, of which all but the first are None; None if it returns a tensor.
    """

    submodule: str
    entries: int | None

    def forward(self, linear: nn.Module, inputs: Tensor) -> Callable[..., Any]:
        """Return a forward for the submodule that calls the linear only."""

        def call(*args: Any, **kwargs: Any) -> Any:
            output = linear(inputs)
            return output if self.entries is None else (output, *[None] * (self.entries - 1))

        return call


@contextmanager
def finding_endings(
    block: nn.Module, linears: Mapping[str, PrunableLinear], pruned: Iterable[str]
) -> Iterator[dict[str, Ending]]:
    """Find the submodules that end in a pruned linear; filled once the block was run within the context.

    Of nested submodules that end in the same linear the outermost counts. The block itself does not. A submodule in which
    another linear is called later, or that is called twice, is none of them.

    Args:
        block: The block.
        linears: Name -> linear of the block, pruned or not.
        pruned: Linears that are pruned.
    """
    modules = {linear.module for linear in linears.values()}
    ends = {linears[name].module: name for name in pruned if _is_whole(linears[name])}
    latest: list[tuple[nn.Module, Tensor, int]] = []
    """The linear that was called last, its outputs and their version, which grows when they are changed in place."""
    found: dict[str, Ending] = {}
    calls: dict[str, int] = {}

    def note_linear(module: nn.Module, args: Any, output: Tensor | tuple) -> None:
        returned = output[0] if isinstance(output, tuple) else output  # a layer of experts may return a tuple
        latest[:] = [(module, returned, returned._version)]

    def note_submodule(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            is_tuple = isinstance(output, tuple)
            first, *others = output if is_tuple else (output,)
            if not latest or any(other is not None for other in others):
                return
            linear, returned, version = latest[0]
            unchanged = first is returned and returned._version == version
            if unchanged and linear in ends and any(inner is linear for inner in module.modules()):
                found[ends[linear]] = Ending(name, len(output) if is_tuple else None)

        return hook

    submodules = {name: module for name, module in block.named_modules() if name and module not in modules}
    handles = [module.register_forward_hook(note_linear) for module in modules]
    handles += [module.register_forward_hook(note_submodule(name)) for name, module in submodules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for name in [name for name, ending in found.items() if calls[ending.submodule] > 1]:
        del found[name]


def _is_whole(linear: PrunableLinear) -> bool:
    return isinstance(linear.rows, slice) and linear.rows == slice(None)

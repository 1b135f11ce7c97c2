"""Call tree of one forward pass, and the chain of modules that hidden states pass through, read off it.

One module follows another in a chain if it is called with the very tensor that the other returned. A stage, or a list of
blocks, is such a chain. A residual block is none, since it adds its input in the end.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(eq=False)
class Call:
    """One call of a module.

    Attributes:
        name: Full name of the module.
        module: The module.
        args: Positional arguments.
        kwargs: Keyword arguments.
        output: What it returned.
        changes: Whether that is anything but its first argument as it was.
        parts: Calls of its submodules, in their order.
    """

    name: str
    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    output: Any = None
    changes: bool = True
    parts: list["Call"] = field(default_factory=list)

    @property
    def given(self) -> Tensor | None:
        """The first argument, if that is a tensor."""
        return _first_tensor(self.args or tuple(self.kwargs.values())[:1])

    @property
    def returned(self) -> Tensor | None:
        """The output, or its first entry, if that is a tensor."""
        return _first_tensor(self.output)

    def ends(self, other: "Call") -> bool:
        """Return whether another call returns what this one does."""
        return self.returned is not None and self.returned is other.returned

    def all(self) -> Iterator["Call"]:
        """Yield this call and all calls within it."""
        yield self
        for part in self.parts:
            yield from part.all()


def call_tree(model: nn.Module, run_model: Callable[[], Any]) -> Call:
    """Run a model and return its call.

    Args:
        model: The model.
        run_model: Calls it once.
    """
    root = Call("", model, (), {})
    with _noting(model, [root]):
        run_model()
    return root.parts[0]


def longest_chain(root: Call, is_matrix: Callable[[nn.Module], bool]) -> list[Call]:
    """Return the chain that holds most of a model's parameters, without the head, which returns what the model returns.

    Lists of blocks and stages are replaced by what they call one after the other, down to modules that are no chain. A chain of
    modules with one matrix each stays whole: a norm and a downsampling convolution are one link. Links at the ends without a
    matrix are left out, as are modules that return their input.

    Args:
        root: Call of the model.
        is_matrix: Whether a module is one that may be pruned.

    Returns:
        Calls of the links; empty if there is no chain.
    """

    def matrices(call: Call) -> int:
        return sum(is_matrix(module) for module in call.module.modules())

    def links(call: Call) -> list[Call]:
        parts = _following([part for part in call.parts if part.changes], call.given)
        whole = parts and parts[-1].returned is call.returned
        if not whole or all(matrices(part) < 2 for part in parts):
            return [call]
        return [link for part in parts for link in links(part)]

    def best_of(call: Call) -> list[Call]:
        parts = [part for part in call.parts if part.changes and part.given is not None]
        starts = [part for part in parts if not any(other.returned is part.given for other in parts)]
        chains = [[link for part in [start, *_following(parts, start.returned)] for link in links(part)] for start in starts]
        chains = [_trimmed([link for link in chain if not link.ends(root)], matrices) for chain in chains]
        return max(chains, key=lambda chain: sum(_size(link) for link in chain), default=[])

    found = best_of(root)
    while sum(matrices(link) > 1 for link in found) == 1:  # the model within a wrapper
        inner = best_of(next(link for link in found if matrices(link) > 1))
        if not any(matrices(link) > 1 for link in inner):
            break
        found = inner
    return found


@contextmanager
def _noting(model: nn.Module, open_calls: list[Call]) -> Iterator[None]:
    """Hang every call within the context into the one that is open."""
    names = {module: name for name, module in model.named_modules()}
    versions: list[int | None] = []
    """Of the first argument of each open call; grows when a tensor is changed in place."""

    def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = Call(names[module], module, args, kwargs)
        open_calls[-1].parts.append(call)
        open_calls.append(call)
        versions.append(None if call.given is None else call.given._version)

    def end(module: nn.Module, args: tuple, output: Any) -> None:
        call, version = open_calls.pop(), versions.pop()
        call.output = output
        call.changes = call.given is None or call.returned is not call.given or call.given._version != version

    handles = [module.register_forward_pre_hook(begin, with_kwargs=True) for module in names]
    handles += [module.register_forward_hook(end) for module in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _following(parts: list[Call], tensor: Tensor | None) -> list[Call]:
    """Return the calls through which a tensor passes, up to where nothing, or more than one module, reads what comes out."""
    chain: list[Call] = []
    while tensor is not None:
        readers = [part for part in parts if part.given is tensor]
        if len(readers) != 1 or readers[0] in chain:
            break
        chain.append(readers[0])
        tensor = readers[0].returned
    return chain


def _trimmed(chain: list[Call], matrices: Callable[[Call], int]) -> list[Call]:
    found = [index for index, link in enumerate(chain) if matrices(link)]
    return chain[found[0] : found[-1] + 1] if found else []


def _size(call: Call) -> int:
    return sum(parameter.numel() for parameter in call.module.parameters())


def _first_tensor(value: Any) -> Tensor | None:
    first = value[0] if isinstance(value, tuple) and value else value
    return first if isinstance(first, Tensor) else None

"""BlockStream: hidden states of this process's calibration batches on their way through a chain of blocks.

D²Prune is sequential: the inputs of block b are the outputs of the pruned blocks before it. One pass over the whole model
records the arguments that the model gives each block beside the hidden states: masks, position embeddings, and whatever else it
passes. In that pass the blocks only return their input, so it costs the embedding and no block. Where some change the shape of
the hidden states, as between the stages of a Swin or ConvNeXt, all run, and return zeros of their output's shape, so that
what is recorded never depends on hidden states. Afterwards blocks can be run on their own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.parts.experts import routed_forwards
from lightning_modules.parts.host_memory import FileMemory, HostMemory


class _AllBlocksSeen(Exception):
    """Ends the model's forward pass at its last block; always caught in this file."""


@dataclass
class _Batch:
    hidden: Tensor | None
    """None while the hidden states are elsewhere."""
    calls: list[tuple[tuple, dict[str, Any]]]
    """Further positional arguments and keyword arguments of each block."""


class BlockStream:
    """Hidden states of calibration batches, moved forward block by block.

    Args:
        blocks: The chain of blocks, in order. Each takes the hidden states as its first argument (or as the keyword
            ``hidden_states``) and returns them, alone or as the first entry of a tuple.
        uniform: Whether each returns hidden states of the shape that it takes.
        routed: Whether experts of mixtures run one by one, so that hooks can be placed on their matrices; if not, they run as
            in the model, bit for bit.
    """

    def __init__(self, blocks: Sequence[nn.Module], uniform: bool = True, routed: bool = True) -> None:
        self.blocks = list(blocks)
        self._uniform, self._routed = uniform, routed
        self._elsewhere: HostMemory | FileMemory | None = None
        self._batches: dict[int, _Batch] = {}
        self._returns_tuple: list[bool] | None = None

    def __len__(self) -> int:
        return len(self._batches)

    @torch.no_grad()
    def capture(self, key: int, run_model: Callable[[], Any]) -> None:
        """Store the inputs of the first block, and the arguments of every block, for one batch.

        Args:
            key: Number of the batch.
            run_model: Runs the whole model on the batch. Its exceptions pass through.

        Raises:
            RuntimeError: If the model does not call its blocks once each, in order.
        """
        calls: list[tuple[Tensor, tuple, dict[str, Any]]] = []
        with self._passing_through(calls), suppress(_AllBlocksSeen):
            run_model()
        if len(calls) != len(self.blocks):
            raise RuntimeError(f"The model called {len(calls)} of its {len(self.blocks)} blocks; it cannot be run by blocks.")
        previous = next(reversed(self._batches.values()), None)
        arguments = [(args, kwargs) for _, args, kwargs in calls]
        if previous is not None:
            arguments = _share_equal(arguments, previous.calls)
        self._batches[key] = _Batch(None, arguments)
        self.replace(key, calls[0][0])

    def hidden(self, key: int) -> Tensor:
        """Return the hidden states of a batch, (samples, tokens, features) or whatever the model passes on."""
        return self._batches[key].hidden if self._elsewhere is None else self._elsewhere.get(key)

    def arguments(self, key: int, index: int) -> tuple[tuple, dict[str, Any]]:
        """Return what the model gives block `index` beside the hidden states: positional and keyword arguments."""
        return self._batches[key].calls[index]

    def move_to_host(self) -> None:
        """Keep hidden states in host memory from now on, and fetch them to the device one batch ahead."""
        self._move_to(HostMemory(next(iter(self._batches.values())).hidden.device))

    def move_to_files(self, directory: Path) -> None:
        """Keep hidden states in files from now on, in a directory that is of no other use; `clear` removes it."""
        self._move_to(FileMemory(directory))

    @torch.no_grad()
    def run(self, key: int, index: int) -> Tensor:
        """Return the output of block `index` on the hidden states of a batch, without replacing them."""
        args, kwargs = self.arguments(key, index)
        with replaced_forwards(routed_forwards(self.blocks[index]) if self._routed else {}):
            output = self.blocks[index](self.hidden(key), *args, **kwargs)
        self._returns_tuple = isinstance(output, tuple)
        return _hidden_of(output)

    @torch.no_grad()
    def finish(self, key: int, run_model: Callable[[], Any]) -> Any:
        """Run what the model does with the present hidden states of a batch once they have left the last block.

        Args:
            key: Number of the batch, which has passed all blocks; they are uniform.
            run_model: Runs the whole model on the batch, with blocks that hand on what they get.

        Returns:
            What it returns.
        """
        with self._passing_through([], last=self.hidden(key)):
            return run_model()

    def advance(self, key: int, index: int) -> None:
        """Replace the hidden states of a batch by the output of block `index`."""
        self.replace(key, self.run(key, index))

    def adopt(self, key: int, other: "BlockStream") -> None:
        """Take a batch over from another stream of the same blocks; from then on each moves its own."""
        self._batches[key] = _Batch(None, other._batches[key].calls)
        self.replace(key, other.hidden(key))

    def replace(self, key: int, hidden: Tensor) -> None:
        """Replace the hidden states of a batch."""
        if self._elsewhere is None:
            self._batches[key].hidden = hidden
        else:
            self._elsewhere.put(key, hidden)

    def clear(self) -> None:
        """Forget all batches."""
        self._batches.clear()
        if self._elsewhere is not None:
            self._elsewhere.clear()
            self._elsewhere = None

    def _move_to(self, memory: HostMemory | FileMemory) -> None:
        self._elsewhere = memory
        for key, batch in self._batches.items():
            memory.put(key, batch.hidden)
            batch.hidden = None

    @contextmanager
    def _passing_through(self, calls: list, last: Tensor | None = None) -> Iterator[None]:
        """Let blocks record their arguments and return their input, or zeros if they change its shape, within the context.

        The first block runs once, to see whether it returns a tuple. The last one returns `last`, or ends the forward pass.
        """

        def hand_on(index: int, forward: Callable) -> Callable:
            def record(*args: Any, **kwargs: Any) -> Any:
                kwargs = dict(kwargs)
                hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
                if index != len(calls):
                    raise RuntimeError(f"The model called block {index} where block {len(calls)} was expected.")
                calls.append((hidden, args, kwargs))
                if index == len(self.blocks) - 1:
                    if last is None:
                        raise _AllBlocksSeen
                    return (last,) if self._returns_tuple else last
                if not self._uniform:
                    return _zeros_like(forward(hidden, *args, **kwargs))
                if self._returns_tuple is None:
                    self._returns_tuple = isinstance(forward(hidden, *args, **kwargs), tuple)
                return (hidden,) if self._returns_tuple else hidden

            return record

        with replaced_forwards({block: hand_on(index, block.forward) for index, block in enumerate(self.blocks)}):
            yield


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules other forwards within the context."""
    # Set on the instance, where it shadows the method of the class, and removed again.
    replaced = [(module, module.__dict__.get("forward")) for module in forwards]
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in replaced:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own


def _hidden_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _zeros_like(output: Any) -> Any:
    hidden = torch.zeros_like(_hidden_of(output))
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _share_equal(new: Any, old: Any) -> Any:
    """Replace tensors in `new` by equal ones at the same place in `old`, so that windows of one length share masks."""
    if isinstance(new, Tensor):
        same = isinstance(old, Tensor) and new.shape == old.shape and new.dtype == old.dtype and new.device == old.device
        return old if same and (new is old or torch.equal(new, old)) else new
    if isinstance(new, dict) and isinstance(old, dict):
        return {name: _share_equal(value, old.get(name)) for name, value in new.items()}
    if type(new) in (list, tuple) and type(old) is type(new) and len(new) == len(old):
        return type(new)(_share_equal(a, b) for a, b in zip(new, old, strict=True))
    return new

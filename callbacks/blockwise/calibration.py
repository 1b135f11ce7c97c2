"""CalibrationStream: hidden states of this process's calibration batches, block by block, and positions of their samples."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from callbacks.blockwise.placement import Spill, has_spare, make_room
from callbacks.blockwise.update_rules.windows import RuleWindows
from lightning_modules.base.prunable import PrunableModule
from lightning_modules.parts.block_stream import replaced_forwards


class CalibrationStream:
    """Moves calibration batches through the chain of blocks of a module.

    Args:
        module: The module.
        windows: Pass windows of the batches on to the update rule.
        num_batches: Number of batches of this process.
        dense: Whether to follow the hidden states of the dense model beside those of the pruned one.
        spill: Files of a streamed run for hidden states that host memory has no room for; None keeps them there.
    """

    def __init__(
        self,
        module: PrunableModule,
        windows: RuleWindows,
        num_batches: int,
        dense: bool = False,
        spill: Spill | None = None,
    ) -> None:
        # Bound here, since DDP may wrap the module before the first calibration step.
        self._forward, self._positions_of = module.calibration_forward, module.sample_positions
        self._stream = module.block_stream()
        self._dense = module.block_stream() if dense else None
        self._windows, self._num_batches, self._spill = windows, num_batches, spill
        self.class_tokens = module.class_tokens
        """Number of leading tokens of a sample that are class tokens."""
        self._positions: dict[int, Tensor] = {}
        self._same: list[Tensor] = []
        self._has_room: bool | None = None
        self._shortcuts: dict[int, dict[nn.Module, Callable[..., Any]]] = {}
        """Batch -> submodule of the present block -> forward that takes less and gives the same."""

    def capture(self, batch: Any, key: int) -> None:
        """Store the inputs of the first block for batch number `key`."""
        positions = self._positions_of(batch)
        self._positions[key] = positions.cpu()
        self._stream.capture(key, lambda: self._forward(batch))
        streams = [self._stream] if self._dense is None else [self._stream, self._dense]
        if self._dense is not None:
            self._dense.adopt(key, self._stream)
        if key == 0:
            make_room(streams, self._num_batches, positions.device, self._spill)
        self._windows.see(batch, positions)

    def propagate(self, batch: Any, key: int, index: int) -> None:
        """Send the hidden states of a batch through block `index`."""
        positions, known = self._positions_of(batch), self._positions.get(key)
        self._same.append(_equal(positions, positions[:0] if known is None else known))
        with replaced_forwards(self._shortcuts.pop(key, {})):
            self._stream.advance(key, index)

    def run(self, key: int, index: int, dense: bool = False) -> Tensor:
        """Return the output of block `index` on the pruned or the dense model's hidden states of a batch, replacing none."""
        if dense:
            return self._dense.run(key, index)
        with replaced_forwards(self._shortcuts.get(key, {})):
            return self._stream.run(key, index)

    def shorten(self, key: int, submodule: nn.Module, forward: Callable[..., Any]) -> None:
        """Give a submodule of the present block another forward, for this batch and the pruned model's hidden states only.

        Args:
            key: Number of the batch.
            submodule: The submodule.
            forward: Takes its arguments and returns what it would return, until the batch has passed the pruned block.
        """
        self._shortcuts.setdefault(key, {})[submodule] = forward

    def block(self, index: int) -> nn.Module:
        """Return block `index`."""
        return self._stream.blocks[index]

    def hidden(self, key: int, dense: bool = False) -> Tensor:
        """Return the hidden states of a batch, in the pruned or in the dense model, (samples, tokens, features)."""
        return (self._dense if dense else self._stream).hidden(key)

    @property
    def keys(self) -> list[int]:
        """Numbers of the batches."""
        return list(self._positions)

    @property
    def follows_dense(self) -> bool:
        """Whether the hidden states of the dense model are here too."""
        return self._dense is not None

    def replace_dense(self, key: int, hidden: Tensor) -> None:
        """Replace the dense model's hidden states of a batch."""
        self._dense.replace(key, hidden)

    def has_room_for(self, num_bytes: int, device: torch.device) -> bool:
        """Return whether so much can be kept of every batch beside the hidden states; answered once, for all blocks.

        A streamed run saves host memory in any case.
        """
        if self._has_room is None:
            saves = self._spill is not None and device.type == "cpu"
            self._has_room = not saves and has_spare(num_bytes * self._num_batches, device)
        return self._has_room

    def positions(self, key: int) -> Tensor:
        """Return the positions of a batch's samples in the calibration set, (samples,), on the CPU."""
        return self._positions[key]

    def end_epoch(self, first: bool) -> None:
        """Check the batches of this epoch.

        Args:
            first: Whether this epoch captured the batches.

        Raises:
            ValueError: If they differ from those of the first epoch, or two processes have the same sample.
        """
        if self._same and not torch.stack(self._same).all():
            raise ValueError("The train dataloader gives other batches in this epoch. Turn its shuffling off.")
        self._same.clear()
        if first:
            self._windows.seen_all([position for batch in self._positions.values() for position in batch.tolist()])

    def clear(self) -> None:
        """Free the hidden states, which are larger than a small model."""
        self._stream.clear()
        if self._dense is not None:
            self._dense.clear()
        self._positions.clear()
        self._shortcuts.clear()


def _equal(a: Tensor, b: Tensor) -> Tensor:
    """Return whether two tensors are equal, as a tensor on the device of `a`, without waiting for it."""
    return (
        (a == b.to(a.device, non_blocking=True)).all() if a.shape == b.shape else torch.zeros((), dtype=bool, device=a.device)
    )

"""CalibrationStream: hidden states of this process's calibration batches, block by block, and positions of their samples."""

from typing import Any

import torch
from torch import Tensor

from callbacks.blockwise.placement import fits
from callbacks.blockwise.update_rules.windows import RuleWindows
from lightning_modules.base.prunable import PrunableModule
from lightning_modules.parts.block_stream import BlockStream


class CalibrationStream:
    """Moves calibration batches through the chain of blocks of a module.

    Args:
        module: The module.
        windows: Pass windows of the batches on to the update rule.
        num_batches: Number of batches of this process.
    """

    def __init__(self, module: PrunableModule, windows: RuleWindows, num_batches: int) -> None:
        # Bound here, since DDP may wrap the module before the first calibration step.
        self._forward, self._positions_of = module.calibration_forward, module.sample_positions
        self._stream = BlockStream(list(module.blocks.values()))
        self._windows, self._num_batches = windows, num_batches
        self._positions: dict[int, Tensor] = {}
        self._same: list[Tensor] = []

    def capture(self, batch: Any, key: int) -> None:
        """Store the inputs of the first block for batch number `key`."""
        positions = self._positions_of(batch)
        self._positions[key] = positions.cpu()
        self._stream.capture(key, lambda: self._forward(batch))
        if key == 0 and not fits(self._stream.hidden(0).nbytes * self._num_batches, positions.device):
            self._stream.move_to_host()
        self._windows.see(batch, positions)

    def propagate(self, batch: Any, key: int, index: int) -> None:
        """Send the hidden states of a batch through block `index`."""
        positions, known = self._positions_of(batch), self._positions.get(key)
        self._same.append(_equal(positions, positions[:0] if known is None else known))
        self._stream.advance(key, index)

    def run(self, key: int, index: int) -> None:
        """Run block `index` on the hidden states of a batch, without replacing them."""
        self._stream.run(key, index)

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
        self._positions.clear()


def _equal(a: Tensor, b: Tensor) -> Tensor:
    """Return whether two tensors are equal, as a tensor on the device of `a`, without waiting for it."""
    return (
        (a == b.to(a.device, non_blocking=True)).all() if a.shape == b.shape else torch.zeros((), dtype=bool, device=a.device)
    )

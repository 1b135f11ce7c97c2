"""FinishedBlocks: which blocks a run need not prune again, since it, or one that died, has left them in a PruningState.

The first process has the files; the others are told.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from callbacks.blockwise.block_pruner import BlockPruner
from callbacks.blockwise.processes import Processes
from callbacks.blockwise.records import BlockRecord
from callbacks.blockwise.resume.fingerprint import circumstances_of, digests_of
from callbacks.blockwise.resume.state import PruningState
from callbacks.blockwise.settings import PruningSettings
from callbacks.blockwise.targets import Targets
from callbacks.blockwise.update_rules.attention_step import AttentionStep
from callbacks.blockwise.update_rules.windows import RuleWindows
from lightning_modules.base.prunable import PrunableModule

RNG_STATE = "rng_state"
"""Its name among the tensors of a finished block."""


class FinishedBlocks:
    """The blocks of one run that are finished; nothing is kept without a directory.

    Args:
        processes: Of the run.
        directory: Where they are kept, or None.
    """

    def __init__(self, processes: Processes, directory: Path | None = None) -> None:
        self._processes = processes
        self._state = None if directory is None else PruningState(directory)
        self.number = 0
        """How many an earlier run has finished."""
        self.seconds = 0.0
        """Time that they took."""

    def open(self, trainer: Trainer, module: PrunableModule, settings: PruningSettings, windows: RuleWindows) -> None:
        """Find what an earlier run has finished.

        Raises:
            ValueError: As `PruningState.open`.
        """
        identity = self._processes.in_first(module.identity) or {}
        read = digests_of(trainer, self._processes, windows.of_source())
        fingerprint = identity | read | circumstances_of(module, settings, trainer, self._processes)
        self.number = self._processes.from_first(self._processes.in_first(lambda: self._state.open(fingerprint)))
        if self.number:
            rank_zero_info(
                f"An earlier run has finished {self.number} of {trainer.fit_loop.max_epochs} blocks: going on after them."
            )

    def targets(self, make: Callable[[], Targets | None]) -> Targets | None:
        """Those of the run that this one goes on with, as they lie beside its first block, or else made now."""
        if not self.number:
            return make()
        _, content = self._processes.in_first(lambda: self._state.read(0)) or ({}, {})
        return Targets.from_json(self._processes.from_first(content)["targets"])

    def keep(self, epoch: int, weights: Mapping[str, Tensor], record: BlockRecord, pruner: BlockPruner, seconds: float) -> None:
        """Write a block that this run has finished.

        Args:
            epoch: The block, counted over all runs over the blocks.
            weights: Its pruned weights.
            record: Of the block.
            pruner: Has pruned it.
            seconds: Time that all blocks so far took.
        """
        if self._state is None:
            return
        content = {"record": asdict(record), "calibration": self._processes.from_first(pruner.calibration), "seconds": seconds}
        content["targets"] = None if pruner.targets is None else pruner.targets.as_json()
        tensors = dict(weights) | {RNG_STATE: torch.get_rng_state()}
        self._processes.in_first(lambda: self._state.write(epoch, tensors, content))

    def restore(
        self, epoch: int, index: int, name: str, linears: Iterable[str], pruner: BlockPruner, attention: AttentionStep | None
    ) -> BlockRecord:
        """Give a block the weights that it got then.

        Args:
            epoch: The block, counted over all runs over the blocks, as in `keep`.
            index: The block, counted in the model.
            name: Of the block.
            linears: Names of its pruned linears.
            pruner: Restores it.
            attention: Of this process, if attention is looked at.
        """
        weights, content = self._processes.in_first(lambda: self._state.read(epoch)) or ({}, {})
        content = self._processes.from_first(content)
        pruner.restore(index, name, weights, linears, attention)
        pruner.calibration, self.seconds = content["calibration"], content["seconds"]
        torch.set_rng_state(self._processes.from_first(weights.get(RNG_STATE)))
        return BlockRecord.from_dict(content["record"])

    def remove(self) -> None:
        """The run has ended well: what was kept is not needed any more."""
        if self._state is not None and self._processes.is_first:
            self._state.remove()

    def leave(self) -> None:
        """The run ends before its end: let the same command find them."""
        if self._state is not None and self._processes.is_first:
            self._state.close()
            rank_zero_info(f"Finished blocks are kept in {self._state.directory}: the same command goes on after them.")

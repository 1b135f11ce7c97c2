"""FinishedSteps: the steps that an earlier run or this one has finished, kept in a PruningState.

Only the first process has the files; the others receive what they hold.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from callbacks.blockwise.block_solver import BlockSolver
from callbacks.blockwise.quotas import Quotas
from callbacks.blockwise.records import BlockRecord
from callbacks.blockwise.resume.fingerprint import Fingerprint
from callbacks.blockwise.resume.state import PruningState
from callbacks.blockwise.streaming import PrunedShards
from callbacks.blockwise.update_rules.monitor import AttentionMonitor
from utilities.distributed import Processes

RNG_STATE = "rng_state"
"""Name of the random state among the tensors of a finished block."""


class FinishedSteps:
    """Finished steps of one run. Without a directory nothing is kept for another run.

    Args:
        processes: Processes of the run.
        directory: Directory of the kept blocks, or None.
        shards: Take the weights of the blocks, if these are streamed.
    """

    def __init__(self, processes: Processes, directory: Path | None = None, shards: PrunedShards | None = None) -> None:
        self.number = 0
        """Number of steps that an earlier run has finished."""
        self.seconds = 0.0
        """Time that these steps took."""
        self._processes = processes
        self._shards = shards
        self._state = None if directory is None else PruningState(directory, None if shards is None else shards.check)
        self._written = 0

    def open(self, fingerprint: Fingerprint, total: int) -> None:
        """Find the steps that an earlier run has finished.

        Args:
            fingerprint: Fingerprint of this run.
            total: Number of steps over all rounds.

        Raises:
            ValueError: As `PruningState.open`.
        """
        self.number = self._processes.first_of(lambda: self._state.open(fingerprint))
        if self.number:
            rank_zero_info(f"An earlier run has finished {self.number} of {total} blocks: continuing after them.")

    def quotas(self, make: Callable[[], Quotas | None]) -> Quotas | None:
        """Return the quotas of the run that this one continues, kept with its first block; else make new ones."""
        if not self.number:
            return make()
        _, content = self._processes.in_first(lambda: self._state.read(0)) or ({}, {})
        return Quotas.from_json(self._processes.from_first(content)["quotas"])

    def keep(
        self, number: int, weights: Mapping[str, Tensor], record: BlockRecord, solver: BlockSolver, seconds: float
    ) -> None:
        """Write a block that this run has finished.

        Args:
            number: Number of the step over all rounds.
            weights: Linear -> pruned weight.
            record: Record of the block.
            solver: Solver that pruned it.
            seconds: Time that all steps so far took.
        """
        written = {} if self._shards is None else self._shards.write(number, record.name)
        if self._state is None:
            return
        content = {"record": asdict(record), "calibration": self._processes.from_first(solver.calibration), "seconds": seconds}
        content |= {"quotas": None if solver.quotas is None else solver.quotas.as_json()} | written
        tensors = ({} if written else dict(weights)) | {RNG_STATE: torch.get_rng_state()}
        self._processes.in_first(lambda: self._state.write(number, tensors, content))
        self._written += 1

    def restore(
        self,
        number: int,
        index: int,
        name: str,
        linears: Iterable[str],
        solver: BlockSolver,
        attention: AttentionMonitor | None,
    ) -> BlockRecord:
        """Give a block the weights that the earlier run has kept.

        Args:
            number: Number of the step over all rounds.
            index: Index of the block in the model.
            name: Name of the block.
            linears: Names of its pruned linears.
            solver: Solver that writes the weights.
            attention: Follows attention in the first process, if attention is measured.

        Returns:
            The record of the block.
        """
        weights, content = self._processes.in_first(lambda: self._state.read(number)) or ({}, {})
        content = self._processes.from_first(content)
        if self._shards is None:
            solver.restore(index, lambda: solver.assign(name, weights, linears), attention)
        else:
            give = functools.partial(self._shards.restore, number, name)
            self._processes.together(lambda: solver.restore(index, give, attention))
        solver.calibration, self.seconds = content["calibration"], content["seconds"]
        torch.set_rng_state(self._processes.from_first(weights.get(RNG_STATE)))
        return BlockRecord.from_dict(content["record"])

    def remove(self) -> None:
        """Delete the files, once the run has ended well."""
        if self._state is not None and self._processes.is_first:
            self._state.remove()

    def leave(self) -> None:
        """Release the files for the next run, which continues after them."""
        if self._state is None or not self._processes.is_first or not self._state.is_open:
            return
        self._state.close()
        if self.number + self._written:
            rank_zero_info(
                f"{self.number + self._written} finished blocks are kept in {self._state.directory}: the same command "
                "continues after them."
            )

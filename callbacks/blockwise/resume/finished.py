"""FinishedSteps: the steps that an earlier run or this one has finished, kept in a PruningState.

Only the first process has the files; the others receive what they hold. The weights of a streamed block, and then its record,
are written while the next block is pruned.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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
        self._writer = ThreadPoolExecutor(1, "shards")
        self._in_flight: tuple[int, str, Future | None] | None = None
        """Number and name of the block that is being written, and its writing, which the first process has."""

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
        """Write a block that this run has finished; a streamed one after the block before, and not at once.

        Args:
            number: Number of the step over all rounds.
            weights: Linear -> pruned weight.
            record: Record of the block.
            solver: Solver that pruned it.
            seconds: Time that all steps so far took.
        """
        self.settle()
        if self._state is None and self._shards is None:
            return
        content = {"record": asdict(record), "calibration": self._processes.from_first(solver.calibration), "seconds": seconds}
        content |= {"quotas": None if solver.quotas is None else solver.quotas.as_json()}
        tensors = {RNG_STATE: torch.get_rng_state()}
        if self._shards is None:
            self._processes.in_first(lambda: self._state.write(number, dict(weights) | tensors, content))
            self._written += 1
            return
        write = self._shards.writer(number, record.name)

        def write_both() -> None:
            written = write()
            if self._state is not None:
                self._state.write(number, tensors, content | written)

        writing = self._writer.submit(write_both) if self._processes.is_first else None
        self._in_flight = number, record.name, writing

    def settle(self) -> None:
        """Wait for the block that is being written, and read it from there from now on.

        Raises:
            OSError: If it could not be written, as on a full disk.
            RuntimeError: If this happened in another process.
        """
        if self._in_flight is None:
            return
        number, name, writing = self._in_flight
        self._in_flight = None
        self._processes.in_first(lambda: writing.result())
        self._shards.take(number, name)
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
        self._writer.shutdown()
        if self._state is not None and self._processes.is_first:
            self._state.remove()

    def leave(self) -> None:
        """Release the files for the next run, which continues after them, once the last block is written."""
        writing = None if self._in_flight is None else self._in_flight[2]
        if writing is not None and writing.exception() is None:
            self._written += 1
        self._in_flight = None
        self._writer.shutdown()
        if self._state is None or not self._processes.is_first or not self._state.is_open:
            return
        self._state.close()
        if self.number + self._written:
            rank_zero_info(
                f"{self.number + self._written} finished blocks are kept in {self._state.directory}: the same command "
                "continues after them."
            )

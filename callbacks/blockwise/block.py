"""BlockStep: one block on its way from dense to pruned.

    calibrate    batch by batch: the block before, already pruned, passes its outputs on; they go through this block, whose
                 linears collect statistics
    solve        once all batches have passed: statistics become weights

The inputs of a block are thus the outputs of the pruned blocks before it, as in SparseGPT and D²Prune.
"""

import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from callbacks.blockwise.block_solver import BlockSolver
from callbacks.blockwise.calibration import CalibrationStream
from callbacks.blockwise.records import BlockRecord
from callbacks.blockwise.settings import PruningSettings
from callbacks.blockwise.statistics import StatisticsCollector
from callbacks.blockwise.update_rules.monitor import AttentionMonitor
from lightning_modules.parts.architectures import PrunableLinear


class BlockStep:
    """One block of one round.

    Args:
        index: Index of the block in the model.
        name: Full name of the block.
        linears: Name within the block -> linear that is pruned now; empty for a block that is restored.
        methods: Linear -> method.
        stream: Hidden states of the calibration batches.
        settings: Settings of the run.
    """

    def __init__(
        self,
        index: int,
        name: str,
        linears: Mapping[str, PrunableLinear],
        methods: Mapping[str, str],
        stream: CalibrationStream,
        settings: PruningSettings,
    ) -> None:
        self.index, self.name, self.methods = index, name, methods
        self._stream = stream
        self._collector = StatisticsCollector(linears, settings.precision, settings.updates)
        self._started = time.perf_counter()

    @torch.no_grad()
    def calibrate(self, batch: Any, key: int) -> None:
        """Propagate batch number `key` through the block before, and collect statistics of this one."""
        if self.index == 0:
            self._stream.capture(batch, key)
        else:
            self._stream.propagate(batch, key, self.index - 1)
        if self._collector.linears:
            with self._collector.collecting(self._stream.positions(key)):
                self._stream.run(key, self.index)

    def solve(
        self, solver: BlockSolver, attention: AttentionMonitor | None, loggers: list[Logger], histograms: bool
    ) -> BlockRecord:
        """Prune the block from its statistics.

        Args:
            solver: Solver of the run.
            attention: Follows attention in the first process, if attention is measured.
            loggers: Receive attention maps and histograms.
            histograms: Whether to log histograms of the scores.

        Returns:
            The record of the block, with times.
        """
        collected = time.perf_counter()
        record = BlockRecord(name=self.name, seconds_statistics=collected - self._started)
        record = solver.prune(self.index, self._collector, self.methods, attention, record, loggers, histograms)
        synchronize(next(iter(self.weights().values())).device if self.methods else torch.device("cpu"))
        record.seconds_solve = time.perf_counter() - collected - record.seconds_rule
        return record

    def weights(self) -> dict[str, Tensor]:
        """Return name -> present weight of the pruned linears."""
        return {name: linear.weight for name, linear in self._collector.linears.items()}


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, so that clocks measure its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize()

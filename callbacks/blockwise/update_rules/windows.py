"""RuleWindows: brings the windows on which attention is measured to the first process, which alone measures it.

They come from the rule's `source`, or they are the first calibration windows, whichever process has them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from torch import Tensor

from callbacks.blockwise.update_rules.attention import AttentionRule
from callbacks.blockwise.update_rules.monitor import AttentionMonitor
from lightning_modules.base.prunable import PrunableModule
from utilities.contract import data_of
from utilities.distributed import Processes


class RuleWindows:
    """Feeds windows to an AttentionMonitor.

    Args:
        trainer: Trainer of the run.
        module: The model.
        rule: Rule with the number and the source of the windows.
        processes: Processes of the run.
    """

    def __init__(self, trainer: Trainer, module: PrunableModule, rule: AttentionRule, processes: Processes) -> None:
        self._trainer, self._module, self._rule, self._processes = trainer, module, rule, processes
        self._attention: AttentionMonitor | None = None
        self._wanted = False
        self._samples: dict[int, Any] = {}

    def start(self, attention: AttentionMonitor | None, wanted: bool) -> None:
        """Begin a round.

        Args:
            attention: Monitor to feed, in the first process; None in others.
            wanted: Whether attention is measured in this round; the same in all processes.
        """
        self._attention, self._wanted, self._samples = attention, wanted, {}
        if attention is not None:
            for batch in self.of_source():
                attention.feed(batch, len(self._module.sample_positions(batch)))

    def of_source(self) -> Iterator[Any]:
        """Yield batches of the rule's source; none without a source, and none in other processes than the first.

        Raises:
            ValueError: If the data module cannot read it.
        """
        if self._rule.source is None or not self._processes.is_first:
            return
        for batch in data_of(self._trainer).rule_dataloader(self._rule.source, self._rule.windows):
            yield self._trainer.strategy.batch_to_device(batch)

    def see(self, batch: Any, positions: Tensor) -> None:
        """Take the wanted windows of a calibration batch, when it is captured.

        Args:
            batch: The batch.
            positions: Positions of its samples in the calibration set.
        """
        if not self._wanted or self._rule.source is not None:
            return
        if self._processes.size == 1:
            self._attention.feed(batch, len(positions))
            return
        for sample, position in enumerate(positions.tolist()):
            if position < self._rule.windows:
                chosen = self._module.select_samples(batch, slice(sample, sample + 1))
                self._samples[position] = move_data_to_device(chosen, torch.device("cpu"))

    def seen_all(self, positions: list[int]) -> None:
        """Send the windows of all processes to the first one, in their order, after every calibration batch was captured.

        Args:
            positions: Positions of this process's samples.

        Raises:
            ValueError: If two processes have the same sample.
        """
        if self._processes.size == 1:
            return
        everyone = [position for share in self._processes.gather(positions) for position in share]
        if len(set(everyone)) != len(everyone):
            raise ValueError(
                "Some calibration samples reach several processes: the dataloader's sampler repeats them. Use a data module of "
                "this project, or a sampler that does not (datamodules/shards.py)."
            )
        shares, self._samples = self._processes.gather(self._samples), {}
        if self._attention is not None:
            samples = {position: sample for share in shares for position, sample in share.items()}
            for position in sorted(samples):
                self._attention.feed(self._trainer.strategy.batch_to_device(samples[position]), 1)

"""RuleWindows: which windows the attention rule looks at, and how they reach the first process, which alone looks.

They are those of `rule_source` or else the first calibration windows, whichever process has them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from torch import Tensor

from callbacks.blockwise.processes import Processes
from callbacks.blockwise.settings import PruningSettings
from callbacks.blockwise.update_rules.attention_step import AttentionStep
from lightning_modules.base.prunable import PrunableModule


class RuleWindows:
    """Feeds an AttentionStep.

    Args:
        trainer: Of the run.
        module: The model.
        settings: Of the run.
        processes: Of the run.
    """

    def __init__(self, trainer: Trainer, module: PrunableModule, settings: PruningSettings, processes: Processes) -> None:
        self._trainer, self._module, self._settings, self._processes = trainer, module, settings, processes
        self._attention: AttentionStep | None = None
        self._wanted = False
        self._samples: dict[int, Any] = {}

    def start(self, attention: AttentionStep | None, wanted: bool) -> None:
        """A run begins: `attention` is what is to be fed, in the first process; `wanted` says in all whether it looks."""
        self._attention, self._wanted, self._samples = attention, wanted, {}
        if attention is not None:
            for batch in self.of_source():
                self._feed(batch, len(self._module.sample_positions(batch)))

    def of_source(self) -> Iterator[Any]:
        """Batches of `rule_source`; none without it, and in other processes than the first.

        Raises:
            ValueError: If the data module cannot read it.
        """
        data = self._trainer.datamodule
        if self._settings.rule_source is None or not self._processes.is_first:
            return
        if not hasattr(data, "rule_dataloader"):
            raise ValueError(
                f"Argument `rule_source` needs a data module that reads it, but {type(data).__name__} has no rule_dataloader. "
                "Leave it out: the rule then looks at calibration data."
            )
        for batch in data.rule_dataloader(self._settings.rule_source, self._settings.rule_windows):
            yield self._trainer.strategy.batch_to_device(batch)

    def see(self, batch: Any, positions: Tensor) -> None:
        """A calibration batch comes by for the first time."""
        if not self._wanted or self._settings.rule_source is not None:
            return
        if self._processes.size == 1:
            self._feed(batch, len(positions))
            return
        for sample, position in enumerate(positions.tolist()):
            if position < self._settings.rule_windows:
                chosen = self._module.select_samples(batch, slice(sample, sample + 1))
                self._samples[position] = move_data_to_device(chosen, torch.device("cpu"))

    def seen_all(self, positions: list[int]) -> None:
        """All calibration batches have come by; with several processes the windows now go to the first, in their order.

        Raises:
            ValueError: If two processes have seen the same sample.
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
                self._feed(self._trainer.strategy.batch_to_device(samples[position]), 1)

    def _feed(self, batch: Any, samples: int) -> None:
        if self._attention is not None:
            self._attention.feed(batch, samples)

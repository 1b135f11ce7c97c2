"""AttentionMonitor: follows the attention of the dense and of the pruned model from block to block.

It feeds windows to the probe, which measures attention, lets the rule choose among candidates, writes measures into the record
of a block and draws attention maps in TensorBoard. BlockSolver calls it.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor

from callbacks.blockwise.records import BlockRecord
from callbacks.blockwise.update_rules.attention import AttentionRule, Selection, State, update_share
from callbacks.blockwise.update_rules.figure import attention_figure
from callbacks.blockwise.update_rules.probe import AttentionProbe
from functional.pruning import PruneResult
from lightning_modules.base.prunable import PrunableModule
from lightning_modules.parts.architectures import PrunableLinear


class AttentionMonitor:
    """Attention of one round: `feed` windows, then per block `enter`, `choose` if there is a choice, `leave`.

    Args:
        module: The model, still dense.
        rule: Rule that chooses; under other rules, an AttentionRule whose settings say how attention is measured.
        drawn: Indices of the blocks whose attention maps are drawn.
        forward_context: Context of the model's forward, such as autocast.
    """

    def __init__(
        self,
        module: PrunableModule,
        rule: AttentionRule,
        drawn: set[int],
        forward_context: Callable[[], AbstractContextManager],
    ) -> None:
        self._module, self._rule, self._drawn, self._context = module, rule, drawn, forward_context
        self._probe = AttentionProbe(module, rule.reference, "all" if rule.objective == "divergence" else "first")
        self._selection: Selection | None = None
        self.seconds = 0.0
        """Time spent on the block that was entered last."""

    def feed(self, batch: Any, samples: int) -> None:
        """Take windows of a batch until there are as many as the rule wants; one by one, so that batching does not matter.

        Args:
            batch: The batch.
            samples: Number of its samples.
        """
        for sample in range(min(samples, self._rule.windows - self._probe.num_windows)):
            with self._context():
                self._probe.capture(self._module.select_samples(batch, slice(sample, sample + 1)), 1)

    def enter(self, index: int) -> None:
        """Measure block `index` before its weights change."""
        self.seconds, self._selection = 0.0, None
        with self._timed():
            self._probe.enter(index)

    def choose(
        self, linears: Mapping[str, PrunableLinear], options: Mapping[str, Mapping[str, PruneResult]]
    ) -> tuple[State, dict[str, PruneResult]]:
        """Let the rule choose the states of the block that was entered last.

        Args:
            linears: Role -> linear of the block.
            options: Role -> state -> result; `updated` first.

        Returns:
            Role -> chosen state, and role -> its result.
        """
        with self._timed():
            self._selection = self._rule.choose(self._probe, linears, options)
        return self._selection.best.state, self._selection.results

    def leave(self, index: int, record: BlockRecord, loggers: list[Logger]) -> None:
        """Measure block `index` after it was pruned.

        Args:
            index: Index of the block in the model.
            record: Record of the block, which receives the measures.
            loggers: TensorBoard among them receives attention maps.
        """
        with self._timed():
            record.attention, maps = self._probe.leave(index)
        if self._selection is not None:
            best = self._selection.best
            record.choice = best.name
            record.update_shares = {role: update_share(state) for role, state in best.state.items()}
            record.candidates = [{"name": candidate.name} | asdict(candidate) for candidate in self._selection.candidates]
        if maps and index in self._drawn:
            self._draw(index, record, maps, loggers)
        record.seconds_rule = self.seconds

    def pass_by(self, index: int) -> None:
        """Move on past a block that an earlier run has measured."""
        with self._context():
            self._probe.pass_by(index)

    def clear(self) -> None:
        """Free the hidden states."""
        self._probe.clear()
        self._selection = None

    def _draw(self, index: int, record: BlockRecord, maps: list[Tensor], loggers: list[Logger]) -> None:
        panels = {"dense": maps[0]}
        if self._selection is not None:
            panels["all updated"] = self._selection.map_updated
        panels[f"pruned: {record.choice}" if record.choice else "pruned"] = maps[1]
        for logger in loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("attention_map", attention_figure(panels, record.name), index)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        with self._context():
            yield
        self.seconds += time.perf_counter() - start

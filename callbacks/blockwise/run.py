"""PruningRun: one pruning fit from its first batch to its saved model. BlockwisePruning makes it and calls it hook by hook.

A *run* is one fit, perhaps continued after a kill. A *round* goes once over all blocks; the perplexity rule makes three. A
*step* is one block of one round, and one epoch of the Trainer. Steps that an earlier run *finished* are restored from disk.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from callbacks.base.model_card import write_card
from callbacks.base.validation import validate_within_fit
from callbacks.blockwise.block import BlockStep, synchronize
from callbacks.blockwise.block_solver import BlockSolver
from callbacks.blockwise.calibration import CalibrationStream
from callbacks.blockwise.placement import Placement, spill_of
from callbacks.blockwise.plan import Plan, plan_of, pruned_roles
from callbacks.blockwise.progress import BlockProgressBar
from callbacks.blockwise.quotas import quotas_of
from callbacks.blockwise.records import BlockRecord
from callbacks.blockwise.result import REPORT, pruning_card, publish, report_of
from callbacks.blockwise.resume.fingerprint import fingerprint_of
from callbacks.blockwise.resume.finished import FinishedSteps
from callbacks.blockwise.settings import PruningSettings
from callbacks.blockwise.streaming import PrunedShards
from callbacks.blockwise.update_rules import AttentionRule, PerplexityRule
from callbacks.blockwise.update_rules.monitor import AttentionMonitor
from callbacks.blockwise.update_rules.perplexity import Rounds
from callbacks.blockwise.update_rules.windows import RuleWindows
from lightning_modules.base.prunable import PrunableModule
from utilities.distributed import Processes
from utilities.files import OutputDirectory, write_json
from utilities.reporting import log_scalars, peak_memory_gib


@dataclass(frozen=True)
class Diagnostics:
    """Measurements and drawings beside the pruning itself.

    Args:
        attention: Whether attention is measured with update rules that do not need it.
        attention_maps: Indices of the blocks whose attention maps are drawn; first, middle and last when None.
        histograms: Whether TensorBoard gets histograms of the scores of kept and pruned weights.
    """

    attention: bool = False
    attention_maps: list[int] | None = None
    histograms: bool = False

    def check(self, settings: PruningSettings) -> None:
        """Check that attention is measured if maps of it are wanted.

        Raises:
            ValueError: If it is not.
        """
        measured = self.attention or isinstance(settings.update_rule, AttentionRule)
        if self.attention_maps is not None and not measured:
            raise ValueError(
                f"Argument `diagnostics.attention_maps` = {self.attention_maps} needs attention to be measured, but "
                f"`update_rule` is {settings.update_rule!r}. Set `diagnostics.attention: true`, or leave it out."
            )

    def check_maps(self, num_blocks: int) -> None:
        """Check that the model has the blocks whose maps are wanted.

        Raises:
            ValueError: If it lacks one.
        """
        if any(not 0 <= index < num_blocks for index in self.attention_maps or ()):
            raise ValueError(
                f"Argument `diagnostics.attention_maps` expected to name some of {num_blocks} blocks but got "
                f"{self.attention_maps}."
            )


class PruningRun:
    """One pruning fit.

    Args:
        trainer: Trainer of the run, with its dataloaders set up.
        module: Module of the run, dense, on its device.
        settings: Settings on which the result depends.
        diagnostics: Measurements beside the pruning itself.
        plan: Plan of the first round.
        output: Directory of the result; open.
        state: Directory for finished steps; None keeps none.
        placement: Moves blocks between device and host memory.
        processes: Processes that share the work.
        save_compressed: Whether the result is stored as masks and values.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: PrunableModule,
        settings: PruningSettings,
        diagnostics: Diagnostics,
        plan: Plan,
        output: OutputDirectory,
        state: Path | None,
        placement: Placement,
        processes: Processes,
        save_compressed: bool = False,
    ) -> None:
        self.records: list[BlockRecord] = []
        """Records of the blocks of this round; after `finish`, those of the best round."""
        self.metrics: dict[str, dict[str, float]] = {}
        """dense and pruned, and with the perplexity rule hold_q, hold_k and hold_v -> metric -> value."""
        self.seconds = 0.0
        """Time of the whole run, dense validation included; set at its end."""
        self._trainer, self._module, self._settings, self._diagnostics = trainer, module, settings, diagnostics
        self._plan, self._output, self._placement, self._processes = plan, output, placement, processes
        self._save_compressed = save_compressed
        self._blocks = list(module.blocks)
        self._rounds_held = settings.update_rule.rounds(pruned_roles(module, plan))
        self._started = time.perf_counter()
        self._modes: dict[nn.Module, bool] = {}
        rule = settings.update_rule if isinstance(settings.update_rule, AttentionRule) else AttentionRule()
        self._windows = RuleWindows(trainer, module, rule, processes)
        self._rule = rule
        self._spill = None if module.streamed is None else spill_of(trainer, output.scratch, processes)
        self._stream = self._new_stream()
        self._attention: AttentionMonitor | None = None
        kept = (output.scratch if state is None else state) / "shards"
        shards = None if module.streamed is None else PrunedShards(module.streamed, kept, processes)
        self._finished = FinishedSteps(processes, state, shards)
        self._keeps = state is not None
        self._solver = BlockSolver(module, settings, processes)
        self._rounds: Rounds | None = None
        self._step: BlockStep | None = None
        self._number = -1
        """Number of the present step over all rounds."""

    @property
    def num_steps(self) -> int:
        """Number of steps over all rounds."""
        return len(self._blocks) * len(self._rounds_held)

    def start(self) -> None:
        """Find finished steps, allocate zeros, validate the dense model.

        Raises:
            ValueError: If finished steps belong to another run, or the update rule lacks held-out data.
            RuntimeError: If processes hold different models.
        """
        self._modes = {module: module.training for module in self._module.modules()}
        self._module.eval()
        if self._processes.size > 1:
            self._processes.check_equal(self._module.checksum(), "The model")
        if self._keeps:
            given = self._trainer, self._module, self._settings, self._processes
            self._finished.open(fingerprint_of(*given, self._windows.of_source()), self.num_steps)
        given = self._trainer, self._module, self._settings, self._plan, self._placement, self._processes, self._spill
        quotas = self._finished.quotas(lambda: quotas_of(*given))
        self._solver = BlockSolver(self._module, self._settings, self._processes, quotas)
        self.metrics["dense"] = self.validate()
        log_scalars(self._trainer.loggers, self.metrics["dense"], step=0)
        if isinstance(self._settings.update_rule, PerplexityRule):
            self._rounds = self._start_rounds()

    # One step: begin, calibrate with every batch, end.

    def begin_step(self, number: int) -> None:
        """Prepare the block of a step.

        Args:
            number: Number of the step over all rounds.
        """
        device = self._module.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        round_index, index = divmod(number, len(self._blocks))
        self._number = number
        captured = index == 0 and not self._module.architecture.uniform  # by running every block
        self._placement.hold(range(max(index - 1, 0), len(self._blocks) if captured else index + 1))
        if index == 0:
            self._begin_round(round_index)
        name = self._blocks[index]
        linears = self._module.linears(self._module.blocks[name])
        methods = self._plan[name]
        given = self._stream, self._settings, self._processes, self._trainer.precision_plugin.forward_context
        self._step = BlockStep(index, name, linears, methods, self._is_finished(number), *given)

    def calibrate(self, batch: Any, key: int) -> None:
        """Send batch number `key` through the block before and the present one."""
        if not self._is_finished(self._round_end):
            self._step.calibrate(batch, key)

    def end_step(self) -> None:
        """Prune the present block, or restore it, and record it."""
        step, device = self._step, self._module.device
        if not self._is_finished(self._round_end):
            self._stream.end_epoch(first=step.index == 0)
        synchronize(device)
        if self._is_finished(self._number):
            place = self._number, step.index, step.name
            record = self._finished.restore(*place, step.methods, self._solver, self._attention)
        else:
            record = step.solve(self._solver, self._attention, self._trainer.loggers, self._diagnostics.histograms)
            record.peak_memory_gib = max(self._processes.gather(peak_memory_gib(device)))
            self._finished.keep(self._number, step.weights(), record, self._solver, self._seconds_now())
        self.records.append(record)
        self._show(record)
        if self._rounds is not None and len(self.records) == len(self._blocks):
            self._end_round()

    def finish(self) -> None:
        """Save the result, validate it, and complete its card and report.

        Raises:
            RuntimeError: If the trainer stopped before the last step.
        """
        if self._number + 1 != self.num_steps:
            raise RuntimeError(f"Stopped after {self._number + 1} of {self.num_steps} blocks; nothing was saved.")
        self.release()
        self._finished.settle()
        held = self._rounds_held[-1]
        if self._rounds is not None:
            best = self._rounds.finish()
            self.records, held = best.records, best.held
            self.metrics |= {f"hold_{name}": metrics for name, metrics in self._rounds.metrics.items()}
        self.seconds = self._seconds_now()
        report = self._report(held)  # saved before the pruned model is validated, which could fail
        given = self._module, self._output, report, self._card(report), self._save_compressed
        self._processes.in_first(lambda: publish(*given))
        if (streamed := self._module.streamed) is not None:
            self._processes.together(lambda: streamed.move_to(self._output.path))
        self.metrics["pruned"] = self.validate()
        log_scalars(self._trainer.loggers, self.metrics["pruned"], step=len(self._blocks))
        self._restore_modes()
        report = self._report(held)
        self._processes.in_first(lambda: write_card(self._output.path, self._card(report)))
        self._processes.in_first(lambda: write_json(self._output.path / REPORT, report))
        self._finished.remove()

    def abandon(self) -> None:
        """Release everything after an error; finished steps stay on disk."""
        self._finished.leave()
        self.release()
        if self._module.streamed is not None:
            self._module.streamed.forget_pruned()
        self._restore_modes()

    def validate(self) -> dict[str, float]:
        """Measure the model as it is now; without held-out data the result is empty."""
        with self._placement.passing():
            return validate_within_fit(self._trainer)

    def release(self) -> None:
        """Free hidden states and statistics, which are larger than a small model."""
        self._stream.clear()
        self._step = None
        if self._attention is not None:
            self._attention.clear()
            self._attention = None

    # Rounds

    def _begin_round(self, round_index: int) -> None:
        """Start over with dense weights and new hidden states."""
        self.release()
        self._stream, self.records = self._new_stream(), []
        if self._rounds is not None:
            self._rounds.restart()
            self._plan = plan_of(self._settings, self._module, self._rounds_held[round_index])
        measured = isinstance(self._settings.update_rule, AttentionRule) or self._diagnostics.attention
        measured = measured and not self._is_finished(self._round_end)
        if measured and self._processes.is_first:
            context = self._trainer.precision_plugin.forward_context
            self._attention = AttentionMonitor(self._module, self._rule, self._drawn(), context)
        self._windows.start(self._attention, measured)

    def _end_round(self) -> None:
        held, metrics = self._held, self.validate()
        tagged = {f"hold_{held}/{name}": value for name, value in metrics.items()}
        log_scalars(self._trainer.loggers, tagged, step=len(self._blocks))
        self._rounds.add(held, metrics, self.records)
        rank_zero_info(f"{held} held: {self._rounds.judge} {metrics[self._rounds.judge]:.4f}")

    def _start_rounds(self) -> Rounds:
        judge = self._module.judge
        if judge not in self.metrics["dense"]:
            raise ValueError(
                f"Argument `update_rule` = perplexity chooses by {judge} on held-out data, but there is none. Hold some out "
                "(data.num_heldout), leave trainer.limit_val_batches alone, or use another rule."
            )
        rank_zero_info(
            f"Update rule perplexity: pruning {len(self._rounds_held)} times, with {', '.join(self._rounds_held)} held."
        )
        blocks = self._module.blocks
        linears = {
            f"{block}.{name}": linear
            for block, names in self._plan.items()
            for name, linear in self._module.linears(blocks[block]).items()
            if name in names
        }
        return Rounds(linears, judge)

    @property
    def _held(self) -> str | None:
        """Projection that the present round holds; None if the rule decides block by block."""
        return self._rounds_held[self._number // len(self._blocks)]

    @property
    def _round_end(self) -> int:
        """Number of the last step of the present round."""
        return (self._number // len(self._blocks) + 1) * len(self._blocks) - 1

    def _is_finished(self, number: int) -> bool:
        """Return whether an earlier run has finished a step."""
        return number < self._finished.number

    def _new_stream(self) -> CalibrationStream:
        batches, dense = self._trainer.num_training_batches, self._settings.dense_share > 0
        return CalibrationStream(self._module, self._windows, batches, dense, self._spill)

    def _drawn(self) -> set[int]:
        count, maps = len(self._blocks), self._diagnostics.attention_maps
        return {0, count // 2, count - 1} if maps is None else set(maps)

    # Reporting

    def _show(self, record: BlockRecord) -> None:
        prefix = "" if self._rounds is None else f"hold_{self._held}/"
        values = {prefix + name: value for name, value in record.scalars().items()}
        log_scalars(self._trainer.loggers, values, step=self._step.index)
        if isinstance(bar := self._trainer.progress_bar_callback, BlockProgressBar):
            bar.block_done(self._number + 1, record)

    def _seconds_now(self) -> float:
        """Return the time of this run and of those that it continues."""
        return self._finished.seconds + time.perf_counter() - self._started

    def _report(self, held: str | None) -> dict[str, Any]:
        """Return the content of pruning.json."""
        settings = self._settings.as_dict() | ({} if held is None else {"held": held})
        run = {"settings": settings, "calibration": self._processes.from_first(self._solver.calibration)}
        run |= {"processes": self._processes.size, "metrics": self.metrics, "seconds": self.seconds}
        return report_of(self._trainer, self._module, run, self.records)

    def _card(self, report: dict[str, Any]) -> ModelCard:
        """Return the model card of the result."""
        return pruning_card(self._trainer, self._module, report, self._save_compressed)

    def _restore_modes(self) -> None:
        for module, mode in self._modes.items():
            module.training = mode
        self._modes = {}

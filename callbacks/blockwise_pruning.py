"""BlockwisePruning: D²Prune (and magnitude, Wanda, SparseGPT) as a `fit` in which an epoch is a block.

    epoch b, every batch   hidden states go through pruned block b−1, then through block b with statistics hooks on
    end of epoch b         q, k and v get their update states, block b is pruned; metrics are logged at step b
    before and after       the module's own validation: dense and pruned

The train dataloader is the calibration set. No optimizer, no backward. The perplexity rule runs over all blocks three times.
The order of events is all that this file knows: a block is BlockPruner's, the hidden states are BlockStream's, what several
processes tell each other is Processes', what a dead run leaves is FinishedBlocks'.
"""

import logging
import time
import warnings
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from callbacks.base.validation import validate_within_fit
from callbacks.blockwise.batch_size import choose_batch_size
from callbacks.blockwise.block_pruner import BlockPruner
from callbacks.blockwise.collector import StatisticsCollector
from callbacks.blockwise.placement import Offload, fits, give_back_placement
from callbacks.blockwise.processes import Processes, give_back, processes_of
from callbacks.blockwise.progress import BlockProgressBar, use_block_progress_bar
from callbacks.blockwise.records import BlockRecord, log_scalars, peak_memory_gib, write_json
from callbacks.blockwise.result import REPORT, check_output, print_summary, report_of, save_result
from callbacks.blockwise.resume.finished_blocks import FinishedBlocks
from callbacks.blockwise.settings import Method, NonUpdated, Plan, PruningSettings
from callbacks.blockwise.targets import allocate
from callbacks.blockwise.update_rules.attention_step import AttentionStep
from callbacks.blockwise.update_rules.perplexity import HeldRuns
from callbacks.blockwise.update_rules.probe import Reference
from callbacks.blockwise.update_rules.rules import Candidates, Objective, UpdateRule
from callbacks.blockwise.update_rules.windows import RuleWindows
from functional.pruning import ActivationNorm
from functional.pruning.admm import Solver
from functional.pruning.allocation import Allocation
from functional.pruning.precision import Precision
from lightning_modules.base.prunable import PrunableModule
from lightning_modules.parts.block_stream import BlockStream
from utilities.digest import checksum

log = logging.getLogger(__name__)


class BlockwisePruning(Callback):
    """Prune a PrunableModule block by block from calibration data; give either `sparsity` or `pattern`.

    Args:
        method: d2prune (d2_sparsegpt, with q, k and v as `update_rule` says), or one method for all linears.
        sparsity: Share of zeros of every pruned linear, in [0, 1).
        pattern: N:M, N zeros in every M consecutive weights of a row, such as 2:4.
        lambda1: λ1, weight of the activation term ŷ |W| x̂ in the score.
        lambda2: λ2, weight of W² x̂², which the score loses.
        scale: s in the activation norms; auto is the number of tokens of a sample.
        activation_norm: rms (Algorithm 1) or official (as the released code computes it).
        block_size: Columns of a weight that the update handles, and compares, at a time.
        damping: Share of the mean of the Hessian's diagonal that is added to it.
        precision: Of Gram matrices on a GPU, summed in float32 and over batches in float64. auto: as exact as the inputs, half
            precision multiplied as it is, float32 as float32. high: float32 as TF32, a tenth faster. highest: all as float32,
            several times slower in half precision.
        update_rule: Which of q, k, v keep their remaining weights as they are (d2prune). attention: per block, what keeps the
            attention nearest to the dense model's; outlier: per block, the one with the largest outlier ratio (Eq. 18-19);
            perplexity: prune with each held and keep the run with the lowest held-out loss (Algorithm 1); fixed: `non_updated`
            everywhere. attention for d2prune when left out.
        non_updated: What the fixed rule holds: q, k, v, none or all of them; v when left out.
        candidates: What the attention rule chooses from: single (none, q, k or v held), all (every subset), partial (each
            takes the whole update, ¾, ½, ¼ or nothing of it, or is held).
        objective: What the attention rule minimises: output (error of the attention's output) or divergence (Eq. 12).
        reference: What attention is compared with: model (the dense model on its own hidden states) or block (the dense
            block on those of the pruned model).
        rho: ρ, weight of the KL term of the divergence objective.
        rule_windows: Windows on which attention is looked at. Its output is taken of all; its probabilities (heads x seq_len² x
            4 bytes) of the first, or of all with the divergence objective.
        rule_source: Text of these windows, in the forms of the data module's `source`; the first calibration windows if None.
        log_attention: Whether to measure attention with the other rules too.
        attention_maps: Blocks whose attention maps are drawn in TensorBoard; first, middle and last when None.
        ignore: Globs of full names of linears to leave dense, such as '*.down_proj' or 'model.layers.0.*'.
        output_dir: Where the pruned model goes; `pruned` in the log directory when None.
        log_histograms: Whether to write histograms of the scores of kept and pruned weights to TensorBoard.
        resume: Whether to keep every finished block, so that the same command goes on after the last one should this run die:
            beside `output_dir`, or in `pruning_state` of the logger's directory. Removed when the run has ended well.
        offload: Whether blocks wait in the host's memory, so that a GPU needs room for two of them only. Hidden states go there
            by themselves if they do not fit.
        allocation: How the zeros of `sparsity` are shared out over blocks, their sum staying exact. uniform: alike; owl: blocks
            with more outliers among their scores lose less; error: the last weight costs all blocks the same relative error.
            The latter two look at the dense model first, in one pass of the calibration data.
        owl_threshold: M, a score is an outlier above M times its block's mean (owl).
        owl_range: Λ, how far the blocks' shares of zeros may be from `sparsity`, before their mean is made to be it (owl).
        solver: Of the weight update. obs: column by column; admm: from there on towards the least squares solution for the same
            mask (arXiv 2401.02938), taken where it lowers the error of a row. Held projections have no update, so no solver.
    """

    def __init__(
        self,
        method: Method = "d2prune",
        sparsity: float | None = None,
        pattern: str | None = None,
        lambda1: float = 1.0,
        lambda2: float = 0.0,
        scale: float | Literal["auto"] = "auto",
        activation_norm: ActivationNorm = "rms",
        block_size: int = 128,
        damping: float = 0.01,
        precision: Precision = "auto",
        update_rule: UpdateRule | None = None,
        non_updated: NonUpdated | None = None,
        candidates: Candidates = "partial",
        objective: Objective = "output",
        reference: Reference = "model",
        rho: float = 1.0,
        rule_windows: int = 4,
        rule_source: str | list[str] | None = None,
        log_attention: bool = False,
        attention_maps: list[int] | None = None,
        ignore: list[str] | None = None,
        output_dir: str | None = None,
        log_histograms: bool = False,
        resume: bool = False,
        offload: bool = False,
        allocation: Allocation = "uniform",
        owl_threshold: float = 5.0,
        owl_range: float = 0.08,
        solver: Solver = "obs",
    ) -> None:
        given = locals() | {"ignore": ignore or []}
        self.settings = PruningSettings(**{setting.name: given[setting.name] for setting in fields(PruningSettings)})
        # Of a pruning run these are not true: the number of epochs is that of the blocks, and calibration wants eval mode.
        warnings.filterwarnings("ignore", message="`max_epochs` was not set")
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        self.log_attention = log_attention
        self.attention_maps = attention_maps
        self.output_dir = output_dir
        self.log_histograms = log_histograms
        self.resume = resume
        self.offload = offload
        self.records: list[BlockRecord] = []
        self.metrics: dict[str, dict[str, float]] = {}
        self._plan: Plan = {}
        self._modes: dict[nn.Module, bool] = {}
        self._blocks: list[nn.Module] = []
        self._stream = BlockStream([])
        self._positions: dict[int, Tensor] = {}
        self._same: list[Tensor] = []
        self._attention: AttentionStep | None = None
        self._runs: HeldRuns | None = None
        self._processes = Processes()
        self._rng: Tensor | None = None
        self._kept = FinishedBlocks(Processes())

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._rng = torch.get_rng_state()  # dataloaders draw from it, pruning does not: it is put back
        if not isinstance(pl_module, PrunableModule):
            raise TypeError(f"BlockwisePruning needs a PrunableModule such as CausalLM but got {type(pl_module).__name__}.")
        self._processes = processes_of(trainer)
        if any(isinstance(callback, Checkpoint) for callback in trainer.callbacks):
            log.info("BlockwisePruning writes its own result; checkpoints of every epoch are off.")
            trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, Checkpoint)]
        trainer.num_sanity_val_steps = 0  # the dense model is validated as a whole, below
        pl_module.arm(self._calibrate)
        self._offload = Offload(pl_module, trainer, self.offload)
        self.records, self.metrics = [], {}
        self._kept = FinishedBlocks(self._processes)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        self._blocks = list(pl_module.blocks.values())
        self._plan = self.settings.plan(pl_module)
        self._check_maps()
        if trainer.current_epoch or not trainer.limit_train_batches:
            raise ValueError(
                f"Pruning needs a Trainer that has run no epoch and reads calibration batches, but got current_epoch="
                f"{trainer.current_epoch} and limit_train_batches={trainer.limit_train_batches}. Make a new Trainer."
            )
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"Argument `trainer.accumulate_grad_batches` = {trainer.accumulate_grad_batches} belongs to training; pruning "
                "has no gradients. Leave it out; `data.batch_size` says how many samples go through a block at a time."
            )
        self._output = Path(self.output_dir or Path(trainer.log_dir or trainer.default_root_dir) / "pruned").expanduser()
        self._processes.in_first(lambda: check_output(self._output))
        self._num_runs = len(HeldRuns.held) if self.settings.rule == "perplexity" else 1
        trainer.fit_loop.max_epochs = len(self._blocks) * self._num_runs
        trainer.check_val_every_n_epoch = trainer.fit_loop.max_epochs + 1  # validation is ours: before and after
        choose_batch_size(trainer, pl_module, self._processes)
        use_block_progress_bar(trainer, pl_module, trainer.fit_loop.max_epochs)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        self._started, self._blocks_done = time.perf_counter(), 0
        self._modes = {module: module.training for module in pl_module.modules()}
        pl_module.eval()
        self._run_model, self._num_batches = pl_module.calibration_forward, trainer.num_training_batches
        self._sample_positions = pl_module.sample_positions
        self._windows = RuleWindows(trainer, pl_module, self.settings, self._processes)
        if self._processes.size > 1:
            self._processes.check_equal(checksum(pl_module.model.state_dict().values()), "The model")
        if self.resume:
            root = getattr(trainer.logger, "root_dir", None) or trainer.default_root_dir
            beside = self._output.with_name(f"{self._output.name}.state")
            self._kept = FinishedBlocks(self._processes, beside if self.output_dir else Path(root) / "pruning_state")
            self._kept.open(trainer, pl_module, self.settings, self._windows)
        given = trainer, pl_module, self.settings, self._plan, self._offload, self._processes
        targets = self._kept.targets(lambda: allocate(*given))
        self._pruner = BlockPruner(pl_module, self.settings, self._processes, targets)
        self.metrics["dense"] = self._validate(trainer)
        log_scalars(trainer.loggers, self.metrics["dense"], step=0)
        if self.settings.rule == "perplexity":
            if pl_module.judge not in self.metrics["dense"]:
                raise ValueError(
                    f"`update_rule` = 'perplexity' chooses by {pl_module.judge} on held-out data, but there is none. Hold some "
                    "out (data.num_heldout), leave limit_val_batches alone, or use another rule."
                )
            rank_zero_info(f"update_rule perplexity: pruning {self._num_runs} times, with {', '.join(HeldRuns.held)} held.")
            self._runs = HeldRuns(pl_module, self._plan)

    def _validate(self, trainer: Trainer) -> dict[str, float]:
        with self._offload.passing():
            return validate_within_fit(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        run, self._index = divmod(trainer.current_epoch, len(self._blocks))
        self._finished = trainer.current_epoch < self._kept.number
        """Whether an earlier run has pruned this block."""
        self._run_finished = (run + 1) * len(self._blocks) <= self._kept.number
        if self._index == 0:
            self._start_run(trainer, pl_module, run)
        self._block_name = list(self._plan)[self._index]
        linears = pl_module.linears(self._blocks[self._index])
        names = () if self._finished else self._plan[self._block_name]
        chosen = {name: linears[name] for name in names}
        self._collector = StatisticsCollector(chosen, self.settings.precision, self.settings.updates)
        self._offload.hold(range(max(self._index - 1, 0), self._index + 1))
        self._epoch_started = time.perf_counter()

    def _start_run(self, trainer: Trainer, pl_module: PrunableModule, run: int) -> None:
        """Nothing is pruned yet, or, with the perplexity rule, not any more."""
        self._release()
        self._stream, self.records = BlockStream(self._blocks), []
        self._held = self.settings.held
        if self._runs is not None:
            self._runs.restart()
            self._held = HeldRuns.held[run]
            self._plan = self.settings.plan(pl_module, self._held)
        looks = (self.settings.rule == "attention" or self.log_attention) and not self._run_finished
        if looks and self._processes.is_first:
            self._attention = AttentionStep(pl_module, self.settings, self._drawn(), trainer.precision_plugin.forward_context)
        self._windows.start(self._attention, looks)

    def _calibrate(self, batch: Any, batch_idx: int) -> None:
        """The training step: one batch through the block pruned last and the block to be pruned next."""
        if self._run_finished:
            return
        positions = self._sample_positions(batch)
        with torch.no_grad():
            if self._index == 0:
                self._positions[batch_idx] = positions.cpu()
                self._stream.capture(batch_idx, lambda: self._run_model(batch))
                if batch_idx == 0 and not fits(self._stream.hidden(0).nbytes * self._num_batches, positions.device):
                    self._stream.move_to_host()
                self._windows.see(batch, positions)
            else:
                known = self._positions.get(batch_idx, positions[:0])
                self._same.append(_equal(positions, known))
                self._stream.advance(batch_idx, self._index - 1)
            if self._collector.linears:
                with self._collector.collecting(self._positions[batch_idx]):
                    self._stream.run(batch_idx, self._index)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        if self._same and not torch.stack(self._same).all():
            raise ValueError("The train dataloader gives other batches in this epoch. Turn its shuffling off.")
        self._same.clear()
        _synchronize(pl_module.device)
        collected = time.perf_counter()
        if self._index == 0 and not self._run_finished:
            self._windows.seen_all([position for batch in self._positions.values() for position in batch.tolist()])
        if self._finished:
            linears = self._plan[self._block_name]
            place = trainer.current_epoch, self._index, self._block_name
            record = self._kept.restore(*place, linears, self._pruner, self._attention)
        else:
            record = BlockRecord(name=self._block_name, seconds_statistics=collected - self._epoch_started)
            record = self._prune_block(trainer, pl_module, record, collected)
        self.records.append(record)
        self._blocks_done += 1
        prefix = "" if self._runs is None else f"hold_{self._held}/"
        log_scalars(trainer.loggers, {prefix + name: value for name, value in record.scalars().items()}, step=self._index)
        if isinstance(trainer.progress_bar_callback, BlockProgressBar):
            trainer.progress_bar_callback.block_done(self._blocks_done, record)
        if self._runs is not None and len(self.records) == len(self._blocks):
            self._end_run(trainer)

    def _prune_block(self, trainer: Trainer, pl_module: PrunableModule, record: BlockRecord, collected: float) -> BlockRecord:
        methods = self._plan[self._block_name]
        record = self._pruner.prune(
            self._index, self._collector, methods, self._attention, record, trainer.loggers, self.log_histograms
        )
        _synchronize(pl_module.device)
        record.seconds_solve = time.perf_counter() - collected - record.seconds_rule
        record.peak_memory_gib = max(self._processes.gather(peak_memory_gib(pl_module.device)))
        weights = {name: self._collector.linears[name].weight for name in methods}
        self._kept.keep(trainer.current_epoch, weights, record, self._pruner, self._seconds_now())
        return record

    def _seconds_now(self) -> float:
        """Of this run and of those that it goes on with."""
        return self._kept.seconds + time.perf_counter() - self._started

    def _end_run(self, trainer: Trainer) -> None:
        metrics = self._validate(trainer)
        tagged = {f"hold_{self._held}/{name}": value for name, value in metrics.items()}
        log_scalars(trainer.loggers, tagged, step=len(self._blocks))
        self._runs.add(self._held, metrics, self.records)
        rank_zero_info(f"{self._held} held: {self._runs.judge} {metrics[self._runs.judge]:.4f}")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        expected = len(self._blocks) * self._num_runs
        if self._blocks_done != expected:
            raise RuntimeError(f"Stopped after {self._blocks_done} of {expected} blocks; nothing was saved.")
        self._release()
        if self._runs is not None:
            best = self._runs.finish()
            self.records, self._held = best.records, best.held
            self.metrics |= {f"hold_{held}": metrics for held, metrics in self._runs.metrics.items()}
        self._seconds = self._seconds_now()
        report = self._report(trainer, pl_module)  # before evaluation could fail
        self._processes.in_first(lambda: save_result(pl_module, self._output, report))
        self.metrics["pruned"] = self._validate(trainer)
        log_scalars(trainer.loggers, self.metrics["pruned"], step=len(self._blocks))
        self._restore_modes()
        report = self._report(trainer, pl_module)
        if self._processes.is_first:
            write_json(self._output / REPORT, report)
        self._kept.remove()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        title = f"{self.settings.method} at {self.settings.pattern or self.settings.sparsity}"
        log_dir = trainer.log_dir  # every process is asked for it
        if self._processes.is_first:
            print_summary(trainer, title, self.metrics, self.records, self._output, self._seconds, log_dir)

    @override
    def on_exception(self, trainer: Trainer, pl_module: PrunableModule, exception: BaseException) -> None:
        self._kept.leave()
        self._release()
        self._restore_modes()
        self.teardown(trainer, pl_module, "fit")

    @override
    def teardown(self, trainer: Trainer, pl_module: PrunableModule, stage: str) -> None:
        if stage == "fit" and isinstance(pl_module, PrunableModule):
            pl_module.disarm()
            give_back(trainer)
            give_back_placement(trainer)
            if self._rng is not None:  # else it failed before `setup`
                torch.set_rng_state(self._rng)

    def _release(self) -> None:
        """Give the calibration data back: hidden states and statistics are larger than a small model."""
        self._stream.clear()
        self._positions.clear()
        self._collector = StatisticsCollector({})
        if self._attention is not None:
            self._attention.clear()
            self._attention = None

    def _restore_modes(self) -> None:
        for module, mode in self._modes.items():
            module.training = mode
        self._modes = {}

    def _drawn(self) -> set[int]:
        """Indices of the blocks whose attention maps are drawn."""
        count = len(self._blocks)
        return {0, count // 2, count - 1} if self.attention_maps is None else set(self.attention_maps)

    def _check_maps(self) -> None:
        count = len(self._blocks)
        if any(not 0 <= index < count for index in self._drawn()):
            raise ValueError(f"Argument `attention_maps` expected to name some of {count} blocks, got {self.attention_maps}.")

    def _report(self, trainer: Trainer, pl_module: PrunableModule) -> dict[str, Any]:
        """Content of pruning.json."""
        chosen = {"update_rule": self.settings.rule, "non_updated": self._held}
        run = {"settings": asdict(self.settings) | chosen, "calibration": self._processes.from_first(self._pruner.calibration)}
        run |= {"processes": self._processes.size, "metrics": self.metrics, "seconds": self._seconds}
        return report_of(trainer, pl_module, run, self.records)


def _equal(a: Tensor, b: Tensor) -> Tensor:
    """Whether they are equal, as a tensor where `a` is, which need not be waited for."""
    return (
        (a == b.to(a.device, non_blocking=True)).all() if a.shape == b.shape else torch.zeros((), dtype=bool, device=a.device)
    )


def _synchronize(device: torch.device) -> None:
    """Wait for the GPU, so that clocks read what they should."""
    if device.type != "cpu":
        torch.accelerator.synchronize()

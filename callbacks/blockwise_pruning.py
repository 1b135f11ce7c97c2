"""BlockwisePruning: D²Prune (and magnitude, Wanda, SparseGPT) as a `fit` in which an epoch is a block.

    epoch b, every batch   hidden states go through pruned block b−1, then through block b with statistics hooks on
    end of epoch b         q, k and v get their update states, block b is pruned; metrics are logged at step b
    before and after       the module's own validation: dense and pruned

The train dataloader is the calibration set. No optimizer, no backward. The perplexity rule runs over all blocks three times.
The order of events is all that this file knows: the mathematics is `functional.pruning`, the hidden states are BlockStream's,
the names are the module's, the choice among update states is `update_rules`'.
"""

import logging
import os
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from callbacks.attention_probe import Reference
from callbacks.attention_step import AttentionStep
from callbacks.collector import StatisticsCollector
from callbacks.held_runs import HeldRuns
from callbacks.progress import BlockProgressBar, use_block_progress_bar
from callbacks.report import BlockRecord, environment, log_scalars, peak_memory_gib, sparsity_of, write_json
from callbacks.result import REPORT, check_output, print_summary, save_result
from callbacks.settings import Method, NonUpdated, Plan, PruningSettings
from callbacks.solve import log_scores, record_of, solve
from callbacks.update_rules import HELD, ROLES, UPDATED, Candidates, Objective, UpdateRule, method_of, outlier_choice, states_of
from functional.pruning import ActivationNorm, PruneResult
from lightning_modules.block_stream import BlockStream
from lightning_modules.prunable import PrunableModule

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
    ) -> None:
        self.settings = PruningSettings(
            method=method,
            sparsity=sparsity,
            pattern=pattern,
            lambda1=lambda1,
            lambda2=lambda2,
            scale=scale,
            activation_norm=activation_norm,
            block_size=block_size,
            damping=damping,
            update_rule=update_rule,
            non_updated=non_updated,
            candidates=candidates,
            objective=objective,
            reference=reference,
            rho=rho,
            rule_windows=rule_windows,
            rule_source=rule_source,
            ignore=ignore or [],
        )
        # Of a pruning run these are not true: the number of epochs is that of the blocks, and calibration wants eval mode.
        warnings.filterwarnings("ignore", message="`max_epochs` was not set")
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        self.log_attention = log_attention
        self.attention_maps = attention_maps
        self.output_dir = output_dir
        self.log_histograms = log_histograms
        self.records: list[BlockRecord] = []
        self.metrics: dict[str, dict[str, float]] = {}
        self._plan: Plan = {}
        self._modes: dict[nn.Module, bool] = {}
        self._calibration: dict[str, float] = {}
        self._blocks: list[nn.Module] = []
        self._stream = BlockStream([])
        self._positions: dict[int, Tensor] = {}
        self._attention: AttentionStep | None = None
        self._runs: HeldRuns | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._rng = torch.get_rng_state()  # dataloaders draw from it, pruning does not: it is put back
        if not isinstance(pl_module, PrunableModule):
            raise TypeError(f"BlockwisePruning needs a PrunableModule such as CausalLM but got {type(pl_module).__name__}.")
        if trainer.world_size > 1:
            raise ValueError(f"BlockwisePruning runs in one process for now, not {trainer.world_size}: set trainer.devices=1.")
        if any(isinstance(callback, Checkpoint) for callback in trainer.callbacks):
            log.info("BlockwisePruning writes its own result; checkpoints of every epoch are off.")
            trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, Checkpoint)]
        trainer.num_sanity_val_steps = 0  # the dense model is validated as a whole, below
        pl_module.arm(self._calibrate)
        self.records, self.metrics = [], {}

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
        self._output = Path(self.output_dir or Path(trainer.log_dir or trainer.default_root_dir) / "pruned").expanduser()
        check_output(self._output)
        self._num_runs = len(HeldRuns.held) if self.settings.rule == "perplexity" else 1
        trainer.fit_loop.max_epochs = len(self._blocks) * self._num_runs
        trainer.check_val_every_n_epoch = trainer.fit_loop.max_epochs + 1  # validation is ours: before and after
        use_block_progress_bar(trainer, pl_module, trainer.fit_loop.max_epochs)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        self._started, self._blocks_done = time.perf_counter(), 0
        self._modes = {module: module.training for module in pl_module.modules()}
        pl_module.eval()
        self._run_model = pl_module.calibration_forward
        self._sample_positions = pl_module.sample_positions
        self.metrics["dense"] = self._evaluate(trainer)
        log_scalars(trainer.loggers, self.metrics["dense"], step=0)
        if self.settings.rule == "perplexity":
            if pl_module.judge not in self.metrics["dense"]:
                raise ValueError(
                    f"`update_rule` = 'perplexity' chooses by {pl_module.judge} on held-out data, but there is none. Hold some "
                    "out (data.num_heldout), leave limit_val_batches alone, or use another rule."
                )
            rank_zero_info(f"update_rule perplexity: pruning {self._num_runs} times, with {', '.join(HeldRuns.held)} held.")
            self._runs = HeldRuns(pl_module, self._plan)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        run, self._index = divmod(trainer.current_epoch, len(self._blocks))
        if self._index == 0:
            self._start_run(trainer, pl_module, run)
        self._block_name = list(self._plan)[self._index]
        linears = pl_module.linears(self._blocks[self._index])
        self._collector = StatisticsCollector({name: linears[name] for name in self._plan[self._block_name]})
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
        if self.settings.rule == "attention" or self.log_attention:
            self._attention = AttentionStep(pl_module, self.settings, self._drawn())
            if self.settings.rule_source is not None:
                for batch in self._rule_batches(trainer):
                    with trainer.precision_plugin.forward_context():
                        self._attention.feed(batch, len(pl_module.sample_positions(batch)))

    def _rule_batches(self, trainer: Trainer):
        data = trainer.datamodule
        if not hasattr(data, "rule_dataloader"):
            raise ValueError(
                f"Argument `rule_source` needs a data module that reads it, but {type(data).__name__} has no rule_dataloader. "
                "Leave it out: the rule then looks at calibration data."
            )
        for batch in data.rule_dataloader(self.settings.rule_source, self.settings.rule_windows):
            yield trainer.strategy.batch_to_device(batch)

    def _calibrate(self, batch: Any, batch_idx: int) -> None:
        """The training step: one batch through the block pruned last and the block to be pruned next."""
        positions = self._sample_positions(batch)
        with torch.no_grad():
            if self._index == 0:
                self._positions[batch_idx] = positions
                self._stream.capture(batch_idx, lambda: self._run_model(batch))
                if self._attention is not None and self.settings.rule_source is None:
                    self._attention.feed(batch, len(positions))
            else:
                if not torch.equal(self._positions[batch_idx], positions):
                    raise ValueError("The train dataloader gives other batches in this epoch. Turn its shuffling off.")
                self._stream.advance(batch_idx, self._index - 1)
            if self._collector.linears:
                with self._collector.collecting(positions):
                    self._stream.run(batch_idx, self._index)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        _synchronize(pl_module.device)
        collected = time.perf_counter()
        record = BlockRecord(name=self._block_name, seconds_statistics=collected - self._epoch_started)
        chosen = self._choose(trainer, pl_module, record)
        for name, linear in self._collector.linears.items():
            method = self._plan[self._block_name][name]
            result, method = chosen.get(name) or (self._solve(name, method), method)
            with torch.no_grad():
                linear.weight.copy_(result.weight)
            record.linears[name] = record_of(self.settings, linear, result, method, f"{self._block_name}.{name}")
            if self.log_histograms:
                log_scores(trainer.loggers, name, result, self._index)
        if self._attention is not None:
            with trainer.precision_plugin.forward_context():
                self._attention.leave(self._index, record, trainer.loggers)
        _synchronize(pl_module.device)
        record.seconds_solve = time.perf_counter() - collected - record.seconds_rule
        record.peak_memory_gib = peak_memory_gib(pl_module.device)
        self.records.append(record)
        self._blocks_done += 1
        prefix = "" if self._runs is None else f"hold_{self._held}/"
        log_scalars(trainer.loggers, {prefix + name: value for name, value in record.scalars().items()}, step=self._index)
        if isinstance(trainer.progress_bar_callback, BlockProgressBar):
            trainer.progress_bar_callback.block_done(self._blocks_done, record)
        if self._runs is not None and len(self.records) == len(self._blocks):
            self._end_run(trainer)

    def _end_run(self, trainer: Trainer) -> None:
        metrics = self._evaluate(trainer)
        tagged = {f"hold_{self._held}/{name}": value for name, value in metrics.items()}
        log_scalars(trainer.loggers, tagged, step=len(self._blocks))
        self._runs.add(self._held, metrics, self.records)
        rank_zero_info(f"{self._held} held: {self._runs.judge} {metrics[self._runs.judge]:.4f}")

    def _choose(self, trainer: Trainer, pl_module: PrunableModule, record: BlockRecord) -> dict[str, tuple[PruneResult, str]]:
        """Ask the update rule: name of a linear -> (result, method) where a rule has decided on a result already."""
        projections = pl_module.architecture.projections
        roles = {role: projections[role] for role in ROLES if projections.get(role) in self._collector.linears}
        linears = {role: self._collector.linears[name] for role, name in roles.items()}
        if self._attention is not None:
            with trainer.precision_plugin.forward_context():
                self._attention.enter(self._index)
        if self.settings.rule == "attention" and roles:
            options = {role: self._states(name) for role, name in roles.items()}
            with trainer.precision_plugin.forward_context():
                state, results = self._attention.choose(linears, options)
            return {name: (results[role], method_of(state[role])) for role, name in roles.items()}
        if self.settings.method == "d2prune":
            methods = {role: self._plan[self._block_name][name] for role, name in roles.items()}
            record.update_shares = {role: float(method == "d2_sparsegpt") for role, method in methods.items()}
            record.choice = "+".join(role for role, share in record.update_shares.items() if not share) or "none"
        if self.settings.rule == "outlier" and roles:
            record.outlier_ratios = outlier_choice(linears)[1]
        return {}

    def _states(self, name: str) -> dict[str, PruneResult]:
        updated, held = (self._solve(name, method_of(state)) for state in (UPDATED, HELD))
        weight, inputs = self._collector.linears[name].weight, self._collector.inputs(name)
        return states_of(updated, held, weight, inputs, self.settings.candidates)

    def _solve(self, name: str, method: str) -> PruneResult:
        inputs = self._collector.inputs(name)
        self._calibration = {"samples": inputs.num_samples, "tokens_per_sample": inputs.num_tokens / inputs.num_samples}
        return solve(self.settings, self._collector, self._block_name, name, method)

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
        seconds = time.perf_counter() - self._started
        save_result(pl_module, self._output, self._report(trainer, pl_module, seconds))  # before evaluation could fail
        self.metrics["pruned"] = self._evaluate(trainer)
        log_scalars(trainer.loggers, self.metrics["pruned"], step=len(self._blocks))
        self._restore_modes()
        write_json(self._output / REPORT, self._report(trainer, pl_module, seconds))
        self._seconds = seconds

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        title = f"{self.settings.method} at {self.settings.pattern or self.settings.sparsity}"
        print_summary(trainer, title, self.metrics, self.records, self._output, self._seconds)

    @override
    def on_exception(self, trainer: Trainer, pl_module: PrunableModule, exception: BaseException) -> None:
        self._release()
        self._restore_modes()
        self.teardown(trainer, pl_module, "fit")

    @override
    def teardown(self, trainer: Trainer, pl_module: PrunableModule, stage: str) -> None:
        if stage == "fit" and isinstance(pl_module, PrunableModule):
            pl_module.disarm()
            torch.set_rng_state(self._rng)

    def _release(self) -> None:
        """Give the calibration data back: hidden states and statistics are larger than a small model."""
        self._stream.clear()
        self._positions.clear()
        self._collector = StatisticsCollector({})
        if self._attention is not None:
            self._attention.clear()

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

    def _evaluate(self, trainer: Trainer) -> dict[str, float]:
        """The module's own validation, in the middle of `fit`, as the training loop does it between batches."""
        if not trainer.enable_validation:
            return {}
        connector = trainer._logger_connector
        first_loop_iter = connector._first_loop_iter
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        connector._first_loop_iter = first_loop_iter
        return {name: float(value) for name, value in trainer.callback_metrics.items()}

    def _report(self, trainer: Trainer, pl_module: PrunableModule, seconds: float) -> dict[str, Any]:
        """Content of pruning.json."""
        data = trainer.datamodule.hparams if trainer.datamodule is not None else {}
        return {
            "settings": asdict(self.settings) | {"update_rule": self.settings.rule, "non_updated": self._held},
            "model": dict(pl_module.hparams),
            "data": dict(data),
            "calibration": self._calibration,
            "seed": int(data.get("seed") or os.environ.get("PL_GLOBAL_SEED", 0)),
            **environment(pl_module.device),
            "metrics": self.metrics,
            "sparsity": sparsity_of(self.records),
            "seconds": seconds,
            "blocks": [record.as_json() for record in self.records],
        }


def _synchronize(device: torch.device) -> None:
    """Wait for the GPU, so that clocks read what they should."""
    if device.type != "cpu":
        torch.accelerator.synchronize()

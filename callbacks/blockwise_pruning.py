"""BlockwisePruning: D²Prune (and magnitude, Wanda, SparseGPT) as a `fit` in which an epoch is a block.

    epoch b, every batch   hidden states go through pruned block b−1, then through block b with statistics hooks on
    end of epoch b         block b is pruned from its statistics; metrics are logged at step b
    before and after       the module's own validation: dense and pruned

The train dataloader is the calibration set. No optimizer, no backward. The order of events is all that this file knows: the
mathematics is `functional.pruning`, the hidden states are BlockStream's, the names are the module's.
"""

import logging
import os
import shlex
import shutil
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from typing_extensions import override

from callbacks.collector import StatisticsCollector
from callbacks.progress import BlockProgressBar
from callbacks.report import (
    BlockRecord,
    LinearRecord,
    environment,
    log_scalars,
    peak_memory_gib,
    print_table,
    python_command,
    sparsity_of,
    write_json,
)
from callbacks.settings import Method, NonUpdated, Plan, PruningSettings
from functional.pruning import ActivationNorm, PruneResult, prune_linear
from functional.pruning.masks import zeros_of
from lightning_modules.block_stream import BlockStream
from lightning_modules.prunable import PrunableModule

log = logging.getLogger(__name__)

REPORT = "pruning.json"


class BlockwisePruning(Callback):
    """Prune a PrunableModule block by block from calibration data; give either `sparsity` or `pattern`.

    Args:
        method: d2prune (d2_sparsegpt, and d2_wanda for the projection that is not updated), or one method for all linears.
        sparsity: Share of zeros of every pruned linear, in [0, 1).
        pattern: N:M, N zeros in every M consecutive weights of a row, such as 2:4.
        lambda1: λ1, weight of the activation term ŷ |W| x̂ in the score.
        lambda2: λ2, weight of W² x̂², which the score loses.
        scale: s in the activation norms; auto is the number of tokens of a sample.
        activation_norm: rms (Algorithm 1) or official (as the released code computes it).
        block_size: Columns of a weight that the update handles, and compares, at a time.
        damping: Share of the mean of the Hessian's diagonal that is added to it.
        non_updated: Projection that keeps its remaining weights as they are; v for d2prune when left out.
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
        non_updated: NonUpdated | None = None,
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
            non_updated=non_updated,
            ignore=ignore or [],
        )
        # Of a pruning run these are not true: the number of epochs is that of the blocks, and calibration wants eval mode.
        warnings.filterwarnings("ignore", message="`max_epochs` was not set")
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
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

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
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
        self._plan = self.settings.plan(pl_module)
        self._blocks = list(pl_module.blocks.values())
        if trainer.current_epoch or not trainer.limit_train_batches:
            raise ValueError(
                f"Pruning needs a Trainer that has run no epoch and reads calibration batches, but got current_epoch="
                f"{trainer.current_epoch} and limit_train_batches={trainer.limit_train_batches}. Make a new Trainer."
            )
        self._output = Path(self.output_dir or Path(trainer.log_dir or trainer.default_root_dir) / "pruned").expanduser()
        _check_output(self._output)
        trainer.fit_loop.max_epochs = len(self._blocks)
        trainer.check_val_every_n_epoch = len(self._blocks) + 1  # validation is ours: before and after
        _use_block_progress_bar(trainer, pl_module, len(self._blocks))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        self._started = time.perf_counter()
        self._modes = {module: module.training for module in pl_module.modules()}
        pl_module.eval()
        self._stream, self._positions = BlockStream(self._blocks), {}
        self._run_model = pl_module.calibration_forward
        self._sample_positions = pl_module.sample_positions
        self._evaluate(trainer, "dense", step=0)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._index = trainer.current_epoch
        self._block_name = list(self._plan)[self._index]
        linears = pl_module.linears(self._blocks[self._index])
        self._collector = StatisticsCollector({name: linears[name] for name in self._plan[self._block_name]})
        self._epoch_started = time.perf_counter()

    def _calibrate(self, batch: Any, batch_idx: int) -> None:
        """The training step: one batch through the block pruned last and the block to be pruned next."""
        positions = self._sample_positions(batch)
        with torch.no_grad():
            if self._index == 0:
                self._positions[batch_idx] = positions
                self._stream.capture(batch_idx, lambda: self._run_model(batch))
            else:
                if not torch.equal(self._positions[batch_idx], positions):
                    raise ValueError("The train dataloader gives other batches in this epoch. Turn its shuffling off.")
                self._stream.advance(batch_idx, self._index - 1)
            if self._collector.linears:
                with self._collector.collecting(positions):
                    self._stream.run(batch_idx, self._index)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        if pl_module.device.type != "cpu":
            torch.accelerator.synchronize()
        collected = time.perf_counter()
        linears = {}
        for name, linear in self._collector.linears.items():
            result = self._prune(name, linear)
            linears[name] = self._record_of(name, linear, result)
            if self.log_histograms:
                self._log_scores(trainer, name, result)
        record = BlockRecord(
            name=self._block_name,
            seconds_statistics=collected - self._epoch_started,
            seconds_solve=time.perf_counter() - collected,
            peak_memory_gib=peak_memory_gib(pl_module.device),
            linears=linears,
        )
        self.records.append(record)
        log_scalars(trainer.loggers, record.scalars(), step=self._index)
        if isinstance(trainer.progress_bar_callback, BlockProgressBar):
            trainer.progress_bar_callback.block_done(
                len(self.records),
                error=f"{record.relative_error:.4f}",
                sparsity=f"{record.sparsity:.4f}",
                seconds=f"{record.seconds:.1f}",
            )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        if len(self.records) != len(self._blocks):
            raise RuntimeError(f"Stopped after {len(self.records)} of {len(self._blocks)} blocks; nothing was saved.")
        self._release()
        seconds = time.perf_counter() - self._started
        self._save(trainer, pl_module, seconds)  # first, so that a failing evaluation loses nothing
        self._evaluate(trainer, "pruned", step=len(self._blocks))
        self._restore_modes()
        self._write_report(trainer, pl_module, self._output, seconds)
        self._seconds = seconds

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        self._print_summary(trainer, self._seconds)

    @override
    def on_exception(self, trainer: Trainer, pl_module: PrunableModule, exception: BaseException) -> None:
        self._release()
        self._restore_modes()
        if isinstance(pl_module, PrunableModule):
            pl_module.disarm()

    @override
    def teardown(self, trainer: Trainer, pl_module: PrunableModule, stage: str) -> None:
        if stage == "fit":
            pl_module.disarm()

    def _release(self) -> None:
        """Give the calibration data back: hidden states and statistics are larger than a small model."""
        self._stream.clear()
        self._positions.clear()
        self._collector = StatisticsCollector({})

    def _restore_modes(self) -> None:
        for module, mode in self._modes.items():
            module.training = mode
        self._modes = {}

    def _prune(self, name: str, linear: nn.Linear) -> PruneResult:
        inputs, outputs = self._collector.inputs(name), self._collector.outputs[name]
        self._calibration = {"samples": inputs.num_samples, "tokens_per_sample": inputs.num_tokens / inputs.num_samples}
        arguments = self.settings.arguments(self._calibration["tokens_per_sample"])
        try:
            result = prune_linear(linear.weight, inputs, outputs, method=self._plan[self._block_name][name], **arguments)
        except ValueError as error:
            raise type(error)(f"{self._block_name}.{name}: {error}") from error
        if result.damping is not None and result.damping > self.settings.damping:
            log.warning("%s.%s: the Hessian needed a damping of %g.", self._block_name, name, result.damping)
        with torch.no_grad():
            linear.weight.copy_(result.weight)
        return result

    def _record_of(self, name: str, linear: nn.Linear, result: PruneResult) -> LinearRecord:
        method = self._plan[self._block_name][name]
        record = LinearRecord(
            method=method,
            error=result.error,
            norm=result.norm,
            zeros=int((linear.weight == 0).sum()),
            weights=linear.weight.numel(),
            damping=result.damping,
        )
        arguments = self.settings.arguments(1.0)
        wanted = zeros_of(linear.weight.shape, method, arguments["sparsity"], arguments["pattern"])
        if record.zeros < wanted:
            raise RuntimeError(
                f"{self._block_name}.{name}: {record.zeros} of {record.weights} weights are zero where {wanted} were wanted. "
                "This is a defect of the pruning code; please report it with the settings."
            )
        return record

    def _log_scores(self, trainer: Trainer, name: str, result: PruneResult) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for state, scores in (("kept", result.scores[result.mask]), ("pruned", result.scores[~result.mask])):
                    logs = scores[scores > 0].log10()
                    if len(logs):
                        logger.experiment.add_histogram(f"log10_scores_{state}/{name}", logs, self._index)

    def _evaluate(self, trainer: Trainer, state: str, step: int) -> None:
        """The module's own validation, in the middle of `fit`, as the training loop does it between batches."""
        if not trainer.enable_validation:
            return
        connector = trainer._logger_connector
        first_loop_iter = connector._first_loop_iter
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        connector._first_loop_iter = first_loop_iter
        self.metrics[state] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        log_scalars(trainer.loggers, self.metrics[state], step)

    def _save(self, trainer: Trainer, pl_module: PrunableModule, seconds: float) -> None:
        """The model and its report, written beside their place and moved there as a whole."""
        target = self._output.resolve()  # a link stays a link
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        new, old = scratch / "new", scratch / "old"
        new.mkdir()
        pl_module.save(new)
        self._write_report(trainer, pl_module, new, seconds)
        if target.exists():
            os.replace(target, old)
        os.replace(new, target)
        shutil.rmtree(scratch)

    def _write_report(self, trainer: Trainer, pl_module: PrunableModule, directory: Path, seconds: float) -> None:
        data = trainer.datamodule.hparams if trainer.datamodule is not None else {}
        content = {
            "settings": asdict(self.settings) | {"non_updated": self.settings.held},
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
        write_json(directory / REPORT, content)

    def _print_summary(self, trainer: Trainer, seconds: float) -> None:
        dense, pruned = self.metrics.get("dense", {}), self.metrics.get("pruned", {})
        rows = [(name, f"{value:.4g} dense -> {pruned[name]:.4g} pruned") for name, value in dense.items()]
        rows += [
            ("sparsity", f"{sparsity_of(self.records):.4%} of the pruned linears of {len(self._blocks)} blocks"),
            ("time", f"{seconds:.1f} s with dense validation"),
            ("peak memory", f"{max(record.peak_memory_gib for record in self.records):.2f} GiB"),
            ("pruned model", str(self._output)),
        ]
        if isinstance(trainer.logger, TensorBoardLogger):
            rows.append(("logs", f"{python_command()} -m tensorboard.main --logdir {shlex.quote(trainer.log_dir)}"))
            config = Path(trainer.log_dir) / "config.yaml"
            if config.is_file():
                options = ["--config", str(config), "--model.model_name_or_path", str(self._output)]
                rows.append(("validate again", f"{python_command()} train.py validate {shlex.join(options)}"))
        print_table(f"{self.settings.method} at {self.settings.pattern or self.settings.sparsity}", rows)


def _check_output(output: Path) -> None:
    """Raise a ValueError unless the result can go to `output`: nothing that is not ours is ever replaced."""
    output = output.resolve()
    if output.exists() and not (output / REPORT).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"Argument `output_dir` = {str(output)!r} exists and holds no {REPORT}, so it is not a pruned model of ours to "
            "replace. Choose another directory."
        )
    output.parent.mkdir(parents=True, exist_ok=True)


def _use_block_progress_bar(trainer: Trainer, pl_module: LightningModule, num_blocks: int) -> None:
    """In the place of the trainer's own bar, if it has one: epochs of a few batches would tell nothing."""
    bar = trainer.progress_bar_callback
    if bar is None or bar.is_disabled:
        return
    ours = BlockProgressBar(num_blocks)
    ours.setup(trainer, pl_module, "fit")
    trainer.callbacks = [ours if isinstance(callback, ProgressBar) else callback for callback in trainer.callbacks]

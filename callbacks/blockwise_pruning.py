"""BlockwisePruning: D²Prune (and magnitude, Wanda, SparseGPT) as a `fit` in which an epoch is a block.

    epoch b, every batch   hidden states go through block b−1, just pruned, then through block b with statistics hooks on
    end of epoch b         block b is pruned and recorded
    before and after       the module's own validation: dense and pruned

The train dataloader is the calibration set. There is no optimizer and no backward pass; the perplexity rule goes over all
blocks three times. This file has the hooks of the Trainer; their work is done in callbacks/blockwise, starting with run.py.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from typing_extensions import override

from callbacks.base.push import check_access, check_repository, upload
from callbacks.base.saving import check_compressed
from callbacks.blockwise.allocations import Allocation, AllocationName
from callbacks.blockwise.exchange import give_back, processes_of
from callbacks.blockwise.placement import Placement, give_back_placement, windows_at_a_time
from callbacks.blockwise.plan import Plan, plan_of, pruned_roles
from callbacks.blockwise.progress import use_block_progress_bar
from callbacks.blockwise.records import BlockRecord
from callbacks.blockwise.result import check_output, print_summary
from callbacks.blockwise.run import Diagnostics, PruningRun
from callbacks.blockwise.settings import Method, PruningSettings, Score, Target
from callbacks.blockwise.solvers import Solver
from callbacks.blockwise.streaming import can_share, check_shared, check_streaming, size_of, spilled_bytes
from callbacks.blockwise.update_rules import UpdateRule, UpdateRuleName
from functional.pruning.checks import SolverName
from functional.pruning.precision import Precision
from lightning_modules.base.prunable import PrunableModule
from utilities.choice import chosen
from utilities.contract import data_of
from utilities.distributed import Processes
from utilities.files import OutputDirectory, check_space

log = logging.getLogger(__name__)

MOVED = {
    "lambda1": "score.lambda1",
    "lambda2": "score.lambda2",
    "scale": "score.scale",
    "activation_norm": "score.activation_norm",
    "block_size": "solver.block_size",
    "damping": "solver.damping",
    "non_updated": "update_rule.held (FixedRule)",
    "candidates": "update_rule.candidates (AttentionRule)",
    "objective": "update_rule.objective (AttentionRule)",
    "reference": "update_rule.reference (AttentionRule)",
    "rho": "update_rule.rho (AttentionRule)",
    "rule_windows": "update_rule.windows (AttentionRule)",
    "rule_source": "update_rule.source (AttentionRule)",
    "owl_threshold": "allocation.threshold (OwlAllocation)",
    "owl_range": "allocation.spread (OwlAllocation)",
    "log_attention": "diagnostics.attention",
    "attention_maps": "diagnostics.attention_maps",
    "log_histograms": "diagnostics.histograms",
}
"""Former settings of `BlockwisePruning` -> their present names, for the errors of the command line."""


class BlockwisePruning(Callback):
    """Prune a PrunableModule block by block from calibration data; give either `sparsity` or `pattern`.

    Args:
        method: d2prune (d2_sparsegpt, with q, k and v as `update_rule` says), or one method for all linears: magnitude, wanda,
            sparsegpt, d2_wanda, d2_sparsegpt.
        sparsity: Share of zeros of every pruned linear, in [0, 1).
        pattern: N:M, N zeros in every M consecutive weights of a row, such as 2:4.
        score: λ1, λ2, scale and activation norms of D²Prune's score; for methods that have activation terms. λ1 is 30
            with the joint solver and 1 with others, unless it is given.
        update_rule: Which of q, k, v keep their remaining weights as they are (d2prune): attention (the default), outlier,
            perplexity or fixed, or a class with settings: AttentionRule, OutlierRule, PerplexityRule, FixedRule.
        solver: Solver that updates the kept weights, for methods with a weight update: obs (the default), admm or joint, or a
            class with settings: ObsSolver, AdmmSolver, JointSolver.
        target: Outputs that the updated weights of a linear come close to: `pruned`, what its dense weights make of its inputs
            in the pruned model, or α in [0, 1], the share of the way from there to what the dense model gives for the same
            tokens. α > 0 keeps the hidden states of the dense model as well. None is 0.35 for `joint`, else pruned.
        stages: Whether the linears of a block are pruned in the order in which it calls them (q, k, v; o; gate, up; down),
            each with inputs that the pruned ones before it give. Runs up to the whole block once more for each stage. None is
            true for `joint`, else false.
        class_token_weight: How many times a class token counts in all calibration statistics: inputs, outputs, what they lack
            of the dense model's, and the errors that are reported. Distillation tokens are class tokens, registers are not;
            1 for models without them. The pass of an allocation counts every token once.
        allocation: Allocation of the zeros of `sparsity` to blocks: uniform, owl, error or depth, or a class with settings:
            UniformAllocation, OwlAllocation, ErrorAllocation, DepthAllocation.
        ignore: Globs of full names of linears to leave dense, such as '*.down_proj' or 'model.layers.0.*'.
        precision: Precision of Gram matrices on a GPU. auto is as exact as the inputs: half precision is multiplied as it is,
            float32 as float32. high multiplies float32 as TF32, a tenth faster. highest multiplies everything as float32,
            several times slower for half precision. Sums over batches are float64.
        output_dir: Directory of the pruned model; `pruned` in the log directory when None. A run locks it for itself.
        resume: Whether to keep every finished block on disk, so that the same command continues after the last one if this
            run dies: beside `output_dir`, or in `pruning_state` of the logger's directory. Removed when the run ends well.
        offload: Whether blocks wait in host memory, so that a GPU needs room for two of them only. Hidden states that do not
            fit on the GPU go to host memory in any case.
        diagnostics: Measurements and drawings beside the pruning itself.
        push_to_hub: Repository on the Hugging Face hub, owner/name, to which the finished directory is uploaded; created as a
            private one if it does not exist. Nothing is uploaded when None.
        save_compressed: Whether matrices that get smaller are stored as masks and values: about 0.56 of their bytes at 50 %
            zeros and 16 bit. Only CausalLM loads the directory; `python -m lightning_modules.expand` makes a plain one.

    Raises:
        ValueError: If a setting is out of range, or does not apply beside the others.
    """

    def __init__(
        self,
        method: Method = "d2prune",
        sparsity: float | None = None,
        pattern: str | None = None,
        score: Score | None = None,
        update_rule: UpdateRuleName | UpdateRule | None = None,
        solver: SolverName | Solver | None = None,
        target: Target | None = None,
        stages: bool | None = None,
        class_token_weight: float = 1.0,
        allocation: AllocationName | Allocation = "uniform",
        ignore: list[str] | None = None,
        precision: Precision = "auto",
        output_dir: str | None = None,
        resume: bool = False,
        offload: bool = False,
        diagnostics: Diagnostics | None = None,
        push_to_hub: str | None = None,
        save_compressed: bool = False,
    ) -> None:
        check_repository(push_to_hub)
        self.settings = PruningSettings.of(
            method,
            sparsity,
            pattern,
            score,
            None if update_rule is None else chosen("update_rule", update_rule, UpdateRule),
            None if solver is None else chosen("solver", solver, Solver),
            target,
            stages,
            class_token_weight,
            chosen("allocation", allocation, Allocation),
            precision,
            () if ignore is None else ignore,
        )
        self.output_dir, self.resume, self.offload, self.push_to_hub = output_dir, resume, offload, push_to_hub
        self.save_compressed = save_compressed
        self.diagnostics = diagnostics or Diagnostics()
        self.diagnostics.check(self.settings)
        self.records: list[BlockRecord] = []
        """Records of the pruned blocks, once the run has ended."""
        self.metrics: dict[str, dict[str, float]] = {}
        """Metrics of the dense and of the pruned model, once the run has ended."""
        self.output_path: Path | None = None
        """Directory of the pruned model, once the run has ended."""
        self._run: PruningRun | None = None
        self._output: OutputDirectory | None = None
        self._placement: Placement | None = None
        self._plan: Plan = {}
        self._processes = Processes()
        self._rng: Tensor | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._rng = torch.get_rng_state()  # restored at the end, since dataloaders draw from it
        if not isinstance(pl_module, PrunableModule):
            raise TypeError(f"BlockwisePruning needs a PrunableModule such as CausalLM but got {type(pl_module).__name__}.")
        self._processes = processes_of(trainer)
        check_streaming(pl_module, self.settings, self.offload)
        check_compressed(pl_module, self.save_compressed, self.push_to_hub)
        check_access(trainer, self.push_to_hub)
        if any(isinstance(callback, Checkpoint) for callback in trainer.callbacks):
            log.info("BlockwisePruning writes its own result; checkpoints of every epoch are off.")
            trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, Checkpoint)]
        trainer.num_sanity_val_steps = 0  # the dense model is validated as a whole
        pl_module.arm(self._calibrate)
        self._placement = Placement(pl_module, trainer, self.offload)
        self.records, self.metrics = [], {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        _check_trainer(trainer)
        self._plan = plan_of(self.settings, pl_module)
        self.diagnostics.check_maps(len(pl_module.blocks))
        output = Path(self.output_dir or Path(trainer.log_dir or trainer.default_root_dir) / "pruned")
        self._output = self._processes.in_first(lambda: self._open(output, trainer, pl_module)) or OutputDirectory(output)
        if pl_module.streams:
            self._check_shared(trainer)
        rounds = len(self.settings.update_rule.rounds(pruned_roles(pl_module, self._plan)))
        trainer.fit_loop.max_epochs = len(pl_module.blocks) * rounds
        trainer.check_val_every_n_epoch = trainer.fit_loop.max_epochs + 1  # validation is ours: before and after
        data_of(trainer).begin_calibration(self._batch_size(trainer, pl_module))
        use_block_progress_bar(trainer, pl_module, trainer.fit_loop.max_epochs)

    def _open(self, path: Path, trainer: Trainer, module: PrunableModule) -> OutputDirectory:
        """Lock the output directory, and check that the result fits on the disk."""
        output = OutputDirectory(path)
        check_output(output.path)
        output.open()
        try:
            state = self._state_directory(trainer, output)
            kept = state is not None and not (module.streams and can_share(state, output.path.parent))  # less than the model
            hidden = spilled_bytes(trainer, module, self.settings)
            what = "The pruned model" + (" with its finished blocks" if kept else "")
            what += " beside the dense files that are compressed" if self.save_compressed else ""
            what += " with hidden states that host memory has no room for" if hidden else ""
            copies = 1 + kept + self.save_compressed
            check_space(output.path.parent, copies * size_of(module) + hidden, what)
        except ValueError:
            output.close()
            raise
        return output

    def _check_shared(self, trainer: Trainer) -> None:
        """Check that all processes see the directories that the first one writes shards to."""
        state = self._state_directory(trainer, self._output)
        check_shared(self._output.scratch, self._processes)
        if state is not None and state.parent != self._output.path.parent:
            check_shared(state.parent, self._processes)

    def _batch_size(self, trainer: Trainer, module: PrunableModule) -> int | None:
        """Return the number of windows of a batch if the data module leaves that open, else None."""
        facts = data_of(trainer).facts()
        if facts.batch_size is not None:
            return None
        windows = max(facts.num_calibration // trainer.world_size, 1)
        wanted = windows_at_a_time(module, facts.tokens, windows, trainer.strategy.root_device)
        return min(self._processes.gather(wanted))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        self._run = PruningRun(
            trainer,
            pl_module,
            self.settings,
            self.diagnostics,
            self._plan,
            self._output,
            self._state_directory(trainer, self._output),
            self._placement,
            self._processes,
            self.save_compressed,
        )
        self._run.start()

    def _state_directory(self, trainer: Trainer, output: OutputDirectory) -> Path | None:
        if not self.resume:
            return None
        if self.output_dir:
            return output.path.with_name(f"{output.path.name}.state")
        return Path(getattr(trainer.logger, "root_dir", None) or trainer.default_root_dir) / "pruning_state"

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        self._run.begin_step(trainer.current_epoch)

    def _calibrate(self, batch: Any, batch_idx: int) -> None:
        """Run the training step of the armed module."""
        self._run.calibrate(batch, batch_idx)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        self._run.end_step()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        self._run.finish()
        self.records, self.metrics, self.output_path = self._run.records, self._run.metrics, self._output.path

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        log_dir = trainer.log_dir  # every process has to ask for it
        if self._processes.is_first:
            shown = self.metrics, self.records, self.output_path, self._run.seconds
            print_summary(trainer, self.settings.title, *shown, log_dir)
            if self.push_to_hub is not None:  # in one process and last: others do not wait, and a failure loses nothing
                upload(self.output_path, self.push_to_hub)

    @override
    def on_exception(self, trainer: Trainer, pl_module: PrunableModule, exception: BaseException) -> None:
        if self._run is not None:
            self._run.abandon()
        self.teardown(trainer, pl_module, "fit")

    @override
    def teardown(self, trainer: Trainer, pl_module: PrunableModule, stage: str) -> None:
        if stage != "fit" or not isinstance(pl_module, PrunableModule):
            return
        pl_module.disarm()
        data_of(trainer).end_calibration()
        give_back(trainer)
        give_back_placement(trainer)
        if self._output is not None:
            self._output.close()
        self._run = self._output = None
        if self._rng is not None:  # None if `setup` failed
            torch.set_rng_state(self._rng)


def _check_trainer(trainer: Trainer) -> None:
    """Check the settings of the Trainer that make no sense while pruning."""
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

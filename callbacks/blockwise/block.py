"""BlockStep: one block on its way from dense to pruned.

    calibrate    batch by batch: the block before, already pruned, passes its outputs on; they go through this block, whose
                 linears collect statistics
    solve        once all batches have passed: statistics become weights, stage by stage

The inputs of a block are thus the outputs of the pruned blocks before it, as in SparseGPT and D²Prune. With `stages` the inputs
of a linear are also those that the pruned linears before it in the block give. With a dense share in `target` the hidden states
of the dense model go through the block's dense weights as well, and differences are collected
(functional.pruning.perturbation).
"""

import functools
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from callbacks.blockwise.block_solver import BlockSolver
from callbacks.blockwise.calibration import CalibrationStream
from callbacks.blockwise.endings import Ending
from callbacks.blockwise.experts import counting, end_borrowing, in_groups, let_borrow, not_borrowing
from callbacks.blockwise.records import BlockRecord
from callbacks.blockwise.settings import PruningSettings
from callbacks.blockwise.stages import (
    BlockStages,
    Trace,
    difference,
    leaving_after,
    leaving_before,
    stages_of,
    tracing,
    weights_in_place,
)
from callbacks.blockwise.statistics import StatisticsCollector
from callbacks.blockwise.update_rules.monitor import AttentionMonitor
from lightning_modules.parts.architectures import PrunableLinear
from lightning_modules.parts.experts import Routing, experts_of
from utilities.distributed import Processes

log = logging.getLogger(__name__)


class BlockStep:
    """One block of one round.

    Args:
        index: Index of the block in the model.
        name: Full name of the block.
        linears: Name within the block -> linear, pruned or not.
        methods: Linear -> method of those that are pruned.
        restored: Whether the block gets the weights of an earlier run, so that it needs no statistics.
        stream: Hidden states of the calibration batches.
        settings: Settings of the run.
        processes: Processes of the run.
        context: Makes the context in which the Trainer runs a training step, such as autocast.
    """

    def __init__(
        self,
        index: int,
        name: str,
        linears: Mapping[str, PrunableLinear],
        methods: Mapping[str, str],
        restored: bool,
        stream: CalibrationStream,
        settings: PruningSettings,
        processes: Processes,
        context: Callable[[], AbstractContextManager],
    ) -> None:
        self.index, self.name, self.methods = index, name, methods
        self._all, self._stream, self._settings, self._processes = dict(linears), stream, settings, processes
        self._context = context
        self._linears = {} if restored else {name: linears[name] for name in methods}
        self._collectors: list[StatisticsCollector] = []
        """One of each stage."""
        self._writers: dict[str, float] = {}
        self._dense_weights: dict[nn.Parameter, Tensor] = {}
        self._dense_traces: dict[int, Trace] = {}
        """Batch -> trace of all stages, where there is room."""
        self._endings: dict[str, Ending] = {}
        block = stream.block(index)
        layers = {path: PrunableLinear(module) for path, module in experts_of(block).items()}
        around = {path.rpartition(".")[0] for path in layers} - {""}
        self._layer = next(iter(layers), "")
        """Name of the layer of experts, if there is one."""
        self._traced = self._all | layers | {path: PrunableLinear(block.get_submodule(path)) for path in around}
        """Linears, and layers of experts alone and with what is around them, as if they were linears."""
        self._has_routed = any(linear.is_routed for linear in self._linears.values())
        self._expert_tokens: list[int] = []
        self._borrowed: dict[str, int] = {}
        self._has_room = False
        """Whether there is room for traces of all stages and inputs of endings, of all batches."""
        self._started = time.perf_counter()

    @torch.no_grad()
    def calibrate(self, batch: Any, key: int) -> None:
        """Propagate batch number `key` through the block before, and collect statistics of this one."""
        if self.index == 0:
            self._stream.capture(batch, key)
        else:
            self._stream.propagate(batch, key, self.index - 1)
        if not self._linears:
            if self._stream.follows_dense:
                self._stream.replace_dense(key, self._stream.run(key, self.index, dense=True))
            return
        if not self._collectors:
            self._begin_stages(key)
        self._collect(key, 0)

    @torch.no_grad()
    def solve(
        self, solver: BlockSolver, attention: AttentionMonitor | None, loggers: list[Logger], histograms: bool
    ) -> BlockRecord:
        """Prune the block from its statistics, stage by stage.

        Args:
            solver: Solver of the run.
            attention: Follows attention in the first process, if attention is measured.
            loggers: Receive attention maps and histograms.
            histograms: Whether to log histograms of the scores.

        Returns:
            The record of the block, with times.
        """
        try:
            return self._solve_stages(BlockRecord(name=self.name), solver, attention, loggers, histograms)
        finally:
            end_borrowing(self._linears.values())
            self._dense_weights.clear()

    def _solve_stages(
        self,
        record: BlockRecord,
        solver: BlockSolver,
        attention: AttentionMonitor | None,
        loggers: list[Logger],
        histograms: bool,
    ) -> BlockRecord:
        collectors = self._collectors or [StatisticsCollector({})]
        for number, collector in enumerate(collectors):
            if number:
                with self._context():
                    self._count_tokens(number)
                    for key in self._stream.keys:
                        self._collect(key, number)
            synchronize(self._device)
            collected, before = time.perf_counter(), record.seconds_rule
            record.seconds_statistics += collected - self._started
            methods = {name: self.methods[name] for name in collector.linears}
            place = {"first": number == 0, "last": number == len(collectors) - 1}
            record = solver.prune(self.index, collector, methods, attention, record, loggers, histograms, **place)
            synchronize(self._device)
            self._started = time.perf_counter()
            record.seconds_solve += self._started - collected - (record.seconds_rule - before)
            collectors[number] = collector = StatisticsCollector({})  # frees its sums
        record.expert_tokens, record.borrowed_tokens = self._expert_tokens, self._borrowed
        return record

    def weights(self) -> dict[str, Tensor]:
        """Return name -> present weight of the pruned linears."""
        return {name: linear.weight for name, linear in self._linears.items()}

    @property
    def _device(self) -> torch.device:
        return next((linear.weight.device for linear in self._linears.values()), torch.device("cpu"))

    def _begin_stages(self, key: int) -> None:
        """Find the stages on the first batch; without `stages` and a dense share all linears are one stage, found by hooks.

        Experts come after the other linears, in as many passes as memory needs, since it has to be known how many tokens reach
        each. Without `stages` these passes see the dense weights of the block.
        """
        settings, dense, hidden = self._settings, self._stream.follows_dense, self._stream.hidden(key)
        found = BlockStages([list(self._linears)], {})
        if settings.stages or dense:
            run = functools.partial(self._stream.run, key, self.index)
            given = self._stream.block(self.index), hidden, run, self._traced, self._linears
            found = self._processes.from_first(self._processes.together(lambda: stages_of(*given)))
        self._writers = found.writers if dense else {}
        if dense and not found.writers:
            log.info("%s adds more than outputs of linears to its hidden states; targets make up for inputs only.", self.name)
        stages = found.names if settings.stages else [[name for names in found.names for name in names]]
        if self._has_routed:
            stages = self._processes.from_first(self._with_experts_apart(stages, hidden.device))
        for number, stage in enumerate(stages):
            perturbed = dense and (self.index > 0 or number > 0)  # the first inputs are those of the dense model
            siblings = [names for names in found.names if names[0] in stage and not self._linears[names[0]].is_routed]
            channels = {names[0]: self._channels(names) for names in siblings} if perturbed else {}
            channels |= dict.fromkeys(self._readers(stage), 0) if perturbed else {}
            linears = {name: self._linears[name] for name in stage}
            weights = self._stream.class_tokens, settings.class_token_weight
            alone = settings.stages and stage in found.names and not any(channels.values()) and self._derives_outputs(stage)
            given = linears, settings.precision, settings.updates, channels, *weights, alone
            self._collectors.append(StatisticsCollector(*given))
        if len(stages) > 1:
            self._has_room = self._stream.has_room_for(self._bytes_of_a_batch(hidden, found), hidden.device)
            self._endings = found.endings if self._has_room and settings.stages else {}
        if len(stages) > 1 and (dense or not settings.stages):
            parameters = {linear.parameter for linear in self._linears.values()}
            self._dense_weights = {parameter: parameter.detach().clone() for parameter in parameters}

    def _with_experts_apart(self, stages: list[list[str]], device: torch.device) -> list[list[str]]:
        """Return stages that have either experts, as many as fit, or other linears; never experts first."""
        found: list[list[str]] = []
        for stage in stages:
            routed = [name for name in stage if self._linears[name].is_routed]
            others = [name for name in stage if name not in set(routed)]
            found += [others] if others or not found else []
            found += in_groups(routed, self._linears, device) if routed else []
        return found

    def _count_tokens(self, number: int) -> None:
        """Count the tokens that reach each expert, before the first stage of experts, and let those with too few borrow."""
        experts = {linear.module.experts for linear in self._collectors[number].linears.values() if linear.is_routed}
        if not experts or self._expert_tokens:
            return
        (module,) = experts
        first = next(linear for linear in self._collectors[number].linears.values() if linear.is_routed)
        with counting(module) as counts, self._own_weights():
            for key in self._stream.keys:
                with leaving_after([first]):
                    self._stream.run(key, self.index)
        counts = counts.to(self._device)
        self._processes.sum([counts])
        self._expert_tokens = counts[:-1].tolist()
        self._borrowed = let_borrow(self._linears, {module: counts})

    def _own_weights(self) -> AbstractContextManager:
        """Let the block have its dense weights in all passes, unless it is pruned by stages."""
        return weights_in_place({} if self._settings.stages else self._dense_weights)

    def _bytes_of_a_batch(self, hidden: Tensor, found: BlockStages) -> int:
        """Return the memory of a batch's dense trace of all stages, and of the inputs of its endings, in bytes."""
        features = sum(self._linears[name].in_features for name in found.endings)
        if self._stream.follows_dense:
            features += hidden.shape[-1] + sum(self._linears[names[0]].in_features for names in found.names)
            features += hidden.shape[-1] * len(found.writers)
        return hidden.nbytes // hidden.shape[-1] * features

    def _readers(self, stage: list[str]) -> list[str]:
        """Return the first linear of each expert that reads hidden states."""
        modules = {self._linears[name].module: name for name in reversed(stage) if self._linears[name].is_routed}
        return [name for module, name in modules.items() if module.reads_hidden]

    def _derives_outputs(self, stage: list[str]) -> bool:
        """Return whether all that scores need of these linears' outputs follows from their inputs."""
        linears = [self._linears[name] for name in stage]
        unbiased = all(getattr(linear.module, "bias", None) is None for linear in linears) or not self._settings.reads_outputs
        return self._settings.derives_outputs and unbiased and not any(linear.is_routed for linear in linears)

    def _channels(self, siblings: list[str]) -> int:
        """Return the number of channels of the hidden states that a linear adds to, 0 if it does not or has siblings."""
        return self._linears[siblings[0]].out_features if len(siblings) == 1 and siblings[0] in self._writers else 0

    def _collect(self, key: int, number: int) -> None:
        """Collect the statistics of a stage from one batch."""
        collector = self._collectors[number]
        dense = self._trace_dense(key, number) if self._stream.follows_dense else None
        own = Trace(self._stream.hidden(key), self._writers)

        def lacks(name: str, x: Tensor, routing: Routing | None) -> Tensor:
            if collector.perturbations[name].out_features:
                return difference(dense.sum_up_to(name), own.sum_up_to(name)) / self._writers[name]
            return (dense.inputs[name] if routing is None else dense.inputs[self._layer][routing.index]) - x

        endings = [name for name in self._endings if name in collector.linears]
        with (
            self._own_weights(),
            tracing(own, self._traced, inputs=endings, outputs=self._writers if collector.perturbations else ()),
            collector.collecting(self._stream.positions(key), lacks),
            self._leaving(collector),
        ):
            self._stream.run(key, self.index)
        block = self._stream.block(self.index)
        for name in endings:
            ending, module = self._endings[name], self._linears[name].module
            self._stream.shorten(key, block.get_submodule(ending.submodule), ending.forward(module, own.inputs[name]))

    def _leaving(self, collector: StatisticsCollector) -> AbstractContextManager:
        """Leave a pass where nothing more of it is measured."""
        linears = list(collector.linears.values())
        return leaving_before(linears[0]) if collector.inputs_only else leaving_after(linears)

    def _trace_dense(self, key: int, number: int) -> Trace:
        """Return what linears of a stage read and write in the dense model; after the last stage its hidden states move on.

        One run traces all stages if there is room for the traces of all batches; if not, each stage has its own run, up to its
        last linear.
        """
        last = number == len(self._collectors) - 1
        if key in self._dense_traces:
            return self._dense_traces.pop(key) if last else self._dense_traces[key]
        ahead = number == 0 and not last and self._has_room
        traced = self._collectors if ahead else [self._collectors[number]]
        names = [name for collector in traced for name in collector.perturbations]
        perturbed = {self._layer if self._all[name].is_routed else name: None for name in names}
        trace, output = Trace(self._stream.hidden(key, dense=True), self._writers), None
        with (
            weights_in_place(self._dense_weights),
            not_borrowing(self._linears.values()),
            tracing(trace, self._traced, inputs=perturbed, outputs=self._writers if perturbed else ()),
            ExitStack() as leaving,
        ):
            if not (ahead or last):
                leaving.enter_context(leaving_after(self._collectors[number].linears.values()))
            if perturbed or ahead or last:
                output = self._stream.run(key, self.index, dense=True)
        if ahead:
            self._dense_traces[key] = trace
        if ahead or last:
            self._stream.replace_dense(key, output)
        return trace


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, so that clocks measure its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize()

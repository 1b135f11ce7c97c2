"""BlockSolver: turns the statistics of one block into its pruned weights, the same in all processes.

sum        the owner of each linear sums its statistics over all processes
choose     the first process lets the attention rule choose the states of q, k and v (D²Prune §3.2)
solve      every owner prunes its linears
send       every owner sends its weights to all processes, which must then hold the same bits
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from callbacks.blockwise.exchange import owners_of, send_weights, sum_statistics
from callbacks.blockwise.plan import pruned_projections
from callbacks.blockwise.quotas import Quotas
from callbacks.blockwise.records import BlockRecord, LinearRecord
from callbacks.blockwise.settings import PruningSettings
from callbacks.blockwise.solve import kept_and_pruned, log_scores, record_of, solve
from callbacks.blockwise.statistics import StatisticsCollector
from callbacks.blockwise.update_rules import AttentionRule, OutlierRule
from callbacks.blockwise.update_rules.attention import HELD, UPDATED, method_of
from callbacks.blockwise.update_rules.base import UPDATE_METHOD
from callbacks.blockwise.update_rules.monitor import AttentionMonitor
from callbacks.blockwise.update_rules.outlier import outlier_ratios
from functional.pruning import PruneResult, target_of
from lightning_modules.base.prunable import PrunableModule
from utilities.distributed import Processes

Solved = dict[str, tuple[PruneResult, str]]
"""Linear -> its result and the method that pruned it."""


class BlockSolver:
    """Prunes block after block of a model.

    Args:
        module: The model.
        settings: Settings of the run.
        processes: Processes that share the work.
        quotas: Zeros of each linear; None if all linears have the same share.
    """

    def __init__(
        self, module: PrunableModule, settings: PruningSettings, processes: Processes, quotas: Quotas | None = None
    ) -> None:
        self.quotas = quotas
        self.calibration: dict[str, float] = {}
        """Number of samples, and of tokens per sample, of the whole calibration set."""
        self._module, self._settings, self._processes = module, settings, processes

    def prune(
        self,
        index: int,
        collector: StatisticsCollector,
        methods: Mapping[str, str],
        attention: AttentionMonitor | None,
        record: BlockRecord,
        loggers: list[Logger],
        histograms: bool,
        first: bool = True,
        last: bool = True,
    ) -> BlockRecord:
        """Give the linears of a block, or of one of its stages, their new weights.

        Args:
            index: Index of the block in the model.
            collector: Statistics of this process's samples.
            methods: Linear -> planned method.
            attention: Follows attention in the first process, if attention is measured.
            record: Record of the block so far.
            loggers: Receive attention maps and histograms.
            histograms: Whether to log histograms of the scores.
            first: Whether no linear of the block has been pruned yet.
            last: Whether none is left afterwards.

        Returns:
            The record, the same in all processes.

        Raises:
            ValueError: As `prune_linears`, naming block and linear.
            RuntimeError: If another process failed, or holds different weights afterwards.
        """
        processes = self._processes
        if self.quotas is not None:
            record.allocation = self.quotas.measures.get(record.name, {})  # empty for a block that is ignored
        processes.together(lambda: collector.check(record.name))  # every process checks its own batches before the sum
        roles = self._roles(collector)
        owners = owners_of(collector, processes.size, roles.values() if self._chooses else ())
        sum_statistics(processes, collector, owners)

        def work() -> Solved:
            if attention is not None and first:
                attention.enter(index)
            found = self._choose(collector, roles, methods, attention, record) if first or roles else {}
            own = {name: method for name, method in methods.items() if owners[name] == processes.rank and name not in found}
            return found | self._solve_all(collector, record.name, own)

        solved = processes.together(work)
        own = {name: result.weight for name, (result, _) in solved.items()}
        send_weights(processes, collector.linears, own, owners, record.name)

        def measure() -> dict[str, LinearRecord]:
            if attention is not None and last:
                attention.leave(index, record, loggers)
            return {name: self._record_of(record.name, name, collector, *pair) for name, pair in solved.items()}

        found = {name: entry for part in processes.gather(processes.together(measure)) for name, entry in part.items()}
        record.linears |= {name: found[name] for name in collector.linears}
        if histograms:
            scores = {name: kept_and_pruned(result) for name, (result, _) in solved.items()}
            for name, entry in (pair for part in processes.gather(scores) for pair in part.items()):
                log_scores(loggers, name, entry, index)
        return processes.from_first(record)

    @torch.no_grad()
    def restore(self, index: int, give: Callable[[], None], attention: AttentionMonitor | None) -> None:
        """Give a block the weights of an earlier run.

        Args:
            index: Index of the block in the model.
            give: Gives the block its weights.
            attention: Follows attention in the first process, if attention is measured.
        """
        if attention is not None:
            attention.enter(index)
        give()
        if attention is not None:
            attention.pass_by(index)

    def assign(self, block: str, weights: Mapping[str, Tensor], names: Iterable[str]) -> None:
        """Write weights, which only the first process has, into the linears of a block.

        Args:
            block: Full name of the block.
            weights: Linear -> weight, in the first process.
            names: Linears of the block that were pruned.
        """
        linears = self._module.linears(self._module.blocks[block])
        for name in names:
            linear = linears[name]
            weight = weights[name].to(linear.weight.device) if self._processes.is_first else linear.weight
            linear.assign(self._processes.send(weight, 0))

    @property
    def _chooses(self) -> bool:
        return isinstance(self._settings.update_rule, AttentionRule)

    def _roles(self, collector: StatisticsCollector) -> dict[str, str]:
        return pruned_projections(self._module, collector.linears)

    def _record_of(
        self, block: str, name: str, collector: StatisticsCollector, result: PruneResult, method: str
    ) -> LinearRecord:
        linear = collector.linears[name]
        sparsity = None if self.quotas is None else self.quotas.sparsity(block, name, linear.weight.numel())
        return record_of(self._settings, linear, result, method, f"{block}.{name}", sparsity)

    def _choose(
        self,
        collector: StatisticsCollector,
        roles: Mapping[str, str],
        methods: Mapping[str, str],
        attention: AttentionMonitor | None,
        record: BlockRecord,
    ) -> Solved:
        """Let the attention rule choose, or record what the other rules have decided.

        Returns:
            The projections that are solved already: those that the attention rule chose, in the first process.
        """
        linears = {role: collector.linears[name] for role, name in roles.items()}
        if self._chooses and roles:
            if attention is None:  # another process chooses
                return {}
            state, results = attention.choose(linears, self._states(collector, record.name, roles))
            return {name: (results[role], method_of(state[role])) for role, name in roles.items()}
        if self._settings.method == "d2prune":
            record.update_shares = {role: float(methods[name] == UPDATE_METHOD) for role, name in roles.items()}
            record.choice = "+".join(role for role, share in record.update_shares.items() if not share) or "none"
        if isinstance(self._settings.update_rule, OutlierRule):
            record.outlier_ratios = outlier_ratios(linears)
        return {}

    def _states(
        self, collector: StatisticsCollector, block: str, roles: Mapping[str, str]
    ) -> dict[str, dict[str, PruneResult]]:
        """Return role -> state -> result."""
        names = list(roles.values())
        updated, held = (self._solve(collector, block, names, method_of(state)) for state in (UPDATED, HELD))

        def states_of(name: str) -> dict[str, PruneResult]:
            weight, inputs, target = collector.linears[name].weight, collector.inputs(name), None
            perturbation, share = collector.perturbations.get(collector.leader(name)), self._settings.dense_share
            if perturbation is not None and share:
                target = target_of(weight, inputs, perturbation, updated[name].damping, share)
            return self._settings.update_rule.states_of(updated[name], held[name], weight, inputs, target)

        return {role: states_of(name) for role, name in roles.items()}

    def _solve_all(self, collector: StatisticsCollector, block: str, methods: Mapping[str, str]) -> Solved:
        """Solve siblings that have the same method together."""
        together: dict[tuple[str, str], list[str]] = {}
        for name, method in methods.items():
            together.setdefault((collector.leader(name), method), []).append(name)
        return {
            name: (result, method)
            for (_, method), names in together.items()
            for name, result in self._solve(collector, block, names, method).items()
        }

    def _solve(self, collector: StatisticsCollector, block: str, names: list[str], method: str) -> dict[str, PruneResult]:
        inputs = collector.inputs(names[0])
        if not collector.linears[names[0]].is_routed:  # which reads some tokens only
            self.calibration = {"samples": inputs.num_samples, "tokens_per_sample": inputs.tokens_per_sample()}
        return solve(self._settings, collector, block, names, method, self.quotas)

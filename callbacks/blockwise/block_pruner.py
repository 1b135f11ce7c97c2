"""BlockPruner: one block's statistics become its pruned weights, in all processes alike.

    statistics   of each linear are added up in its owner
    choice       the first process lets the attention rule choose what q, k and v get (D²Prune §3.2)
    solve        every owner prunes its linears
    weights      go from the owner to all, and all must hold the same bits

BlockwisePruning says when; the mathematics is `functional.pruning`.
"""

from collections.abc import Iterable, Mapping

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from callbacks.blockwise.collector import StatisticsCollector
from callbacks.blockwise.processes import Processes, owners_of
from callbacks.blockwise.records import BlockRecord, LinearRecord
from callbacks.blockwise.settings import PruningSettings
from callbacks.blockwise.solve import kept_and_pruned, log_scores, record_of, solve
from callbacks.blockwise.targets import Targets
from callbacks.blockwise.update_rules.attention_step import AttentionStep
from callbacks.blockwise.update_rules.rules import HELD, ROLES, UPDATED, method_of, outlier_choice, states_of
from functional.pruning import PruneResult
from lightning_modules.base.prunable import PrunableModule
from lightning_modules.parts.architectures import PrunableLinear
from utilities.digest import checksum

Solved = dict[str, tuple[PruneResult, str]]
"""Name of a linear -> its result, and the method that it is called by."""
Options = dict[str, dict[str, PruneResult]]
"""Role -> state -> result."""


class BlockPruner:
    """Prunes block after block of a model.

    Args:
        module: The model.
        settings: Of the run.
        processes: That share the work.
        targets: Of each linear, where they are not all the same.
    """

    def __init__(
        self,
        module: PrunableModule,
        settings: PruningSettings,
        processes: Processes,
        targets: Targets | None = None,
    ) -> None:
        self.targets = targets
        self._module, self._settings, self._processes = module, settings, processes
        self.calibration: dict[str, float] = {}
        """Samples, and tokens per sample, of the whole calibration set."""

    def prune(
        self,
        index: int,
        collector: StatisticsCollector,
        methods: Mapping[str, str],
        attention: AttentionStep | None,
        record: BlockRecord,
        loggers: list[Logger],
        histograms: bool = False,
    ) -> BlockRecord:
        """Prune a block.

        Args:
            index: Of the block.
            collector: Its statistics, of this process's share.
            methods: Of its linears, as planned.
            attention: In the first process, if attention is looked at.
            record: Of the block, to be filled; its name is known.
            loggers: Take attention maps and histograms.
            histograms: Whether to log those of the scores.

        Returns:
            The record, the same in all processes.

        Raises:
            ValueError: As `prune_linear`, naming block and linear.
            RuntimeError: If another process failed, or holds other weights afterwards.
        """
        processes = self._processes
        if self.targets is not None:
            record.allocation = self.targets.measures.get(record.name, {})  # none of a block that is ignored
        processes.together(lambda: collector.check(record.name))  # each its own batches, before they are summed
        chosen_from = self._roles(collector).values() if self._settings.rule == "attention" else ()
        owners = owners_of(collector, processes.size, chosen_from)
        processes.reduce(collector, owners)

        def work() -> Solved:
            if attention is not None:
                attention.enter(index)
            found = self._choose(collector, methods, attention, record)
            own = {name: method for name, method in methods.items() if owners[name] == processes.rank and name not in found}
            return found | self._solve_all(collector, record.name, own)

        solved = processes.together(work)
        self._exchange(collector.linears, {name: result.weight for name, (result, _) in solved.items()}, owners, record.name)

        def measure() -> dict[str, LinearRecord]:
            if attention is not None:
                attention.leave(index, record, loggers)
            return {
                name: self._record_of(record.name, name, collector.linears[name], result, method)
                for name, (result, method) in solved.items()
            }

        found = {name: entry for part in processes.gather(processes.together(measure)) for name, entry in part.items()}
        record.linears = {name: found[name] for name in collector.linears}
        if histograms:
            scores = {name: kept_and_pruned(result) for name, (result, _) in solved.items()}
            for name, entry in (pair for part in processes.gather(scores) for pair in part.items()):
                log_scores(loggers, name, entry, index)
        return processes.from_first(record)

    def restore(
        self, index: int, block: str, weights: Mapping[str, Tensor], names: Iterable[str], attention: AttentionStep | None
    ) -> None:
        """Give a block the weights that it got in an earlier run; only the first process has them."""
        linears = self._module.linears(self._module.blocks[block])
        if attention is not None:
            attention.enter(index)
        for name in names:
            linear = linears[name]
            weight = weights[name].to(linear.weight.device) if self._processes.is_first else linear.weight
            with torch.no_grad():
                linear.weight.copy_(self._processes.send(weight, 0))
        if attention is not None:
            attention.pass_by(index)

    def _exchange(
        self, linears: Mapping[str, PrunableLinear], own: Mapping[str, Tensor], owners: Mapping[str, int], block: str
    ) -> None:
        """Give all linears in all processes the new weights of their owners, and see that all hold the same."""
        for name, linear in linears.items():
            with torch.no_grad():
                linear.weight.copy_(self._processes.send(own.get(name, linear.weight), owners[name]))
        if self._processes.size > 1:
            self._processes.check_equal(checksum(linear.weight for linear in linears.values()), block)

    def _record_of(self, block: str, name: str, linear: PrunableLinear, result: PruneResult, method: str) -> LinearRecord:
        sparsity = None if self.targets is None else self.targets.sparsity(block, name, linear.weight.numel())
        return record_of(self._settings, linear, result, method, f"{block}.{name}", sparsity)

    def _roles(self, collector: StatisticsCollector) -> dict[str, str]:
        projections = self._module.architecture.projections
        return {role: projections[role] for role in ROLES if projections.get(role) in collector.linears}

    def _choose(
        self,
        collector: StatisticsCollector,
        methods: Mapping[str, str],
        attention: AttentionStep | None,
        record: BlockRecord,
    ) -> Solved:
        """Ask the update rule: what it has solved already."""
        roles = self._roles(collector)
        linears = {role: collector.linears[name] for role, name in roles.items()}
        if self._settings.rule == "attention" and roles:
            if attention is None:  # another process chooses
                return {}
            options = self._states(collector, record.name, roles)
            state, results = attention.choose(linears, options)
            return {name: (results[role], method_of(state[role])) for role, name in roles.items()}
        if self._settings.method == "d2prune":
            record.update_shares = {role: float(methods[name] == "d2_sparsegpt") for role, name in roles.items()}
            record.choice = "+".join(role for role, share in record.update_shares.items() if not share) or "none"
        if self._settings.rule == "outlier" and roles:
            record.outlier_ratios = outlier_choice(linears)[1]
        return {}

    def _states(
        self, collector: StatisticsCollector, block: str, roles: Mapping[str, str]
    ) -> dict[str, dict[str, PruneResult]]:
        """Role -> state -> result."""
        updated, held = (self._solve(collector, block, list(roles.values()), method_of(state)) for state in (UPDATED, HELD))
        candidates = self._settings.candidates
        return {
            role: states_of(updated[name], held[name], collector.linears[name].weight, collector.inputs(name), candidates)
            for role, name in roles.items()
        }

    def _solve_all(self, collector: StatisticsCollector, block: str, methods: Mapping[str, str]) -> Solved:
        """Linears of one input and one method together."""
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
        self.calibration = {"samples": inputs.num_samples, "tokens_per_sample": inputs.num_tokens / inputs.num_samples}
        return solve(self._settings, collector, block, names, method, self.targets)

"""Solve siblings: from their statistics to pruned weights, records and score histograms."""

import logging
from collections.abc import Sequence
from fractions import Fraction

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor

from callbacks.blockwise.quotas import Quotas
from callbacks.blockwise.records import LinearRecord
from callbacks.blockwise.settings import PruningSettings
from callbacks.blockwise.statistics import StatisticsCollector
from functional.pruning import UPDATED, PruneResult, prune_linears
from functional.pruning.masks import zeros_of
from lightning_modules.parts.architectures import PrunableLinear

log = logging.getLogger(__name__)

MOST_SCORES = 1_000_000
"""Largest number of scores in a histogram; more look the same, and other processes have to send theirs."""


def solve(
    settings: PruningSettings,
    collector: StatisticsCollector,
    block: str,
    names: Sequence[str],
    method: str,
    quotas: Quotas | None = None,
) -> dict[str, PruneResult]:
    """Prune linears of a block that read the same tensor, without changing their modules.

    Args:
        settings: Settings of the run.
        collector: Statistics of the block.
        block: Name of the block.
        names: Siblings, by name within the block.
        method: Method of `prune_linears`.
        quotas: Zeros of each linear; None if all linears have the same share.

    Returns:
        Name -> result.

    Raises:
        ValueError: As `prune_linears` and `StatisticsCollector.check`, naming block and linear.
    """
    collector.check(block)
    inputs = collector.inputs(names[0])
    outputs = [collector.outputs_of(name) if settings.reads_outputs else None for name in names]
    arguments = settings.arguments()
    weights = [collector.linears[name].weight for name in names]
    if method in UPDATED:
        arguments |= {
            "perturbation": collector.perturbations.get(collector.leader(names[0])),
            "dense_share": settings.dense_share,
        }
    if quotas is not None:
        pairs = zip(names, weights, strict=True)
        arguments["sparsity"] = [quotas.sparsity(block, name, weight.numel()) for name, weight in pairs]
    try:
        results = prune_linears(weights, inputs, outputs, method=method, **arguments)
    except ValueError as error:
        if len(names) == 1:
            raise type(error)(f"{block}.{names[0]}: {error}") from error
        alone = [solve(settings, collector, block, [name], method, quotas) for name in names]  # names the one that fails
        return {name: result for found in alone for name, result in found.items()}
    damping = results[0].damping
    if damping is not None and damping > settings.solver.damping:
        log.warning("%s.%s: the Hessian needed a damping of %g.", block, ", ".join(names), damping)
    return dict(zip(names, results, strict=True))


def record_of(
    settings: PruningSettings,
    linear: PrunableLinear,
    result: PruneResult,
    method: str,
    full_name: str,
    sparsity: Fraction | None = None,
) -> LinearRecord:
    """Make the record of a linear from its present weights.

    Args:
        settings: Settings of the run.
        linear: The pruned linear.
        result: Result of its solve.
        method: Method that pruned it.
        full_name: Full name of the linear, for the error.
        sparsity: Share of zeros of this linear; None if all linears have that of the settings.

    Raises:
        RuntimeError: If the linear has fewer zeros than wanted.
    """
    weight = linear.weight
    record = LinearRecord(
        method=method,
        error=result.error,
        norm=result.norm,
        zeros=int((weight == 0).sum()),
        weights=weight.numel(),
        damping=result.damping,
    )
    share = (settings.sparsity or 0.0) if sparsity is None else sparsity
    wanted = zeros_of(weight.shape, settings.by_rows(method), share, settings.pattern)
    if record.zeros < wanted:
        raise RuntimeError(
            f"{full_name}: {record.zeros} of {record.weights} weights are zero, but {wanted} were wanted. "
            "This is a defect of the pruning code; please report it with the settings."
        )
    return record


def kept_and_pruned(result: PruneResult) -> dict[str, Tensor]:
    """Return log10 of the positive scores of kept and of pruned weights, at most `MOST_SCORES` of each, on the CPU."""
    found = {}
    for part, mask in (("kept", result.mask), ("pruned", ~result.mask)):
        scores = result.scores[mask.to(result.scores.device)]
        scores = scores[scores > 0]
        found[part] = scores[:: len(scores) // MOST_SCORES + 1].log10().cpu()
    return found


def log_scores(loggers: list[Logger], name: str, scores: dict[str, Tensor], step: int) -> None:
    """Write histograms of scores to TensorBoard.

    Args:
        loggers: Loggers of the run; only TensorBoard gets histograms.
        name: Name of the linear within its block.
        scores: Result of `kept_and_pruned`.
        step: Index of the block.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            for part, logs in scores.items():
                if len(logs):
                    logger.experiment.add_histogram(f"log10_scores_{part}/{name}", logs, step)

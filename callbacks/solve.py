"""From the statistics of a block to its pruned linears: one solve, its record, its histograms."""

import logging

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from callbacks.collector import StatisticsCollector
from callbacks.report import LinearRecord
from callbacks.settings import PruningSettings
from functional.pruning import PruneResult, prune_linear
from functional.pruning.masks import zeros_of
from lightning_modules.architectures import PrunableLinear

log = logging.getLogger(__name__)


def solve(settings: PruningSettings, collector: StatisticsCollector, block: str, name: str, method: str) -> PruneResult:
    """Prune one linear of a block; its module keeps its weights.

    Raises:
        ValueError: As `prune_linear`, naming block and linear.
    """
    inputs, outputs = collector.inputs(name), collector.outputs[name]
    arguments = settings.arguments(inputs.num_tokens / inputs.num_samples)
    try:
        result = prune_linear(collector.linears[name].weight, inputs, outputs, method=method, **arguments)
    except ValueError as error:
        raise type(error)(f"{block}.{name}: {error}") from error
    if result.damping is not None and result.damping > settings.damping:
        log.warning("%s.%s: the Hessian needed a damping of %g.", block, name, result.damping)
    return result


def record_of(
    settings: PruningSettings, linear: PrunableLinear, result: PruneResult, method: str, full_name: str
) -> LinearRecord:
    """What pruning.json says of a linear, from its weights as they are now.

    Raises:
        RuntimeError: If it has fewer zeros than wanted.
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
    arguments = settings.arguments(1.0)
    wanted = zeros_of(weight.shape, method, arguments["sparsity"], arguments["pattern"])
    if record.zeros < wanted:
        raise RuntimeError(
            f"{full_name}: {record.zeros} of {record.weights} weights are zero where {wanted} were wanted. "
            "This is a defect of the pruning code; please report it with the settings."
        )
    return record


def log_scores(loggers: list[Logger], name: str, result: PruneResult, step: int) -> None:
    """Histograms of the scores of kept and pruned weights."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            for state, scores in (("kept", result.scores[result.mask]), ("pruned", result.scores[~result.mask])):
                logs = scores[scores > 0].log10()
                if len(logs):
                    logger.experiment.add_histogram(f"log10_scores_{state}/{name}", logs, step)

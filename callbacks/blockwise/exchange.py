"""Share the work on a block among the processes of a pruning run.

Each process collects statistics of its own calibration samples. Once a block, the sums of each linear go to its owner, the only
process with the whole Gram matrix. It solves the linear and sends the weights to all, which must then hold the same bits.
"""

from collections.abc import Iterable, Mapping

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from callbacks.blockwise.statistics import StatisticsCollector
from lightning_modules.parts.architectures import PrunableLinear
from utilities.digest import checksum
from utilities.distributed import Processes, need_whole_weights


def processes_of(trainer: Trainer) -> Processes:
    """Return the processes of a trainer, and prepare its strategy for a run without gradients.

    Raises:
        ValueError: If the strategy is neither a single device nor DDP.
    """
    need_whole_weights(trainer, "BlockwisePruning")
    if isinstance(trainer.strategy, SingleDeviceStrategy):
        return Processes()
    # No DDP wrapper: there are no gradients to reduce, buffers are constants, and it would take as much memory as the model.
    trainer.strategy.configure_ddp = lambda: None
    return Processes(trainer.global_rank, trainer.world_size)


def give_back(trainer: Trainer) -> None:
    """Undo what `processes_of` did to the strategy."""
    trainer.strategy.__dict__.pop("configure_ddp", None)


def owners_of(collector: StatisticsCollector, size: int, first: Iterable[str] = ()) -> dict[str, int]:
    """Choose the owner of each linear: the most expensive linears first, each to the process with the least work so far.

    Siblings have one owner, since they share a Gram matrix and its factor.

    Args:
        collector: Statistics of the block.
        size: Number of processes.
        first: Linears that the first process must own, since it chooses among several results.

    Returns:
        Linear -> rank of its owner.
    """
    first, load, owners = set(first), [0.0] * size, {}
    siblings = collector.siblings()

    def work(leader: str) -> float:
        columns = collector.inputs(leader).features
        rows = sum(collector.linears[name].out_features for name in siblings[leader])
        return columns**3 + rows * columns**2

    for leader in sorted(siblings, key=lambda leader: (first.isdisjoint(siblings[leader]), -work(leader))):
        owner = load.index(min(load)) if first.isdisjoint(siblings[leader]) else 0
        load[owner] += work(leader)
        owners |= dict.fromkeys(siblings[leader], owner)
    return owners


def sum_statistics(processes: Processes, collector: StatisticsCollector, owners: Mapping[str, int]) -> None:
    """Sum the statistics of each linear over all processes in its owner; those of other processes are invalid afterwards.

    Args:
        processes: Processes of the run.
        collector: Statistics of this process's samples; changed in place.
        owners: Linear -> rank of its owner.
    """
    if processes.size == 1:
        return
    parts = [(collector.inputs(leader), owners[leader]) for leader in collector.siblings()]
    parts += [(perturbation, owners[leader]) for leader, perturbation in collector.perturbations.items()]
    parts += [(outputs, owners[name]) for name, outputs in collector.outputs.items()]
    if not parts:
        return
    sums = [(value, owner) for statistics, owner in parts for value in statistics.sums().values()]
    names = [(part, name) for part, _ in parts for name in part.counts()]
    counts = torch.tensor([getattr(part, name) for part, name in names], device=sums[0][0].device)
    processes.sum([counts])
    processes.sum_to(sums)
    for (part, name), count in zip(names, counts.tolist(), strict=True):
        setattr(part, name, count)


@torch.no_grad()
def send_weights(
    processes: Processes,
    linears: Mapping[str, PrunableLinear],
    own: Mapping[str, Tensor],
    owners: Mapping[str, int],
    block: str,
) -> None:
    """Write the owners' new weights into the linears of all processes.

    Args:
        processes: Processes of the run.
        linears: Name -> linear of the block.
        own: Name -> new weight of the linears that this process owns.
        owners: Name -> rank of the owner.
        block: Name of the block, for the error.

    Raises:
        RuntimeError: If the processes hold different bits afterwards.
    """
    for name, linear in linears.items():
        linear.assign(processes.send(own.get(name, linear.weight), owners[name]))
    if processes.size > 1:
        processes.check_equal(checksum(linear.weight for linear in linears.values()), block)

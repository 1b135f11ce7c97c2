"""Processes: what the processes of a pruning run tell each other; with one process there is nothing to tell.

Every process looks at its own share of the calibration set. Statistics are sums, so once a block the share of each linear goes
to its owner, which alone has the whole Gram matrix, prunes the linear and sends the weights to all. All must then hold the
same bits. An error of one process is raised in all, so that none waits for it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from callbacks.base.whole_weights import need_whole_weights
from callbacks.blockwise.collector import StatisticsCollector
from lightning_modules.base.resumable import gathered
from utilities.digest import as_bytes

T = TypeVar("T")


class Processes:
    """The processes of a run, seen from one of them.

    Args:
        rank: Of this process.
        size: Their number.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and looks at attention."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        return [value] if self.size == 1 else gathered(value)

    def from_first(self, value: T) -> T:
        """The value of the first process."""
        return self.gather(value if self.is_first else None)[0]

    def together(self, work: Callable[[], T]) -> T:
        """Do some work that talks to no other process; if it fails in one, it fails in all.

        Raises:
            Exception: The own one where the work failed, else a RuntimeError that tells of the other process's.
        """
        own: Exception | None = None
        try:
            result = work()
        except Exception as error:
            own = error
        failed = self.gather(None if own is None else f"{type(own).__name__}: {own}")
        if own is not None:
            raise own
        for rank, message in enumerate(failed):
            if message is not None:
                raise RuntimeError(f"Process {rank} of {self.size} failed, so this one stops too: {message}")
        return result

    def in_first(self, work: Callable[[], T]) -> T | None:
        """Do some work in the first process; if it fails, it fails in all. Its result there, None elsewhere."""
        return self.together(lambda: work() if self.is_first else None)

    def reduce(self, collector: StatisticsCollector, owners: Mapping[str, int]) -> None:
        """Add up the statistics of all processes, those of a linear in its owner; elsewhere they are worth nothing then.

        Args:
            collector: Of the block.
            owners: Rank of the owner of each linear; linears that share their input have one owner.
        """
        if self.size == 1:
            return
        leaders = {leader: owners[leader] for leader in collector.groups()}
        parts = [(collector.inputs(name), owner) for name, owner in leaders.items()]
        parts += [(collector.outputs[name], owner) for name, owner in owners.items()]
        if not parts:
            return
        sums = [(value, owner) for statistics, owner in parts for value in statistics.sums().values()]
        names = [(part, name) for part, _ in parts for name in part.counts()]
        counts = torch.tensor([getattr(part, name) for part, name in names], device=sums[0][0].device)
        dist.all_reduce(counts)
        for value, owner in sums:
            dist.reduce(value, dst=owner)
        for (part, name), count in zip(names, counts.tolist(), strict=True):
            setattr(part, name, count)

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over all processes."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def send(self, tensor: Tensor, owner: int) -> Tensor:
        """The tensor of the owner, bit by bit; the others give one of the same shape, type and device, which is not changed."""
        if self.size == 1:
            return tensor
        received = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(as_bytes(received), src=owner)  # bytes: not every back end knows every type
        return received

    def check_equal(self, value: str, what: str) -> None:
        """Stop unless all processes have the same.

        Raises:
            RuntimeError: Naming the ranks that differ from the first.
        """
        values = self.gather(value)
        other = [rank for rank, found in enumerate(values) if found != values[0]]
        if other:
            raise RuntimeError(
                f"{what}: the processes {', '.join(map(str, other))} of {self.size} hold other bits than process 0. "
                "They must start from the same files, on the same hardware and versions."
            )


def processes_of(trainer: Trainer) -> Processes:
    """The processes of a trainer, made ready for a run that needs no gradient.

    Raises:
        ValueError: If the trainer's strategy is another than a single device or DDP.
    """
    need_whole_weights(trainer, "BlockwisePruning")
    if isinstance(trainer.strategy, SingleDeviceStrategy):
        return Processes()
    # No wrapper: there is no gradient, for which it would take as much memory as the model, and buffers are constants.
    trainer.strategy.configure_ddp = lambda: None
    return Processes(trainer.global_rank, trainer.world_size)


def give_back(trainer: Trainer) -> None:
    """Undo what `processes_of` did to the strategy."""
    trainer.strategy.__dict__.pop("configure_ddp", None)


def owners_of(collector: StatisticsCollector, size: int, first: Iterable[str] = ()) -> dict[str, int]:
    """Rank of the owner of each linear: the most work first, to the process with the least so far.

    Linears that share their input stay together, since they share a Gram matrix and its factor.

    Args:
        collector: Of the block.
        size: Number of processes.
        first: Linears that the first process must own, since it chooses among several results.
    """
    first, load, owners = set(first), [0.0] * size, {}
    groups = collector.groups()

    def work(leader: str) -> float:
        columns = collector.inputs(leader).features
        rows = sum(collector.linears[name].out_features for name in groups[leader])
        return columns**3 + rows * columns**2

    for leader in sorted(groups, key=lambda leader: (first.isdisjoint(groups[leader]), -work(leader))):
        owner = load.index(min(load)) if first.isdisjoint(groups[leader]) else 0
        load[owner] += work(leader)
        owners |= dict.fromkeys(groups[leader], owner)
    return owners

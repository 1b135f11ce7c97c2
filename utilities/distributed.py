"""Collective operations across the processes of a run, for all packages.

With one process each operation is the identity, so callers need no second path. Values may be any object that pickles; tensors
are sent as bytes, since not every back end knows every dtype.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from utilities.digest import as_bytes

T = TypeVar("T")


class ProcessFailedError(RuntimeError):
    """Another process of the run failed; its own error says why."""


class Processes:
    """The processes of a run, seen from one of them.

    Args:
        rank: Rank of this process.
        size: Number of processes.
        group: Process group of the operations; the default group when None.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size, self._group = rank, size, group

    @property
    def is_first(self) -> bool:
        """Whether this is the first process, which writes files and measures attention."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, ordered by rank."""
        return [value] if self.size == 1 else gathered(value, self._group)

    def from_first(self, value: T) -> T:
        """Return the value of the first process."""
        return cast("T", self.gather(value if self.is_first else None)[0])

    def together(self, work: Callable[[], T]) -> T:
        """Run `work`, which must not communicate; an error in one process is raised in all.

        Raises:
            Exception: The error of `work`, in processes where it failed.
            ProcessFailedError: In the others, with rank and message of the process that failed.
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
                raise ProcessFailedError(f"Process {rank} of {self.size} failed, so this one stops too: {message}")
        return result

    def in_first(self, work: Callable[[], T]) -> T | None:
        """Run `work` in the first process; return its result there and None in the others. Errors are those of `together`."""
        return self.together(lambda: work() if self.is_first else None)

    def first_of(self, work: Callable[[], T]) -> T:
        """Run `work` in the first process and return its result in all."""
        return cast("T", self.from_first(self.in_first(work)))

    def sum_to(self, tensors: Iterable[tuple[Tensor, int]]) -> None:
        """Replace each tensor by its sum over processes in its owner; in other processes it is undefined afterwards."""
        if self.size > 1:
            for tensor, owner in tensors:
                dist.reduce(tensor, dst=owner, group=self._group)

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over processes."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self._group)

    def send(self, tensor: Tensor, owner: int) -> Tensor:
        """Return the owner's tensor in all processes, bit for bit.

        Args:
            tensor: The owner's value; in other processes any tensor of the same shape, dtype and device. Not modified.
            owner: Rank of the owner.
        """
        if self.size == 1:
            return tensor
        received = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(as_bytes(received), src=owner, group=self._group)
        return received

    def check_equal(self, value: str, what: str) -> None:
        """Check that all processes have the same value.

        Args:
            value: Value of this process.
            what: Name of the value, for the error.

        Raises:
            RuntimeError: If values differ; names the ranks that differ from the first process.
        """
        values = self.gather(value)
        other = [rank for rank, found in enumerate(values) if found != values[0]]
        if other:
            raise RuntimeError(
                f"{what}: processes {', '.join(map(str, other))} of {self.size} hold other bits than process 0. "
                "Start all of them from the same files, on the same hardware and versions."
            )


def world_size() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the values of all processes, ordered by rank; every process has to call this."""
    if world_size() == 1:
        return [value]
    found = [None] * world_size()
    dist.all_gather_object(found, value, group=group)
    return found


def need_whole_weights(trainer: Any, who: str) -> None:
    """Check that every process of a Lightning trainer holds the whole model.

    Args:
        trainer: Trainer of the run.
        who: Name of the class that needs whole weights, for the error.

    Raises:
        ValueError: If the strategy splits the model.
    """
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

    if not isinstance(trainer.strategy, SingleDeviceStrategy) and type(trainer.strategy) is not DDPStrategy:
        raise ValueError(
            f"Argument `trainer.strategy` expected auto (one device) or ddp with {who}, which needs whole weights in every "
            f"process, but got {type(trainer.strategy).__name__}. Use `--trainer.strategy ddp`."
        )

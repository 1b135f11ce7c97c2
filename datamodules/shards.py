"""Split a data set over processes: each sample goes to exactly one, and all processes get the same number of batches.

Lightning's own sampler repeats samples until all processes have equally many, which would count some windows twice in
statistics and metrics. It leaves a DistributedSampler alone.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate


class ShardedBatches(DistributedSampler):
    """Batches of one process, as lists of positions. They cover a contiguous part of the data set, in order.

    All processes have the same number of batches, since they wait for each other in every one. So batches differ in size: with
    `batch_size` 1, some hold two samples where the samples cannot be divided evenly.

    Args:
        num_samples: Number of samples of the whole data set; at least one for each process.
        batch_size: Largest size of a batch.
        num_processes: Number of shards.
        rank: Which shard this is, from 0.
        name: Argument that sets the number of samples, for the error.

    Raises:
        ValueError: If there are more processes than samples.
    """

    def __init__(self, num_samples: int, batch_size: int, num_processes: int, rank: int, name: str) -> None:
        if num_samples < num_processes:
            raise ValueError(
                f"Argument `{name}` gives {num_samples} samples, but {num_processes} processes expected at least one each. Use "
                f"at most {num_samples} processes (trainer.devices, trainer.num_nodes), or more samples."
            )
        super().__init__(range(num_samples), num_processes, rank, shuffle=False)
        most, fewest = -(-num_samples // num_processes), num_samples // num_processes
        self._num_batches = min(-(-most // batch_size), fewest)
        self._positions = split(range(num_samples), num_processes)[rank]

    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(part) for part in split(self._positions, self._num_batches)])

    def __len__(self) -> int:
        return self._num_batches


class Batches(Dataset):
    """A data set whose items are batches: `batches[positions]` collates the samples at these positions."""

    def __init__(self, samples: Dataset, collate_fn: Callable[[list], Any] | None = None) -> None:
        self.samples, self.collate_fn = samples, collate_fn or default_collate

    def __getitem__(self, positions: Sequence[int]) -> Any:
        return self.collate_fn([self.samples[position] for position in positions])


def split(positions: range, parts: int) -> list[range]:
    """Split positions into contiguous parts whose sizes differ by at most one, larger ones first."""
    size, larger = divmod(len(positions), parts)
    starts = [part * size + min(part, larger) for part in range(parts + 1)]
    return [positions[start:end] for start, end in pairwise(starts)]


def in_order(
    dataset: Dataset,
    name: str,
    trainer: Trainer | None,
    batch_size: int,
    collate_fn: Callable | None = None,
    num_workers: int = 0,
) -> DataLoader:
    """Make a dataloader of all samples in order or, with several processes, of this process's shard.

    Args:
        dataset: Data set that has a length.
        name: Argument that sets its length, for the error.
        trainer: Trainer that knows the processes; None for a single process.
        batch_size: Size of a batch; with several processes the largest one, see `ShardedBatches`.
        collate_fn: Makes a batch of samples; torch's default when None.
        num_workers: Number of worker processes.
    """
    processes = getattr(trainer, "world_size", 1)
    if processes == 1:
        return DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collate_fn)
    sampler = ShardedBatches(len(dataset), batch_size, processes, trainer.global_rank, name)
    return DataLoader(Batches(dataset, collate_fn), batch_size=None, sampler=sampler, num_workers=num_workers)

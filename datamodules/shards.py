"""Shards of a data set over processes: every sample in exactly one of them, none twice, and as many batches in each.

Lightning's own sampler repeats samples until all processes have equally many, which would count some windows twice in
statistics and metrics. It leaves samplers of this kind alone.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate


class ShardedBatches(DistributedSampler):
    """Batches of one process as lists of positions: a contiguous part of the data set, in order.

    All processes have the same number of batches, since Lightning and DDP let them wait for each other in each. So batches
    differ in size; where `batch_size` is 1 and the number of samples no multiple of that of processes, some hold two.

    Args:
        num_samples: Of the whole data set; at least one for each process.
        batch_size: Largest size of a batch.
        num_processes: Number of shards.
        rank: Which of them.
        name: The argument that sets the number of samples, for the error.

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
    """A data set whose items are batches: `batches[positions]` is what the collate function makes of the samples there."""

    def __init__(self, samples: Dataset, collate_fn: Callable[[list], Any] | None = None) -> None:
        self.samples, self.collate_fn = samples, collate_fn or default_collate

    def __getitem__(self, positions: Sequence[int]) -> Any:
        return self.collate_fn([self.samples[position] for position in positions])


def split(positions: range, parts: int) -> list[range]:
    """Contiguous parts whose sizes differ by at most one, larger ones first."""
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
    """A dataloader of all samples in order or, with several processes, of this process's shard of them.

    Args:
        dataset: With a length.
        name: The argument that sets its length, for the error.
        trainer: Knows the processes; None for one.
        batch_size: Of a batch; with several processes the largest, see `ShardedBatches`.
        collate_fn: As for a DataLoader.
        num_workers: As for a DataLoader.
    """
    processes = getattr(trainer, "world_size", 1)
    if processes == 1:
        return DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collate_fn)
    sampler = ShardedBatches(len(dataset), batch_size, processes, trainer.global_rank, name)
    return DataLoader(Batches(dataset, collate_fn), batch_size=None, sampler=sampler, num_workers=num_workers)

"""Subgraphs around seed nodes, for graphs that do not fit a device: a neighbour sampler in plain torch (Hamilton et al. 2017,
section 3.1), and the batches of an epoch.

PyG's NeighborLoader needs compiled extensions, which are not installed everywhere; this one needs none.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils import to_undirected

MASKS = ("train_mask", "val_mask", "test_mask")
SAMPLING_STREAM = 2  # the split and the noise take the streams 0 and 1 of the same seed


class NeighborSampler:
    """Draws neighbours of nodes, those of these, and so on, uniformly and without replacement.

    A node is expanded once, in the hop after the one in which it was reached, so it has at most as many drawn neighbours as
    that hop allows.

    Args:
        data: The graph, with `x` (N, F), `y` (N,), the three masks (N,) and `edge_index` (2, E), undirected and coalesced.
        fanout: Number of neighbours of each node, for each hop; -1 takes all.
    """

    def __init__(self, data: Data, fanout: Sequence[int]) -> None:
        self.data, self.fanout = data, tuple(fanout)
        source, self.target = data.edge_index
        self.degree = torch.bincount(source, minlength=data.num_nodes)
        self.start = self.degree.cumsum(0) - self.degree
        self._place = torch.full((data.num_nodes,), -1)  # in the subgraph; -1 everywhere between calls

    def sample(self, seeds: Tensor, generator: torch.Generator) -> Data:
        """Draw the subgraph around `seeds`, undirected, coalesced and without self-loops as the whole graph is.

        Nodes at its border have fewer neighbours in it than in the graph.

        Args:
            seeds: Distinct nodes (S,).
            generator: Source of all draws.

        Returns:
            `x`, `y`, masks and `node_ids` (n,) of its nodes, the first `num_seeds` of which are the seeds, and `edge_index`
            (2, e). Masks are False on nodes that are not seeds; `node_ids` are positions in the whole graph.
        """
        nodes = frontier = seeds
        self._place[seeds] = torch.arange(len(seeds))
        edges = []
        for fanout in self.fanout:
            position, neighbors = self.expand(frontier, fanout, generator)
            edges.append(torch.stack([frontier[position], neighbors]))
            frontier = neighbors[self._place[neighbors] < 0].unique()
            self._place[frontier] = torch.arange(len(nodes), len(nodes) + len(frontier))
            nodes = torch.cat([nodes, frontier])
        edge_index = to_undirected(self._place[torch.cat(edges, dim=1)], num_nodes=len(nodes))
        self._place[nodes] = -1
        is_seed = torch.arange(len(nodes)) < len(seeds)
        masks = {name: self.data[name][nodes] & is_seed for name in MASKS}
        whole = self.data
        return Data(x=whole.x[nodes], edge_index=edge_index, y=whole.y[nodes], node_ids=nodes, num_seeds=len(seeds), **masks)

    def expand(self, nodes: Tensor, fanout: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw at most `fanout` distinct neighbours of each node: positions in `nodes` (e,) and the neighbours (e,)."""
        degree = self.degree[nodes]
        owner = torch.repeat_interleave(degree)
        first = degree.cumsum(0) - degree
        rank = torch.arange(len(owner)) - first[owner]
        edge = self.start[nodes][owner] + rank
        if fanout < 0 or not len(degree) or fanout >= degree.max():
            return owner, self.target[edge]
        mixed = torch.randperm(len(owner), generator=generator)
        edge = edge[mixed[owner[mixed].argsort(stable=True)]]  # each node's edges in random order; owner and rank still hold
        return owner[rank < fanout], self.target[edge[rank < fanout]]


class SeedLoader:
    """Subgraphs whose seeds are the given nodes, each once an epoch, whatever the number of processes.

    Shuffled, order and neighbours follow from seed and epoch, and the processes share the seeds of each step; in order, they
    follow from the seed alone, so that validation sees the same subgraphs in every epoch, and the processes share these
    subgraphs. A process that is left without any seed gets a subgraph that has none, so that none waits for another.

    Args:
        neighbors: Makes the subgraphs.
        seeds: Distinct nodes (S,).
        batch_size: Number of seeds a step, or in order a subgraph; the last has what is left.
        seed: Seed of all draws.
        shuffle: Whether to draw the order anew each epoch.
        rank: Number of this process, from 0.
        world_size: Number of processes.
    """

    def __init__(
        self,
        neighbors: NeighborSampler,
        seeds: Tensor,
        batch_size: int,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.neighbors, self.seeds, self.batch_size = neighbors, seeds, batch_size
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0
        self.rank, self.world_size = rank, world_size
        self._first = self._given = 0

    batch_sampler = None  # Lightning reads it of whatever has a sampler

    @property
    def sampler(self) -> "SeedLoader":
        """Return itself: Lightning calls `set_epoch` of a loader's sampler before each epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Tell how many batches of the epoch were given, for a checkpoint within it."""
        return {"given": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iterator leave out the batches that were given."""
        self._first = state["given"]

    def __len__(self) -> int:
        return len(self._numbers())

    def _numbers(self) -> range:
        """Steps, or in order the subgraphs of this process."""
        count = -(-len(self.seeds) // self.batch_size)
        if self.shuffle or count == 0:
            return range(count)
        return range(self.rank, max(count, self.rank + 1), self.world_size)

    def __iter__(self) -> Iterator[Data]:
        first, self._first = self._first, 0  # now, not at the first batch: of an iterator that is never used too
        return self._batches(first)

    def _batches(self, first: int) -> Iterator[Data]:
        seeds = self.seeds[torch.randperm(len(self.seeds), generator=self._generator())] if self.shuffle else self.seeds
        parts = seeds.split(self.batch_size)
        for given, number in enumerate(self._numbers()[first:], first + 1):
            self._given = given
            if not self.shuffle:
                yield self._sample(parts[number], number) if number < len(parts) else self._without_seeds(parts[0], number)
                continue
            own = parts[number][self.rank :: self.world_size]
            yield self._sample(own, number) if len(own) else self._without_seeds(parts[number], number)

    def _sample(self, seeds: Tensor, number: int) -> Data:
        return self.neighbors.sample(seeds, self._generator(number + 1, self.rank if self.shuffle else 0))

    def _without_seeds(self, seeds: Tensor, number: int) -> Data:
        batch = self._sample(seeds[:1], number)
        batch.num_seeds = 0
        for name in MASKS:
            batch[name] = torch.zeros_like(batch[name])
        return batch

    def _generator(self, *numbers: int) -> torch.Generator:
        entropy = np.random.SeedSequence([self.seed, SAMPLING_STREAM, self.epoch if self.shuffle else 0, *numbers])
        return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))

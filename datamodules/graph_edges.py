"""Changes of a graph's edges before training: noise, and the removal of edges between nodes that are unlike.

graph_attacks.py has those that mean harm. Legend: N nodes, E directed edges (each undirected edge twice), F features.
"""

from math import inf

import numpy as np
import torch
from torch import Tensor
from torch_geometric.utils import coalesce

NOISE_STREAM = 1
"""Stream of the draws from a seed; the split, the neighbours and the attacks have others."""
_BLOCK = 4096
"""Edges whose features are held at once."""


def check_noise(share: float) -> None:
    """Check `edge_noise`.

    Raises:
        ValueError: If it is no number of at least 0.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < inf:
        raise ValueError(
            f"Argument `edge_noise` expected to be a number of at least 0 but got {share!r}; 0.1 adds a tenth of the edges."
        )


def check_dissimilar(threshold: float | None) -> None:
    """Check `drop_dissimilar`.

    Raises:
        ValueError: If it is neither None nor a number in [0, 1).
    """
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if threshold is not None and not (number and 0 <= threshold < 1):
        raise ValueError(
            f"Argument `drop_dissimilar` expected to be a number in [0, 1) but got {threshold!r}; 0 removes edges between "
            "nodes without a common word."
        )


def add_edges(edge_index: Tensor, num_nodes: int, share: float, seed: int) -> Tensor:
    """Add undirected edges between distinct pairs of nodes that have none, each set of pairs as likely as another.

    Pairs i < j are numbered j(j - 1)/2 + i. With the numbers of the edges sorted, e_0 < e_1 < ..., the r-th pair without an
    edge is r + #{k: e_k - k ≤ r}: drawing ranks needs neither trials nor a list of all pairs.

    Args:
        edge_index: (2, E), undirected, coalesced, without self-loops.
        num_nodes: N.
        share: Number of edges to add, in relation to the E / 2 that there are; rounded.
        seed: Seed of the draw.

    Returns:
        (2, E + 2 round(share E / 2)), undirected and coalesced; the old edges are among them.

    Raises:
        ValueError: If there are fewer pairs without an edge.
    """
    low, high = edge_index[:, edge_index[0] < edge_index[1]].numpy()
    pairs, count = num_nodes * (num_nodes - 1) // 2, round(share * len(low))
    if count == 0:
        return edge_index
    if count > pairs - len(low):
        raise ValueError(
            f"Argument `edge_noise` expected to add at most {pairs - len(low):,} edges, the pairs of nodes that have none, but "
            f"{share} of {len(low):,} edges is {count:,}; use at most {(pairs - len(low)) / len(low):.4g}."
        )
    taken = np.sort(high * (high - 1) // 2 + low)
    ranks = np.random.default_rng([seed, NOISE_STREAM]).choice(pairs - len(low), count, replace=False, shuffle=False)
    numbers = ranks + np.searchsorted(taken - np.arange(len(taken)), ranks, side="right")
    j = ((1 + np.sqrt(1 + 8 * numbers.astype(np.float64))) / 2).astype(np.int64)
    j += (j + 1) * j // 2 <= numbers  # the root is rounded
    j -= j * (j - 1) // 2 > numbers
    added = torch.from_numpy(np.stack([numbers - j * (j - 1) // 2, j]))
    return coalesce(torch.cat([edge_index, added, added.flip(0)], dim=1), num_nodes=num_nodes)


def drop_dissimilar(edge_index: Tensor, x: Tensor, threshold: float) -> Tensor:
    """Remove edges between nodes that have few features in common (GCN-Jaccard, Wu et al., IJCAI 2019).

    Attacks on citation graphs mostly join unlike nodes. The Jaccard index of nodes u and v is the number of features that are
    not 0 in both, over the number of those that are not 0 in at least one; of two rows of zeros it is 0.

    Args:
        edge_index: (2, E).
        x: (N, F); which entries are 0 matters only.
        threshold: Largest Jaccard index of an edge that is removed; 0 removes those without a common feature.

    Returns:
        (2, at most E), in the same order.
    """
    has = (x != 0).float()
    counts, kept = has.sum(1), []
    for source, target in zip(edge_index[0].split(_BLOCK), edge_index[1].split(_BLOCK), strict=True):
        common = (has[source] * has[target]).sum(1)
        kept.append(common > threshold * (counts[source] + counts[target] - common))
    return edge_index[:, torch.cat(kept)]

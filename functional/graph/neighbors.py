"""Nearest neighbours by features: a graph that knows something the edges do not, alone or joined with them.

CSG2L's abstract promises a view that adds edges which neither perturbation nor the graph has. A low-rank view of the same edges
repeats what an encoder sees; the graph A ∪ kNN(X) does not (ours; the paper's text is not public).
Shapes: N nodes, F features, E directed edges, k neighbours.
"""

from typing import Literal

import torch
from torch import Tensor

Similarity = Literal["auto", "tfidf", "standardized", "plain"]
SIMILARITIES = ("auto", "tfidf", "standardized", "plain")
FEW = 0.5
"""Share of non-zero features up to which features without negative values are taken for words."""


def nearest_neighbors(x: Tensor, k: int, similarity: Similarity = "auto") -> Tensor:
    """Join each node with the k others whose features are nearest by cosine, in both directions.

    Args:
        x: (N, F).
        k: Number of neighbours of each node; of several that are equally near any are taken.
        similarity: What the cosine is of. tfidf: columns times log(N / nodes that have them), for bags of words, whose rows may
            have been divided by their sum. standardized: columns less their mean, over their standard deviation. plain: the
            features as they are. auto: tfidf if none is negative and at most half are not 0, else standardized.

    Returns:
        Edges (2, E), undirected, coalesced, without self-loops. Pairs whose cosine is not above 0 have nothing in common and
        are left out, so that a node can have fewer than k.

    Raises:
        ValueError: If an argument is out of its range.
    """
    from sklearn.neighbors import NearestNeighbors  # in blocks of rows: no (N, N) matrix is held
    from torch_geometric.utils import to_undirected

    if similarity not in SIMILARITIES:
        raise ValueError(
            f"Argument `similarity` expected to be one of {', '.join(SIMILARITIES)} but got {similarity!r}; auto looks at the "
            "features."
        )
    if not 1 <= k < len(x):
        raise ValueError(f"Argument `k` expected to be in [1, {len(x)}), below the number of nodes, but got {k}; 15 is usual.")
    unit = _directions(x.detach().cpu().double(), similarity)
    some = unit.any(dim=1).nonzero().flatten()  # rows of zeros would be nearer to all than most others are
    k = min(k, len(some) - 1)
    if k < 1:
        return torch.empty(2, 0, dtype=torch.long, device=x.device)
    distances, nearest = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(unit[some]).kneighbors()
    kept = torch.from_numpy(distances).flatten() ** 2 < 2 - 1e-9  # |a - b|² = 2 - 2 cos, and cos > 0
    edges = some[
        torch.stack([torch.from_numpy(nearest).flatten().long(), torch.arange(len(some)).repeat_interleave(k)])[:, kept]
    ]
    return to_undirected(edges, num_nodes=len(x)).to(x.device)


def _directions(x: Tensor, similarity: Similarity) -> Tensor:
    """Weigh the columns (N, F) and give each row length 1; rows of zeros stay so."""
    if similarity == "auto":
        words = bool((x >= 0).all()) and torch.count_nonzero(x) <= FEW * x.numel()
        similarity = "tfidf" if words else "standardized"
    if similarity == "tfidf":
        x = x * (len(x) / (x != 0).sum(0).clamp_min(1)).log()
    elif similarity == "standardized":
        deviation = x.std(0, correction=0)
        x = (x - x.mean(0)) / torch.where(deviation > 0, deviation, 1.0)
    return torch.nn.functional.normalize(x, eps=1e-300)


def joint_graph(edge_index: Tensor, neighbors: Tensor, num_nodes: int, neighbor_weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """Join a graph with another one, W = A + ω K.

    Args:
        edge_index: Edges (2, E) of A, each of weight 1; loops at a node are ignored.
        neighbors: Edges (2, E') of K, such as those of `nearest_neighbors`.
        num_nodes: N.
        neighbor_weight: ω.

    Returns:
        Edges (2, E''), coalesced, and their weights (E'',), float64; an edge of both has 1 + ω.

    Raises:
        ValueError: If the weight is not above 0.
    """
    from torch_geometric.utils import coalesce, remove_self_loops

    if not neighbor_weight > 0:
        raise ValueError(
            f"Argument `neighbor_weight` expected to be above 0 but got {neighbor_weight}; base regularized is the graph alone."
        )
    ones = torch.ones(edge_index.shape[1], dtype=torch.float64, device=edge_index.device)
    weights = torch.cat([ones, ones.new_full((neighbors.shape[1],), neighbor_weight)])
    edges, weights = coalesce(torch.cat([edge_index, neighbors], dim=1), weights, num_nodes=num_nodes)
    return remove_self_loops(edges, weights)

"""Views of CSG2L: what the encoder propagates by, locally and globally; settings that do not apply are refused.

A view makes tensors of the whole graph, which the module keeps as buffers (moved, saved and resumed with it), and of these the
operator on a batch. Shapes: N nodes, F features, E edges.
"""

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils import dropout_edge, subgraph

from functional.graph import (
    Factors,
    joint_graph,
    low_rank_factors,
    nearest_neighbors,
    normalized_adjacency,
    purified_factors,
)
from functional.graph.neighbors import SIMILARITIES, Similarity
from lightning_modules.parts.graph_encoders import drop_columns
from lightning_modules.parts.graph_operators import GlobalOperator
from utilities.checks import check_at_least_zero, check_integer, check_one_of, check_share
from utilities.choice import Choice

ViewName = Literal["svd", "knn", "drop"]
LocalViewName = Literal["edges", "purified", "mlp"]
Base = Literal["normalized", "regularized", "diffused", "joint", "purified"]
Buffers = dict[str, Tensor]


class _Propagation(Choice):
    """What a view propagates by."""

    def buffers(self, data: Data) -> Buffers:
        """Make what the view needs of a whole graph, by name."""
        return {}

    def operator(self, batch: Data, buffers: Buffers) -> GlobalOperator | None:
        """Make the propagation on a batch of what `buffers` made of the whole graph; None for that of the encoder's layers."""
        return None


class View(_Propagation):
    """The other view, with which the local one is contrasted."""

    draws_edges: ClassVar[bool]
    """Whether each step has other edges, by which the encoder's own layers propagate."""


class SvdView(View):
    """A low-rank reconstruction: propagation by (1 − μ)·Ã + μ·U diag(s) Vᵀ.

    Args:
        base: Matrix that is factorised: normalized, regularized, diffused, joint (regularized, of the graph joined with the
            nearest neighbours by features) or purified (the raw adjacency, normalised afterwards, as PurifiedView has it).
        rank: q, the number of singular values; at most the number of nodes.
        mix: μ, the share of the low-rank part in the propagation; the rest is Ã.
        diffusion_steps: k, the power of Ã that base `diffused` factorises; 2 when None. For that base only.
        neighbors: Number of nearest neighbours of each node in base `joint`; 15 when None. For that base only.
        neighbor_weight: Weight of an edge to a neighbour, where one of the graph weighs 1; 1 when None. For base `joint` only.
        similarity: What neighbours are near by: tfidf, standardized, plain, or auto, which looks at the features; auto when
            None. For base `joint` only.
        seed: Seed of the factorisation.

    Raises:
        ValueError: If an argument is out of range, or does not apply to the base.
    """

    short = "svd"
    draws_edges = False

    def __init__(
        self,
        base: Base = "regularized",
        rank: int = 100,
        mix: float = 0.2,
        diffusion_steps: int | None = None,
        neighbors: int | None = None,
        neighbor_weight: float | None = None,
        similarity: Similarity | None = None,
        seed: int = 0,
    ) -> None:
        check_one_of("view.base", base, get_args(Base))
        check_integer("view.rank", rank, 1)
        check_share("view.mix", mix)
        check_integer("view.seed", seed, 0)
        if diffusion_steps is not None:
            check_integer("view.diffusion_steps", diffusion_steps, 1)
        _check_neighbors(neighbors, neighbor_weight, similarity)
        of_joint = {"neighbors": neighbors, "neighbor_weight": neighbor_weight, "similarity": similarity}
        for owner, given in {"diffused": {"diffusion_steps": diffusion_steps}, "joint": of_joint}.items():
            for name, value in given.items():
                if value is not None and base != owner:
                    raise ValueError(
                        f"Argument `view.{name}` belongs to base {owner}, but `view.base` is {base!r}. Leave it out, or use "
                        f"{owner}."
                    )
        self.base, self.rank, self.mix, self.diffusion_steps, self.seed = base, rank, mix, diffusion_steps, seed
        self.neighbors, self.neighbor_weight, self.similarity = neighbors, neighbor_weight, similarity

    def buffers(self, data: Data) -> Buffers:
        """Factorise the base matrix: factor_u (N, q), factor_s (q,), factor_v (N, q); purified, factor_diagonal (N,) too."""
        edges, nodes, options = data.edge_index, data.num_nodes, {"rank": self.rank, "seed": self.seed}
        if self.base == "purified":
            factors, diagonal = purified_factors(edges, nodes, **options)
            return _named(factors) | {"factor_diagonal": diagonal}
        if self.base == "joint":
            near = nearest_neighbors(data.x, self.neighbors or 15, self.similarity or "auto")
            edges, weights = joint_graph(edges, near, nodes, 1.0 if self.neighbor_weight is None else self.neighbor_weight)
            return _named(low_rank_factors(edges, nodes, weights=weights, **options))
        return _named(low_rank_factors(edges, nodes, base=self.base, steps=self.diffusion_steps or 2, **options))

    def operator(self, batch: Data, buffers: Buffers) -> GlobalOperator:
        """Take the rows of a batch's nodes."""
        factors, diagonal = _rows(buffers, batch.node_ids)
        return GlobalOperator(batch.edge_index, batch.num_nodes, factors, self.mix, diagonal)


class KnnView(View):
    """The nearest neighbours by features as a graph: propagation by (1 − μ)·Ã + μ·K̃; what SvdView's base joint is without SVD.

    Args:
        neighbors: Number of nearest neighbours of each node.
        mix: μ, the share of K̃ in the propagation; the rest is Ã.
        edge_weight: Weight of the graph's own edges in K, where one to a neighbour weighs 1; 0 for the neighbours alone.
        similarity: What neighbours are near by: tfidf, standardized, plain, or auto, which looks at the features.

    Raises:
        ValueError: If an argument is out of range.
    """

    short = "knn"
    draws_edges = False

    def __init__(
        self, neighbors: int = 15, mix: float = 1.0, edge_weight: float = 0.0, similarity: Similarity = "auto"
    ) -> None:
        _check_neighbors(neighbors, None, similarity)
        check_share("view.mix", mix)
        check_at_least_zero("view.edge_weight", edge_weight)
        self.neighbors, self.mix, self.edge_weight, self.similarity = neighbors, mix, edge_weight, similarity

    def buffers(self, data: Data) -> Buffers:
        """Find the neighbours and normalise: neighbor_index (2, E), a loop at each node included, neighbor_value (E,).

        Raises:
            ValueError: If no two nodes have a feature in common.
        """
        edges, weights = nearest_neighbors(data.x, self.neighbors, self.similarity), None
        if not edges.numel():
            raise ValueError(
                "Argument `view` = knn expected features that some nodes have in common, but no node has a neighbour by "
                "features. Use svd or drop."
            )
        if self.edge_weight:
            edges, weights = joint_graph(data.edge_index, edges, data.num_nodes, 1 / self.edge_weight)
            weights = weights * self.edge_weight
        matrix = normalized_adjacency(edges, data.num_nodes, weights=weights).to_sparse_coo()
        return {"neighbor_index": matrix.indices().flip(0), "neighbor_value": matrix.values().float()}

    def operator(self, batch: Data, buffers: Buffers) -> GlobalOperator:
        """Take the rows and columns of a batch's nodes."""
        index, values = buffers["neighbor_index"], buffers["neighbor_value"]
        nodes, total = batch.node_ids, int(index[0].max()) + 1
        if len(nodes) < total:
            index, values = _of_batch(index, values, nodes, total)
        size = (batch.num_nodes, batch.num_nodes)
        matrix = torch.sparse_coo_tensor(index.flip(0), values, size, device=values.device).coalesce().to_sparse_csr()
        return GlobalOperator(batch.edge_index, batch.num_nodes, mix=self.mix, matrix=matrix)


class DropView(View):
    """The graph without some of its edges and features, drawn in each step.

    Args:
        edges: Share of the edges that is left out.
        features: Share of the features that is set to zero.

    Raises:
        ValueError: If a share is out of range.
    """

    short = "drop"
    draws_edges = True

    def __init__(self, edges: float = 0.3, features: float = 0.3) -> None:
        check_share("view.edges", edges)
        check_share("view.features", features)
        self.edges, self.features = edges, features

    def draw(self, x: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the features (N, F) and edges (2, E) that are left."""
        edges = dropout_edge(edge_index, self.edges, force_undirected=True)[0]
        return drop_columns(x, self.features), edges


class LocalView(_Propagation):
    """What the first view propagates by."""


class EdgesView(LocalView):
    """The graph's edges, by the encoder's own layers."""

    short = "edges"


class PurifiedView(LocalView):
    """The graph without its part of high rank, as attacks are: D^-½ (U diag(s) Vᵀ + I) D^-½, factors of the raw adjacency.

    Args:
        rank: q, the number of singular values; at most the number of nodes.
        seed: Seed of the factorisation.

    Raises:
        ValueError: If an argument is out of range.
    """

    short = "purified"

    def __init__(self, rank: int = 20, seed: int = 0) -> None:
        check_integer("local_view.rank", rank, 1)
        check_integer("local_view.seed", seed, 0)
        self.rank, self.seed = rank, seed

    def buffers(self, data: Data) -> Buffers:
        """Factorise the raw adjacency: factor_u (N, q), factor_s (q,), factor_v (N, q), factor_diagonal (N,)."""
        factors, diagonal = purified_factors(data.edge_index, data.num_nodes, self.rank, seed=self.seed)
        return _named(factors) | {"factor_diagonal": diagonal}

    def operator(self, batch: Data, buffers: Buffers) -> GlobalOperator:
        """Take the rows of a batch's nodes."""
        factors, diagonal = _rows(buffers, batch.node_ids)
        return GlobalOperator(batch.edge_index, batch.num_nodes, factors, 1.0, diagonal)


class MlpView(LocalView):
    """No edges at all: the encoder's layers see each node alone, for graphs whose neighbours differ."""

    short = "mlp"

    def operator(self, batch: Data, buffers: Buffers) -> GlobalOperator:
        """Make the identity."""
        ones = torch.ones(batch.num_nodes, device=batch.edge_index.device)
        return GlobalOperator(batch.edge_index[:, :0], batch.num_nodes, mix=1.0, diagonal=ones)


def _check_neighbors(neighbors: int | None, weight: float | None, similarity: Similarity | None) -> None:
    if neighbors is not None:
        check_integer("view.neighbors", neighbors, 1, "15 is usual")
    if weight is not None and not 0 < weight < float("inf"):
        raise ValueError(
            f"Argument `view.neighbor_weight` expected to be above 0 and finite but got {weight}; base regularized has no "
            "neighbours."
        )
    if similarity is not None:
        check_one_of("view.similarity", similarity, SIMILARITIES)


def _named(factors: Factors) -> Buffers:
    return {f"factor_{name}": value for name, value in factors._asdict().items()}


def _rows(buffers: Buffers, nodes: Tensor) -> tuple[Factors, Tensor | None]:
    """Take the factors' rows, and the diagonal, of some nodes."""
    factors = Factors(buffers["factor_u"][nodes], buffers["factor_s"], buffers["factor_v"][nodes])
    return factors, buffers["factor_diagonal"][nodes] if "factor_diagonal" in buffers else None


def _of_batch(index: Tensor, values: Tensor, nodes: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Take edges (2, E) and values (E,) among some nodes, which are renumbered in their order."""
    index, values = subgraph(nodes, index, values, num_nodes=total)
    position = torch.empty(total, dtype=torch.long, device=nodes.device)
    position[nodes] = torch.arange(len(nodes), device=nodes.device)
    return position[index], values

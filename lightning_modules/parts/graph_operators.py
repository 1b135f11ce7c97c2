"""Propagation operators of the views: Ã, a low-rank matrix, another sparse matrix, or a mix; on a whole graph or on a batch."""

import torch
from torch import Tensor

from functional.graph import Factors, SparseMatrix, normalized_adjacency, propagate, strongest_edges

STRONGEST = 10
"""Edges a node of the graph on which layers without a linear aggregation see the global view."""


class GlobalOperator:
    """P_g(H) = (1 − μ)·Ã H + μ·M H on the nodes of one batch; M = U diag(s) Vᵀ + diag(d), or any sparse matrix.

    Args:
        edge_index: Edges (2, E) of the batch.
        num_nodes: N, the number of nodes of the batch.
        factors: Factors of M, with the rows of the batch's nodes. With some nodes of a graph only, sums run over these.
        mix: μ in [0, 1]; 0 needs no M and is the local view.
        diagonal: d (N,); None for zeros.
        matrix: M, sparse CSR (N, N), in place of factors.
    """

    def __init__(
        self,
        edge_index: Tensor,
        num_nodes: int,
        factors: Factors | None = None,
        mix: float = 0.0,
        diagonal: Tensor | None = None,
        matrix: Tensor | None = None,
    ) -> None:
        self.factors, self.mix, self.diagonal = factors, mix, None if diagonal is None else diagonal[:, None]
        self.matrix = None if matrix is None else SparseMatrix(matrix)
        self.adjacency = SparseMatrix(normalized_adjacency(edge_index, num_nodes).float()) if mix < 1 else None
        self.root = (torch.bincount(edge_index[1], minlength=num_nodes).float() + 1).sqrt()[:, None]
        self._edges: Tensor | None = None

    def __call__(self, hidden: Tensor, kind: str = "symmetric") -> Tensor:
        """Propagate (N, …) -> (N, …); `kind` is symmetric, mean or sum."""
        x = hidden.flatten(1)
        x = x if kind == "symmetric" else x * self.root
        if self.adjacency is None:
            x = self._other(x)
        elif self.mix == 0:
            x = self.adjacency @ x
        else:
            x = (1 - self.mix) * (self.adjacency @ x) + self.mix * self._other(x)
        x = x / self.root if kind == "mean" else x * self.root if kind == "sum" else x
        return x.view_as(hidden)

    def _other(self, x: Tensor) -> Tensor:
        """Multiply by M: (N, C) -> (N, C)."""
        if self.matrix is not None:
            return self.matrix @ x
        found = None if self.factors is None else propagate(self.factors, x)
        if self.diagonal is None:
            return found
        return self.diagonal * x if found is None else found + self.diagonal * x

    @property
    def edges(self) -> Tensor:
        """Strongest edges (2, E_g) of the low-rank M, or all of a sparse M, without loops; of a diagonal its loops. Kept."""
        if self._edges is None:
            if self.matrix is not None:
                target, source = self.matrix.matrix.to_sparse_coo().indices()
                self._edges = torch.stack([source, target])[:, source != target]
            elif self.factors is not None:
                self._edges = strongest_edges(self.factors, STRONGEST)
            else:
                self._edges = torch.arange(len(self.root), device=self.root.device).expand(2, -1)
        return self._edges

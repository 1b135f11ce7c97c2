"""Low-rank view of a graph: randomised SVD of a normalised adjacency matrix that is never densified.

CSG2L propagates its second view by Â = U diag(s) Vᵀ, the truncated SVD of a base matrix M (SVD-aug). The range of M is
found by Halko, Martinsson & Tropp, "Finding structure with randomness" (2011), algorithms 4.4 and 5.1. `regularized` and
`diffused` are ours: the leading singular vectors of the published M = Ã describe small components of a disconnected graph,
not its global structure.
Shapes: N nodes, E edges, q rank. Edges point from edge_index[0] to edge_index[1], as in torch-geometric: M[target, source].
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Base = Literal["normalized", "regularized", "diffused"]
BASES = ("normalized", "regularized", "diffused")
_ROWS = 1024


class Factors(NamedTuple):
    """Truncated SVD M ≈ U diag(s) Vᵀ: u (N, q), s (q,) in falling order, v (N, q)."""

    u: Tensor
    s: Tensor
    v: Tensor


def normalized_adjacency(
    edge_index: Tensor, num_nodes: int, regularization: float | None = None, weights: Tensor | None = None
) -> Tensor:
    """Make the symmetrically normalised adjacency matrix, sparse CSR (N, N) in float64.

    Args:
        edge_index: (2, E); edges given twice count twice, loops at a node are ignored.
        num_nodes: N.
        regularization: Kind of matrix: None for Ã = D̃^-½ (A + I) D̃^-½ with D̃ = D + I. A number τ for D_τ^-½ A D_τ^-½ with
            D_τ = D + τ·d̄·I, d̄ the mean degree. D counts the edges that arrive at a node. A row or column of degree 0 is zero.
        weights: (E,) weights of the edges, at least 0, which are then summed in place of counted; None for ones.

    Raises:
        ValueError: If an edge names a node outside [0, N), or τ is negative.
    """
    check_nodes(edge_index, num_nodes)
    if regularization is not None and regularization < 0:
        raise ValueError(f"Argument `regularization` expected to be at least 0 but got {regularization}.")
    if weights is None:
        weights = torch.ones(edge_index.shape[1], dtype=torch.float64, device=edge_index.device)
    others = edge_index[0] != edge_index[1]
    (source, target), weights = edge_index[:, others], weights[others].double()
    degree = torch.bincount(target, weights, minlength=num_nodes).double()
    if regularization is None:
        loops = torch.arange(num_nodes, device=edge_index.device)
        source, target, degree = torch.cat([source, loops]), torch.cat([target, loops]), degree + 1
        weights = torch.cat([weights, weights.new_ones(num_nodes)])
    else:
        degree = degree + regularization * degree.mean()
    scale = torch.where(degree > 0, degree.clamp_min(1e-300).rsqrt(), 0.0)
    values = weights * scale[source] * scale[target]
    size = (num_nodes, num_nodes)
    return torch.sparse_coo_tensor(torch.stack([target, source]), values, size, device=values.device).coalesce().to_sparse_csr()


class SparseMatrix:
    """A constant sparse CSR matrix (N, M) with its transpose, so that a gradient too is one product with a CSR matrix.

    torch converts the transpose anew in each backward pass, which takes ten times the product and waits for a GPU. Products
    have the matrix's dtype, under autocast too: a CPU has no sparse product in bfloat16.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.transposed = matrix, matrix.t().to_sparse_csr()

    def __matmul__(self, dense: Tensor) -> Tensor:
        """Multiply: (M, C) -> (N, C)."""
        return _Product.apply(self.matrix, self.transposed, dense)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrix: Tensor, transposed: Tensor, dense: Tensor) -> Tensor:
        ctx.transposed = transposed
        with torch.autocast(dense.device.type, enabled=False):
            return matrix @ dense.to(matrix.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.transposed @ gradient.contiguous()


def low_rank_factors(
    edge_index: Tensor,
    num_nodes: int,
    rank: int,
    base: Base = "regularized",
    regularization: float = 1.0,
    steps: int = 2,
    teleport: float | None = None,
    oversampling: int = 10,
    power_iterations: int = 4,
    seed: int = 0,
    weights: Tensor | None = None,
) -> Factors:
    """Compute a seeded truncated SVD of a base matrix, through products with it alone.

    Args:
        edge_index: (2, E).
        num_nodes: N.
        rank: q; a matrix of N < q rows has N factors.
        base: `normalized` is Ã (the published form), `regularized` D_τ^-½ A D_τ^-½, `diffused` Ã^steps, or with `teleport` = α
            the first `steps` terms of personalised PageRank, Z ← (1 − α) Ã Z + α X.
        regularization: τ of `regularized`.
        steps: Products with Ã in one product with `diffused`.
        teleport: α in (0, 1) or None.
        oversampling: Columns beyond q in the random sketch.
        power_iterations: Products with M Mᵀ, orthonormalised in between; more separate close singular values better.
        seed: Seed of the sketch; one seed gives one result on one kind of device.
        weights: (E,) weights of the edges, such as those of `joint_graph`; None for ones.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if base not in BASES:
        raise ValueError(f"Argument `base` expected to be one of {', '.join(BASES)} but got {base!r}.")
    for name, value, least in (("rank", rank, 1), ("steps", steps, 1), ("oversampling", oversampling, 0)):
        if value < least:
            raise ValueError(f"Argument `{name}` expected to be at least {least} but got {value}.")
    if teleport is not None and not 0 < teleport < 1:
        raise ValueError(f"Argument `teleport` expected to be in (0, 1), or None, but got {teleport}.")
    share = regularization if base == "regularized" else None
    matrix = SparseMatrix(normalized_adjacency(edge_index, num_nodes, share, weights))
    if base != "diffused":
        steps, teleport = 1, None
    factors = _randomized_svd(
        lambda x: _diffuse(matrix.matrix, x, steps, teleport),
        lambda x: _diffuse(matrix.transposed, x, steps, teleport),
        num_nodes,
        min(rank, num_nodes),
        min(rank + oversampling, num_nodes),
        power_iterations,
        seed,
        edge_index.device,
    )
    return Factors(*(factor.float() for factor in factors))


def purified_factors(
    edge_index: Tensor, num_nodes: int, rank: int, oversampling: int = 10, power_iterations: int = 4, seed: int = 0
) -> tuple[Factors, Tensor]:
    """Purify a graph (GCN-SVD, Entezari et al., WSDM 2020): P = D^-½ (U diag(s) Vᵀ + I) D^-½ of the raw adjacency.

    Attacks on edges are of high rank, which the leading singular vectors leave out. D has the row sums of U diag(s) Vᵀ + I;
    sums below 1, that of the loop alone, count as 1, since a low-rank matrix has negative entries.

    Args:
        edge_index: (2, E), loops at a node are ignored.
        num_nodes: N.
        rank: q; a graph of N < q nodes has N factors.
        oversampling: Columns beyond q in the random sketch.
        power_iterations: Products with A Aᵀ, orthonormalised in between.
        seed: Seed of the sketch.

    Returns:
        Factors of D^-½ U diag(s) Vᵀ D^-½, whose u and v are not orthonormal, and the diagonal D^-1, (N,).

    Raises:
        ValueError: If the rank is below 1, or an edge names a node outside [0, N).
    """
    if rank < 1:
        raise ValueError(f"Argument `rank` expected to be at least 1 but got {rank}; 20 is usual.")
    edges = edge_index[:, edge_index[0] != edge_index[1]]
    check_nodes(edges, num_nodes)
    ones = torch.ones(edges.shape[1], dtype=torch.float64, device=edges.device)
    raw = torch.sparse_coo_tensor(edges.flip(0), ones, (num_nodes, num_nodes), device=edges.device).coalesce().to_sparse_csr()
    matrix = SparseMatrix(raw)
    columns = min(rank + oversampling, num_nodes)
    u, s, v = _randomized_svd(
        lambda x: matrix.matrix @ x,
        lambda x: matrix.transposed @ x,
        num_nodes,
        min(rank, num_nodes),
        columns,
        power_iterations,
        seed,
        edge_index.device,
    )
    scale = (u @ (s * v.sum(0)) + 1).clamp_min(1).rsqrt()
    return Factors((scale[:, None] * u).float(), s.float(), (scale[:, None] * v).float()), scale.square().float()


def check_nodes(edge_index: Tensor, num_nodes: int) -> None:
    """Check that edges (2, E) name nodes in [0, N).

    Raises:
        ValueError: If one does not.
    """
    if edge_index.numel() and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < num_nodes:
        raise ValueError(f"Argument `edge_index` expected to name nodes in [0, {num_nodes}) but got {int(edge_index.max())}.")


def _diffuse(matrix: Tensor, x: Tensor, steps: int, teleport: float | None) -> Tensor:
    z = x
    for _ in range(steps):
        z = matrix @ z if teleport is None else (1 - teleport) * (matrix @ z) + teleport * x
    return z


def _randomized_svd(
    multiply: Callable[[Tensor], Tensor],
    multiply_transposed: Callable[[Tensor], Tensor],
    num_nodes: int,
    rank: int,
    columns: int,
    power_iterations: int,
    seed: int,
    device: torch.device,
) -> Factors:
    # Drawn on the CPU, so that a seed means the same sketch on every device.
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(num_nodes, columns, generator=generator, dtype=torch.float64, device="cpu").to(device)
    basis = torch.linalg.qr(multiply(sketch)).Q
    for _ in range(power_iterations):
        basis = torch.linalg.qr(multiply_transposed(basis)).Q
        basis = torch.linalg.qr(multiply(basis)).Q
    u, s, vt = torch.linalg.svd(multiply_transposed(basis).T, full_matrices=False)
    return Factors((basis @ u)[:, :rank], s[:rank], vt[:rank].T.contiguous())


def propagate(factors: Factors, hidden: Tensor) -> Tensor:
    """Compute P_g(H) = U (s ⊙ (Vᵀ H)): (N, C) -> (N, C) in O(N q C)."""
    return factors.u @ (factors.s[:, None] * (factors.v.T @ hidden))


def strongest_edges(factors: Factors, num_edges: int) -> Tensor:
    """Find the k largest positive entries of every row of U diag(s) Vᵀ off its diagonal, as edges, in blocks of rows.

    For layers whose aggregation is not linear, so that no low-rank product can stand in for it.

    Args:
        factors: Factors of N nodes.
        num_edges: k, at most N − 1 are taken.

    Returns:
        (2, at most N·k); from column (source) to row (target).
    """
    num_nodes = len(factors.u)
    edges, scaled = [], factors.u * factors.s
    for start in range(0, num_nodes, _ROWS):
        rows = torch.arange(start, min(start + _ROWS, num_nodes), device=factors.u.device)
        block = scaled[rows] @ factors.v.T
        block[torch.arange(len(rows), device=rows.device), rows] = 0
        values, columns = block.topk(min(num_edges, num_nodes - 1), dim=1)
        kept = values > 0
        edges.append(torch.stack([columns[kept], rows[:, None].expand_as(columns)[kept]]))
    return torch.cat(edges, dim=1)

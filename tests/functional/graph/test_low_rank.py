"""Low-rank factors against dense float64 matrices and their full SVD."""

import pytest
import torch
from scipy.sparse import csr_array
from scipy.sparse.linalg import svds

from functional.graph import (
    Factors,
    SparseMatrix,
    low_rank_factors,
    normalized_adjacency,
    propagate,
    purified_factors,
    strongest_edges,
)


def edges(n=40, m=90, seed=0, directed=False):
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, n, (2, m), generator=generator)
    found = found[:, found[0] != found[1]]
    found = found if directed else torch.cat([found, found.flip(0)], dim=1)
    return torch.unique(found, dim=1)


def components(n=40):
    """Two communities, a triangle, and isolated nodes at the end."""
    first, second = edges(15, 40, 1), edges(15, 40, 2) + 15
    triangle = torch.tensor([[30, 31, 32, 31, 32, 30], [31, 32, 30, 30, 31, 32]])
    return torch.cat([first, second, triangle], dim=1)


GRAPHS = {
    "random": edges(),
    "directed": edges(directed=True),
    "disconnected": components(),
    "no edges": torch.empty(2, 0, dtype=torch.long),
    "loops": torch.cat([edges(), torch.tensor([[3, 7], [3, 7]])], dim=1),
}


def dense(edge_index, n, regularization):
    a = torch.zeros(n, n, dtype=torch.float64)
    for source, target in edge_index.T.tolist():
        if source != target:
            a[target, source] += 1
    degrees = [sum(a[i]).item() for i in range(n)]
    if regularization is None:
        a = a + torch.eye(n, dtype=torch.float64)
        degrees = [degree + 1 for degree in degrees]
    else:
        degrees = [degree + regularization * sum(degrees) / n for degree in degrees]
    out = torch.zeros_like(a)
    for i in range(n):
        for j in range(n):
            if a[i, j]:
                out[i, j] = 0 if degrees[i] * degrees[j] == 0 else a[i, j] / (degrees[i] * degrees[j]) ** 0.5
    return out


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("regularization", [None, 0.0, 1.5])
def test_normalized_adjacency(name, regularization):
    found = normalized_adjacency(GRAPHS[name], 40, regularization).to_dense()
    torch.testing.assert_close(found, dense(GRAPHS[name], 40, regularization), rtol=1e-12, atol=1e-14)


def base_matrix(edge_index, n, base, steps=2, teleport=None):
    matrix = dense(edge_index, n, 1.0 if base == "regularized" else None)
    if base != "diffused":
        return matrix
    eye = torch.eye(n, dtype=torch.float64)
    if teleport is None:
        return torch.linalg.matrix_power(matrix, steps)
    walked = [(1 - teleport) ** k * teleport * torch.linalg.matrix_power(matrix, k) for k in range(steps)]
    return sum(walked) + (1 - teleport) ** steps * torch.linalg.matrix_power(matrix, steps) @ eye


@pytest.mark.parametrize("name", ["random", "directed", "disconnected", "loops"])
@pytest.mark.parametrize(
    "options",
    [
        {"base": "normalized"},
        {"base": "regularized"},
        {"base": "diffused", "steps": 3},
        {"base": "diffused", "steps": 4, "teleport": 0.2},
    ],
    ids=str,
)
def test_best_approximation(name, options):
    """Eckart-Young: singular values are the largest, and no other matrix of the rank comes closer."""
    matrix = base_matrix(GRAPHS[name], 40, **options)
    found = low_rank_factors(GRAPHS[name], 40, 8, power_iterations=30, **options)  # singular values are close here
    full = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(found.s.double(), full[:8], rtol=1e-5, atol=1e-6)
    error = (matrix - (found.u * found.s).double() @ found.v.double().T).norm()
    assert error.item() == pytest.approx(full[8:].norm().item(), rel=1e-4, abs=1e-5)
    for factor in (found.u, found.v):
        torch.testing.assert_close(factor.T @ factor, torch.eye(8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["random", "directed", "disconnected", "loops", "no edges"])
@pytest.mark.parametrize("rank", [3, 8, 100])
def test_purified_graph(name, rank):
    """D^-½ (A_q + I) D^-½ of the full SVD's A_q; row sums below 1 count as 1."""
    raw = torch.zeros(40, 40, dtype=torch.float64)
    for source, target in GRAPHS[name].T.tolist():
        raw[target, source] += source != target
    u, s, vt = torch.linalg.svd(raw)
    gap = min(rank, 40)
    while gap < 40 and s[gap - 1] - s[gap] < 1e-9:  # of equal singular values any may be left out
        gap += 1
    low = (u[:, :gap] * s[:gap]) @ vt[:gap]
    degrees = [max(1.0, sum(row).item() + 1) for row in low]
    wanted = torch.zeros_like(raw)
    for i in range(40):
        for j in range(40):
            wanted[i, j] = (low[i, j] + (i == j)) / (degrees[i] * degrees[j]) ** 0.5
    factors, diagonal = purified_factors(GRAPHS[name], 40, gap, power_iterations=60)
    found = (factors.u * factors.s) @ factors.v.T + diagonal.diag()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_weights_of_edges():
    edge_index, generator = edges(), torch.Generator().manual_seed(6)
    weights = torch.rand(edge_index.shape[1], generator=generator, dtype=torch.float64)
    matrix = torch.zeros(40, 40, dtype=torch.float64)
    matrix[edge_index[1], edge_index[0]] = weights
    degree = matrix.sum(1) + matrix.sum() / 40
    full = torch.linalg.svdvals(matrix / (degree[:, None] * degree).sqrt())
    found = low_rank_factors(edge_index, 40, 8, power_iterations=30, weights=weights)
    torch.testing.assert_close(found.s.double(), full[:8], rtol=1e-5, atol=1e-6)


def test_singular_values_equal_those_of_scipy_and_torch():
    edge_index = edges(300, 900, 3)
    matrix = normalized_adjacency(edge_index, 300, 1.0)
    found = low_rank_factors(edge_index, 300, 20, power_iterations=80).s.double()
    csr = csr_array((matrix.values().numpy(), matrix.col_indices().numpy(), matrix.crow_indices().numpy()), shape=(300, 300))
    exact = torch.as_tensor(sorted(svds(csr, k=20, return_singular_vectors=False, random_state=0), reverse=True))
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=0)
    torch.manual_seed(0)
    library = torch.svd_lowrank(matrix.to_sparse_coo(), q=30, niter=80)[1][:20]
    torch.testing.assert_close(found, library, rtol=1e-3, atol=0)


def test_rank_is_at_most_the_number_of_nodes():
    found = low_rank_factors(edges(6, 12, 4), 6, 100)
    assert [tuple(factor.shape) for factor in found] == [(6, 6), (6,), (6, 6)]
    torch.testing.assert_close((found.u * found.s) @ found.v.T, dense(edges(6, 12, 4), 6, 1.0).float(), atol=1e-5, rtol=0)


def test_factors_are_where_the_edges_are_whatever_the_default_device():
    """A trainer makes its module under the accelerator as default device."""
    with torch.device("meta"):
        found = low_rank_factors(GRAPHS["random"], 40, 5)
    assert all(torch.equal(a, b) for a, b in zip(found, low_rank_factors(GRAPHS["random"], 40, 5), strict=True))


def test_one_seed_one_result():
    first, again, other = (low_rank_factors(GRAPHS["random"], 40, 5, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.u, other.u)


def test_a_graph_without_edges_has_no_global_view():
    found = low_rank_factors(GRAPHS["no edges"], 40, 5)
    assert found.s.abs().max() == 0 and propagate(found, torch.ones(40, 2)).abs().max() == 0
    assert strongest_edges(found, 3).shape == (2, 0)


def test_propagation():
    generator = torch.Generator().manual_seed(1)
    factors = Factors(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((9, 3), (3,), (9, 3))))
    hidden = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    wanted = factors.u @ torch.diag(factors.s) @ factors.v.T @ hidden
    torch.testing.assert_close(propagate(factors, hidden), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 3, 50])
def test_strongest_edges(k, monkeypatch):
    monkeypatch.setattr("functional.graph.low_rank._ROWS", 4)
    generator = torch.Generator().manual_seed(2)
    factors = Factors(*(torch.randn(shape, generator=generator) for shape in ((10, 3), (3,), (10, 3))))
    matrix = (factors.u * factors.s) @ factors.v.T
    wanted = set()
    for i in range(10):
        others = sorted((j for j in range(10) if j != i), key=lambda j: -matrix[i, j].item())
        wanted |= {(j, i) for j in others[:k] if matrix[i, j] > 0}
    found = strongest_edges(factors, k)
    assert {tuple(edge) for edge in found.T.tolist()} == wanted and found.shape[1] == len(wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "`rank` expected to be at least 1 but got 0"),
        ({"rank": 3, "base": "laplacian"}, "`base` expected to be one of normalized, regularized, diffused"),
        ({"rank": 3, "teleport": 1.0}, "`teleport`"),
        ({"rank": 3, "regularization": -1.0}, "`regularization`"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        low_rank_factors(GRAPHS["random"], 40, **options)
    with pytest.raises(ValueError, match="`edge_index`"):
        low_rank_factors(torch.tensor([[0], [40]]), 40, 3)
    with pytest.raises(ValueError, match="`edge_index`"):
        purified_factors(torch.tensor([[0], [40]]), 40, 3)
    with pytest.raises(ValueError, match="`rank` expected to be at least 1 but got 0; 20 is usual"):
        purified_factors(GRAPHS["random"], 40, 0)


def test_products_with_a_sparse_matrix_and_their_gradients():
    generator = torch.Generator().manual_seed(8)
    dense = torch.randn(7, 5, generator=generator, dtype=torch.float64) * (torch.rand(7, 5, generator=generator) < 0.4)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    found, wanted = SparseMatrix(dense.to_sparse_csr()) @ x, dense @ x
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad((product * weights).sum(), x)[0] for product in (found, wanted)]
    torch.testing.assert_close(*gradients)


def test_products_with_a_sparse_matrix_under_autocast():
    """In the matrix's dtype, whatever the other factor's is; the gradient has the other factor's."""
    generator = torch.Generator().manual_seed(9)
    dense = torch.randn(7, 5, generator=generator) * (torch.rand(7, 5, generator=generator) < 0.4)
    x = torch.randn(5, 3, generator=generator).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = SparseMatrix(dense.to_sparse_csr()) @ x
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), dense.double() @ x.double(), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), dense.double().sum(0)[:, None].expand(5, 3), rtol=1e-2, atol=1e-2)

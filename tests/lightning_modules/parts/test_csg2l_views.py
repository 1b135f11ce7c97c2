"""Operators of CSG2L's views against dense matrices in float64, on a whole graph and on some of its nodes."""

import pytest
import torch
from torch_geometric.data import Data

from functional.graph import joint_graph, nearest_neighbors
from lightning_modules import EdgesView, KnnView, MlpView, PurifiedView, SvdView
from lightning_modules.parts.graph_encoders import GraphEncoder

N = 20


def graph(nodes=None):
    """A graph, or the part of it that some nodes induce."""
    generator = torch.Generator().manual_seed(3)
    edges = torch.randint(0, N, (2, 40), generator=generator)
    edges = edges[:, edges[0] != edges[1]]
    edges = torch.unique(torch.cat([edges, edges.flip(0)], dim=1), dim=1)
    x = torch.randn(N, 6, generator=generator)
    nodes = torch.arange(N) if nodes is None else nodes
    position = {int(node): place for place, node in enumerate(nodes)}
    kept = [(position[a], position[b]) for a, b in edges.T.tolist() if a in position and b in position]
    return Data(x=x[nodes], edge_index=torch.tensor(kept).T, node_ids=nodes, num_nodes=len(nodes))


def dense(edge_index, n=N, weights=None):
    found = torch.zeros(n, n, dtype=torch.float64)
    found[edge_index[1], edge_index[0]] = 1.0 if weights is None else weights.double()
    return found


def normal(adjacency):
    """D̃^-½ (A + I) D̃^-½ by loops."""
    n = len(adjacency)
    degree = [1 + sum(row).item() for row in adjacency]
    return torch.tensor(
        [[(adjacency[i, j].item() + (i == j)) / (degree[i] * degree[j]) ** 0.5 for j in range(n)] for i in range(n)],
        dtype=torch.float64,
    )


def regularized(adjacency):
    degree = adjacency.sum(1) + adjacency.sum() / len(adjacency)
    return adjacency / (degree[:, None] * degree).sqrt()


def truncated(matrix, rank):
    u, s, vt = torch.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def purified(adjacency, rank):
    low = truncated(adjacency, rank)
    degree = (low.sum(1) + 1).clamp_min(1)
    return (low + torch.eye(len(low), dtype=torch.float64)) / (degree[:, None] * degree).sqrt()


def matrices():
    data = graph()
    own, near = dense(data.edge_index), dense(nearest_neighbors(data.x, 3))
    return {
        "svd": (SvdView(rank=N), 0.2, regularized(own)),
        "joint": (SvdView("joint", rank=N, mix=1.0, neighbors=3), 1.0, regularized(own + near)),
        "joint, weighted": (
            SvdView("joint", rank=N, mix=0.5, neighbors=3, neighbor_weight=0.25, similarity="standardized"),
            0.5,
            regularized(own + 0.25 * near),
        ),
        "joint, low rank": (
            SvdView("joint", rank=4, mix=1.0, neighbors=3),
            1.0,
            truncated(regularized(own + near), 4),
        ),
        "purified": (SvdView("purified", rank=7, mix=0.6), 0.6, purified(own, 7)),
        "knn": (KnnView(3), 1.0, normal(near)),
        "knn, mixed": (KnnView(3, mix=0.3), 0.3, normal(near)),
        "knn and edges": (KnnView(3, edge_weight=0.5), 1.0, normal(0.5 * own + near)),
        "purified local": (PurifiedView(7), 1.0, purified(own, 7)),
        "mlp": (MlpView(), 1.0, torch.eye(N, dtype=torch.float64)),
    }


@pytest.mark.parametrize("name", matrices())
@pytest.mark.parametrize("nodes", [None, torch.tensor([4, 17, 0, 9, 3])], ids=["whole", "part"])
def test_operators(name, nodes):
    view, mix, matrix = matrices()[name]
    buffers, batch = view.buffers(graph()), graph(nodes)
    local = normal(dense(batch.edge_index, batch.num_nodes))
    wanted = (1 - mix) * local + mix * matrix[batch.node_ids][:, batch.node_ids]
    found = view.operator(batch, buffers)(torch.eye(batch.num_nodes))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=2e-3 if "low" in name or "purified" in name else 1e-4)


def test_the_edges_themselves_are_left_to_the_encoder():
    assert EdgesView().operator(graph(), EdgesView().buffers(graph())) is None


def test_edges_for_layers_that_are_not_linear():
    """EdgeCNN sees the neighbours in the view knn, and each node alone as an MLP."""
    data, view = graph(), KnnView(3)
    operator = view.operator(data, view.buffers(data))
    near = nearest_neighbors(data.x, 3)
    assert set(map(tuple, operator.edges.T.tolist())) == set(map(tuple, near.T.tolist()))
    assert MlpView().operator(data, {}).edges.tolist() == [list(range(N))] * 2
    view = SvdView("joint", rank=N, mix=1.0, neighbors=3)
    joined = joint_graph(data.edge_index, near, N)[0]
    strongest = view.operator(data, view.buffers(data)).edges
    assert set(map(tuple, strongest.T.tolist())) & set(map(tuple, joined.T.tolist()))


@pytest.mark.parametrize("name", ["gcn", "gat", "graphsage", "gin", "appnp", "sgc", "edgecnn"])
def test_without_edges_a_node_is_seen_alone(name):
    torch.manual_seed(0)
    data, module = graph(), GraphEncoder(name, 6, 8, 3).eval()
    operator = MlpView().operator(data, {})
    before = module(data.x, data.edge_index, operator)[1]
    changed = data.x.clone()
    changed[5] += 1
    after = module(changed, data.edge_index, operator)[1]
    assert not torch.equal(before[5], after[5])
    others = torch.arange(N) != 5
    torch.testing.assert_close(before[others], after[others])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SvdView(neighbors=5),
            "`view.neighbors` belongs to base joint, but `view.base` is 'regularized'. Leave it out",
        ),
        (lambda: SvdView("purified", neighbor_weight=2.0), "`view.neighbor_weight` belongs to base joint"),
        (lambda: SvdView(similarity="plain"), "`view.similarity` belongs to base joint"),
        (lambda: SvdView("joint", diffusion_steps=2), "`view.diffusion_steps` belongs to base diffused, .* is 'joint'"),
        (lambda: SvdView("joint", neighbors=0), "`view.neighbors` expected to be an integer of at least 1 but got 0"),
        (lambda: SvdView("joint", neighbor_weight=0.0), "`view.neighbor_weight` expected to be above 0 and finite but got 0"),
        (lambda: SvdView("joint", similarity="cosine"), "`view.similarity` expected to be one of auto, tfidf"),
        (lambda: KnnView(edge_weight=-1.0), "`view.edge_weight` expected to be at least 0"),
        (lambda: KnnView(mix=2.0), "`view.mix`"),
        (lambda: PurifiedView(0), "`local_view.rank`"),
        (
            lambda: KnnView().buffers(Data(x=torch.eye(30), edge_index=torch.zeros(2, 0).long())),
            "`view` = knn expected features that some nodes have in common",
        ),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()

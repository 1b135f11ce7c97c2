"""Encoders and their global view, against dense matrices."""

import pytest
import torch
from torch_geometric.nn import GCN

from functional.graph import Factors, low_rank_factors, propagated_features
from lightning_modules.parts.graph_encoders import SPARSE, CheapDropout, GraphEncoder, drop_columns, sparse_features
from lightning_modules.parts.graph_operators import GlobalOperator

N = 24
LINEAR = ("gcn", "gat", "graphsage", "gin", "appnp", "sgc")


def graph(seed=0):
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randint(0, N - 2, (2, 50), generator=generator)  # the last two nodes are isolated
    edges = edges[:, edges[0] != edges[1]]
    return torch.randn(N, 5, generator=generator), torch.unique(torch.cat([edges, edges.flip(0)], dim=1), dim=1)


def whole(edge_index, base="normalized", mix=1.0):
    """An operator whose factors are of full rank: the global view is then the local operator itself."""
    return GlobalOperator(edge_index, N, low_rank_factors(edge_index, N, N, base, power_iterations=2), mix)


def encoder(name, **options):
    torch.manual_seed(1)
    return GraphEncoder(name, 5, 16, 3, **options).eval()


@pytest.mark.parametrize("name", ["gcn", "appnp", "sgc"])
@pytest.mark.parametrize("mix", [1.0, 0.3, 0.0])
def test_full_rank_is_the_local_view(name, mix):
    x, edge_index = graph()
    module = encoder(name)
    for local, other in zip(module(x, edge_index), module(x, edge_index, whole(edge_index, mix=mix)), strict=True):
        torch.testing.assert_close(local, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("graphsage", {}), ("graphsage", {"normalize": True}), ("gin", {})],
    ids=["mean", "mean, output of length 1", "sum"],
)
def test_mean_and_sum_are_rescaled(name, arguments):
    """With loops at the nodes, A + I of the reconstruction is what the layer's own aggregation sees."""
    x, edge_index = graph()
    module = encoder(name, arguments=arguments)
    with_loops = torch.cat([edge_index, torch.arange(N).expand(2, -1)], dim=1)
    for local, other in zip(module(x, with_loops), module(x, edge_index, whole(edge_index)), strict=True):
        torch.testing.assert_close(local, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["symmetric", "mean", "sum"])
@pytest.mark.parametrize("mix", [0.0, 0.4, 1.0])
def test_operator_against_dense_matrices(kind, mix):
    _, edge_index = graph()
    factors = low_rank_factors(edge_index, N, 6, "regularized")
    adjacency = torch.zeros(N, N)
    adjacency[edge_index[1], edge_index[0]] = 1
    degree = adjacency.sum(1) + 1
    normal = (adjacency + torch.eye(N)) / (degree[:, None] * degree).sqrt()
    matrix = (1 - mix) * normal + mix * factors.u @ torch.diag(factors.s) @ factors.v.T
    left = {"symmetric": torch.ones(N), "mean": degree**-0.5, "sum": degree**0.5}[kind]
    right = torch.ones(N) if kind == "symmetric" else degree**0.5
    hidden = torch.randn(N, 2, 3, generator=torch.Generator().manual_seed(2))
    found = GlobalOperator(edge_index, N, factors, mix)(hidden, kind)
    wanted = (left[:, None] * matrix * right) @ hidden.flatten(1)
    torch.testing.assert_close(found, wanted.view_as(hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*LINEAR, "edgecnn"])
def test_global_view_sees_other_nodes_and_leaves_the_local_one_alone(name):
    x, edge_index = graph()
    module = encoder(name)
    operator = GlobalOperator(edge_index, N, low_rank_factors(edge_index, N, 5), 0.5)
    before = module(x, edge_index)
    other = module(x, edge_index, operator)
    after = module(x, edge_index)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.allclose(before[0], other[0]) and other[1].shape == (N, 3) and other[0].shape == (N, 16)
    assert module.linear == (name in LINEAR)


def test_after_an_error_the_local_view_is_back():
    x, edge_index = graph()
    module = encoder("gcn")
    expected = module(x, edge_index)[1]
    with pytest.raises(RuntimeError):
        module(x[:, :2], edge_index, whole(edge_index))
    assert torch.equal(module(x, edge_index)[1], expected)


def test_a_class_by_its_path_and_no_logits():
    x, edge_index = graph()
    module = GraphEncoder("torch_geometric.nn.GCN", 5, 8, 0)
    assert isinstance(module.body, GCN)
    hidden, logits = module(x, edge_index)
    assert hidden.shape == (N, 8) and logits is None


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75, 0.001])
def test_cheap_dropout_is_dropout(share):
    """The share that is left, and its scale; neighbours drop out independently; no effect in evaluation."""
    torch.manual_seed(0)
    layer, x = CheapDropout(share), torch.ones(401, 101, requires_grad=True)
    dropped = layer(x)
    rounded = round(share * 2**16) / 2**16
    assert sorted(dropped.unique().tolist()) == pytest.approx([0.0, 1 / (1 - rounded)])
    gone = (dropped == 0).double()
    spread = (share * (1 - share) / gone.numel()) ** 0.5
    assert gone.mean().item() == pytest.approx(share, abs=4 * spread)
    for one, other in ((gone[:, 1:], gone[:, :-1]), (gone[1:], gone[:-1])):
        assert (one * other).mean().item() == pytest.approx(share**2, abs=5 * spread * share**0.5 + 1e-5)
    (gradient,) = torch.autograd.grad(dropped.sum(), x)
    assert torch.equal(gradient, dropped)
    assert layer.eval()(x) is x and CheapDropout(0.0)(x) is x and not CheapDropout(1.0)(x).any()


def test_decoupled_encoder():
    """Full-dimensional preparation is the propagation itself, up to a rotation and one factor; then rows alone count."""
    x, edge_index = graph()
    module = encoder("decoupled", arguments={"K": 3, "alpha": 0.2, "dimensions": 5}, num_layers=3)
    local, other = GlobalOperator(edge_index, N), whole(edge_index, "regularized", mix=0.5)
    found = torch.cat(module.body.prepare([(x, local), (x, other)]))
    wanted = torch.cat([propagated_features(x, operator, 3, 0.2) for operator in (local, other)])
    wanted = wanted / wanted.square().mean().sqrt()
    torch.testing.assert_close(found @ found.T, wanted @ wanted.T, rtol=1e-3, atol=1e-3)
    hidden, logits = module(found, edge_index)
    assert hidden.shape == (2 * N, 16) and logits.shape == (2 * N, 3) and (hidden >= 0).all()
    torch.testing.assert_close(module(found[3:5], edge_index)[1], logits[3:5])
    assert sum(isinstance(layer, torch.nn.Linear) for layer in module.modules()) == 3


def test_decoupled_encoder_keeps_all_features():
    """Without a reduction the input is what propagation makes of the features, with rows of the length asked for."""
    x, edge_index = graph()
    operator = GlobalOperator(edge_index, N)
    found = encoder("decoupled", arguments={"dimensions": None, "length": 3.0}).body.prepare([(x, operator)])[0]
    wanted = propagated_features(x, operator, 5, 0.1)
    torch.testing.assert_close(found, wanted * 3 / wanted.square().sum(1).mean().sqrt())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("decoupled", {"arguments": {"dimensions": 0}}, "`encoder_args.dimensions` expected to be an integer of at least 1"),
        ("decoupled", {"arguments": {"alpha": 2.0}}, "`encoder_args.alpha`"),
        *(
            ("decoupled", {"arguments": {"length": length}}, f"`encoder_args.length` expected to be a .* but got {length!r}")
            for length in (0.0, -1, True, "2.0", float("inf"))
        ),
        ("decoupled", {"arguments": {"heads": 2}}, "`encoder_args` expected further arguments of 'decoupled'"),
        ("gnc", {}, "`encoder` expected to be one of gcn, gat"),
        ("torch_geometric.nn.GNC", {}, "`encoder`"),
        ("gcn", {"num_layers": 1}, "`num_layers`"),
    ],
)
def test_wrong_encoders(name, options, message):
    with pytest.raises(ValueError, match=message):
        encoder(name, **options)


def test_factors_of_a_part_of_the_nodes():
    _, edge_index = graph()
    factors = low_rank_factors(edge_index, N, 5)
    nodes = torch.tensor([3, 9, 1])
    part = Factors(factors.u[nodes], factors.s, factors.v[nodes])
    hidden = torch.randn(3, 2, generator=torch.Generator().manual_seed(3))
    found = GlobalOperator(torch.empty(2, 0, dtype=torch.long), 3, part, 1.0)(hidden)
    whole_matrix = factors.u @ torch.diag(factors.s) @ factors.v.T
    torch.testing.assert_close(found, whole_matrix[nodes][:, nodes] @ hidden, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_features_give_the_values_and_gradients_of_dense_ones(name):
    x, edge_index = graph()
    x = x.repeat(1, 8) * (torch.rand(N, 40, generator=torch.Generator().manual_seed(4)) < 0.08)
    assert sparse_features(x).layout == torch.sparse_csr and sparse_features(x + 1).layout == torch.strided
    module = GraphEncoder(name, 40, 16, 3, dropout=0.0)
    gradients = []
    for features in (x, sparse_features(x)):
        module.zero_grad()
        hidden, logits = module(features, edge_index)
        (hidden.sin().sum() + logits.sin().sum()).backward()
        gradients.append([hidden, logits, *(parameter.grad for parameter in module.parameters())])
    for dense, sparse in zip(*gradients, strict=True):
        torch.testing.assert_close(dense, sparse, rtol=1e-4, atol=1e-5)


def test_dropout_of_sparse_features_and_columns():
    x = torch.ones(200, 30) * (torch.arange(30) % 15 == 0)
    module = GraphEncoder("gcn", 30, 8, 2, dropout=0.25).train()
    dropped = module._dropped(sparse_features(x)).to_dense()
    assert sorted(dropped.unique().tolist()) == pytest.approx([0.0, 4 / 3])
    assert 0.6 < (dropped[:, ::15] > 0).float().mean() < 0.9
    for features in (x, sparse_features(x)):
        torch.manual_seed(0)
        columns = drop_columns(features, 0.5)
        columns = columns if columns.layout == torch.strided else columns.to_dense()
        kept = torch.rand(30, generator=torch.Generator().manual_seed(0)) >= 0.5
        assert torch.equal(columns, x * kept)


@pytest.mark.parametrize("name", ["gcn", "appnp", "sgc"])
def test_the_fast_local_view_is_the_layers_own(name):
    """Values and gradients; and it is not taken where the layer's own aggregation is another one."""
    x, edge_index = graph()
    module = encoder(name)
    gradients = []
    for operator in (None, GlobalOperator(edge_index, N)):
        module.zero_grad()
        hidden, logits = module(x, edge_index, operator)
        (hidden.sin().sum() + logits.sin().sum()).backward()
        gradients.append([hidden, logits, *(parameter.grad for parameter in module.parameters())])
    for slow, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(slow, fast, rtol=1e-4, atol=1e-5)
    assert module.symmetric and not encoder("gat").symmetric and not encoder("graphsage").symmetric
    assert not encoder("gcn", arguments={"improved": True}).symmetric
    assert not encoder("appnp", arguments={"dropout": 0.3}).symmetric

"""Poisoned graphs: what dice and prbcd change, what their surrogates compute, and that a graph is attacked once."""

import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch_geometric.contrib.nn import PRBCDAttack
from torch_geometric.utils import to_dense_adj, to_undirected

from datamodules import GraphDataModule, graph_attacks, graphs
from datamodules.graph_attacks import LowRankGCN, _trained, dice, kept_on_disk, leading_vectors, prbcd
from datamodules.graph_edges import drop_dissimilar
from tests.helpers.small_graphs import SMALL, check_form, masks, pairs, ready

pytestmark = pytest.mark.filterwarnings("ignore:.*contains experimental code")


def few(seed=3, nodes=12, share=0.3):
    """Edges and labels of a small random graph."""
    generator = torch.Generator().manual_seed(seed)
    upper = (torch.rand(nodes, nodes, generator=generator) < share).triu(1)
    return to_undirected(upper.nonzero().T, num_nodes=nodes), torch.arange(nodes) % 3


# dice


@pytest.mark.parametrize("share", [0.02, 0.25, 0.8])
def test_dice_deletes_within_classes_and_adds_between_them(share):
    clean, changed = ready(), ready(edge_attack="dice", attack_share=share)
    check_form(changed)
    y, old, new = clean.data.y, pairs(clean.data.edge_index), pairs(changed.data.edge_index)
    budget = round(share * len(old) / 2)
    assert len(old - new) == 2 * (budget // 2) and len(new - old) == 2 * (budget - budget // 2)
    assert all(y[a] == y[b] for a, b in old - new) and all(y[a] != y[b] for a, b in new - old)
    assert torch.equal(masks(clean), masks(changed)) and torch.equal(clean.data.y, changed.data.y)
    assert torch.equal(changed.data.edge_index, ready(edge_attack="dice", attack_share=share).data.edge_index)
    assert not torch.equal(masks(clean), masks(ready(seed=1)))
    others = dice(clean.data.edge_index, y, share, seed=1)
    assert pairs(others) != new


def test_dice_is_even():
    edges, labels = few()
    old, counts = pairs(edges), torch.zeros(12, 12)
    within = [(a, b) for a, b in old if a < b and labels[a] == labels[b]]
    between = [(a, b) for b in range(12) for a in range(b) if labels[a] != labels[b] and (a, b) not in old]
    share = 4 / (len(old) / 2)
    for seed in range(1500):
        new = pairs(dice(edges, labels, share, seed))
        for a, b in old ^ new:
            counts[a, b] += 1
    for choices in (within, between):
        expected = 2 * 1500 / len(choices)
        assert len(choices) > 4 and all(abs(counts[pair] - expected) < 5 * expected**0.5 for pair in choices)


def test_dice_can_change_all_and_no_more():
    edges, labels = torch.tensor([[0, 1, 0, 2], [1, 0, 2, 0]]), torch.tensor([0, 0, 1])
    assert pairs(dice(edges, labels, 1.0, seed=0)) == {(0, 2), (2, 0), (1, 2), (2, 1)}
    with pytest.raises(ValueError, match=r"delete at most 1 edges within classes and add at most 1 .* is 1 and 2; lower it"):
        dice(edges, labels, 1.5, seed=0)
    with pytest.raises(ValueError, match=r"expected to change an edge, but 0\.1 of 2 edges is none; raise it"):
        dice(edges, labels, 0.1, seed=0)


# prbcd


@pytest.mark.parametrize("surrogate", ["gcn", "low_rank"])
def test_prbcd_costs_its_surrogate_more_than_random_flips_do(surrogate, monkeypatch):
    monkeypatch.setattr(graph_attacks, "BLOCK", 2000)
    data = ready().data
    x, edges, y, train, val = data.x, data.edge_index, data.y, data.train_mask, data.val_mask
    before = torch.get_rng_state()
    changed = prbcd(x, edges, y, train, val, ~train, share=0.2, seed=5, surrogate=surrogate)
    assert torch.equal(before, torch.get_rng_state())
    budget = round(0.2 * edges.shape[1] / 2)
    assert 0.5 * budget <= len(pairs(edges) ^ pairs(changed)) / 2 <= budget
    assert changed.dtype == torch.long and torch.equal(changed, to_undirected(changed))
    assert torch.equal(changed, prbcd(x, edges, y, train, val, ~train, share=0.2, seed=5, surrogate=surrogate))
    torch.manual_seed(0)
    model = _trained(surrogate, x, edges, y, train, val, 0)
    random = ready(edge_noise=0.2).data.edge_index

    def right(edge_index):
        return (model(x, edge_index).argmax(1) == y)[~train].double().mean().item()

    assert right(edges) > 0.85 and right(changed) < right(random) - 0.1


def test_prbcd_is_that_of_torch_geometric_on_the_labels_of_all_nodes(monkeypatch):
    """The attacker knows labels of test nodes; training nodes are not attacked; the surrogate sees training labels only."""
    data, seen = ready().data, {}

    def attack(self, x, edge_index, labels, budget, idx_attack):
        seen.update(labels=labels, budget=budget, attacked=idx_attack, training=self.model.training)
        return edge_index, edge_index[:, :0]

    monkeypatch.setattr(PRBCDAttack, "attack", attack)
    x, edges, y, train = data.x, data.edge_index, data.y, data.train_mask
    same = prbcd(x, edges, y, train, data.val_mask, ~train, share=0.5, seed=0)
    assert torch.equal(same, edges) and seen["budget"] == round(0.5 * edges.shape[1] / 2) and not seen["training"]
    assert torch.equal(seen["labels"], y) and torch.equal(seen["attacked"], ~train)
    models = []
    for labels in (y, torch.where(train | data.val_mask, y, (y + 1) % 3)):
        torch.manual_seed(0)
        models.append(_trained("gcn", x, edges, labels, train, data.val_mask, 0))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_flips_of_more_than_half_of_the_pairs_are_refused():
    edges, labels = few(share=0.9)
    nothing = torch.zeros(12, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"`attack_share` expected to flip at most half of the 66 pairs .*; lower it"):
        prbcd(torch.eye(12), edges, labels, ~nothing, ~nothing, nothing, share=0.9, seed=0)


def test_low_rank_surrogate_against_dense_matrices():
    """D^-½ (Q Qᵀ A Q Qᵀ + I) D^-½ twice, in float64, and the gradient of the weights of edges."""
    edges, _ = few()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    weights = torch.rand(edges.shape[1], generator=generator, dtype=torch.float64, requires_grad=True)
    basis = torch.linalg.svd(to_dense_adj(edges)[0].double())[0][:, :4]
    model = LowRankGCN(5, 3, basis).double().eval()
    found = model(x, edges, weights)
    adjacency = torch.zeros(12, 12, dtype=torch.float64).index_put((edges[1], edges[0]), weights)
    low = basis @ basis.T @ adjacency @ basis @ basis.T
    degree = (low.sum(1) + 1).clamp_min(1)
    matrix = (low + torch.eye(12)) / (degree[:, None] * degree).sqrt()
    hidden = (matrix @ (x @ model.first.weight.T + model.first.bias)).relu()
    wanted = matrix @ (hidden @ model.second.weight.T + model.second.bias)
    torch.testing.assert_close(found, wanted)
    slopes = [torch.autograd.grad(value.square().sum(), weights, retain_graph=True)[0] for value in (found, wanted)]
    torch.testing.assert_close(*slopes)
    ones = model(x, edges)
    torch.testing.assert_close(ones, model(x, edges, torch.ones_like(weights)))


def test_leading_vectors_span_the_largest_singular_values():
    edges, _ = few(nodes=40)
    found = leading_vectors(edges, 40, seed=0).double()
    adjacency = to_dense_adj(edges)[0].double()
    values = torch.linalg.svdvals(adjacency)
    assert found.shape == (40, 20)
    torch.testing.assert_close(found.T @ found, torch.eye(20, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close((found.T @ adjacency).norm() ** 2, (values[:20] ** 2).sum(), rtol=1e-3, atol=0)


# Kept graphs


def test_a_graph_is_attacked_once_by_several_processes(tmp_path):
    made, edges = [], torch.tensor([[0, 1], [1, 0]])

    def make():
        made.append(1)
        return edges

    def ask(number):
        return kept_on_disk(tmp_path / "attacks", "x", {"labels": torch.tensor([number])}, make)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, [0] * 16))
    assert len(made) == 1 and all(torch.equal(one, edges) for one in found)
    ask(1)
    assert len(made) == 2 and len(list((tmp_path / "attacks").glob("x-*.safetensors"))) == 2


def test_a_failed_attack_leaves_no_graph(tmp_path):
    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        kept_on_disk(tmp_path, "x", {"y": torch.tensor([0])}, fail)
    assert not [name for name in os.listdir(tmp_path) if name.endswith("safetensors")]
    assert torch.equal(kept_on_disk(tmp_path, "x", {"y": torch.tensor([0])}, lambda: torch.ones(2, 1).long()), torch.ones(2, 1))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`root` expected a folder that can be written, .*: Not a directory\. Choose another"):
        ready(root=str(tmp_path / "file"), edge_attack="prbcd")


def test_data_module_keeps_the_graph_that_prbcd_made(tmp_path, monkeypatch):
    calls = []

    def attack(x, edge_index, labels, train, val, attacked, share, seed, surrogate):
        calls.append((share, seed, surrogate))
        assert torch.equal(attacked, ~train) and labels.shape == train.shape and not (train & val).any()
        return edge_index[:, (edge_index > 5).all(0)]

    monkeypatch.setattr(graphs, "prbcd", attack)
    options = {"root": str(tmp_path), "edge_attack": "prbcd"}
    clean, first = ready(), ready(**options)
    check_form(first)
    assert torch.equal(masks(clean), masks(first)) and torch.equal(clean.data.y, first.data.y)
    again = ready(**options, batch_size=20)
    assert torch.equal(first.data.edge_index, again.data.edge_index) and calls == [(0.25, 0, "gcn")]
    for changed in ({"attack_share": 0.1}, {"attack_surrogate": "low_rank"}, {"seed": 1}, {"labels_per_class": 4}, {"knn": 9}):
        ready(**options, **changed)
    assert calls[1:] == [(0.1, 0, "gcn"), (0.25, 0, "low_rank"), (0.25, 1, "gcn"), (0.25, 0, "gcn"), (0.25, 0, "gcn")]
    assert len(list((tmp_path / "attacks").glob("wine-prbcd-*.safetensors"))) == 6


def test_one_process_attacks_before_all_read(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "prbcd", lambda **given: given["edge_index"])
    module = GraphDataModule("wine", str(tmp_path), edge_attack="prbcd", **SMALL)
    module.trainer = SimpleNamespace(world_size=1)
    module.prepare_data()
    assert not list(tmp_path.iterdir())
    module.trainer.world_size = 2
    module.prepare_data()
    assert len(list((tmp_path / "attacks").glob("*.safetensors"))) == 1 and module.data is None


def test_what_changed_is_told(caplog):
    ready()
    ready(edge_noise=0.1)
    ready(edge_attack="dice", attack_share=0.01)
    plain, noisy, attacked = caplog.messages
    assert "edges, 3 classes" in plain and "edges (123 of them noise), 3" in noisy
    assert "edges (6 of them by dice, 6 removed), 3 classes" in attacked


# Unlike nodes


@pytest.mark.parametrize("threshold", [0.0, 0.2, 1 / 3])
def test_edges_of_unlike_nodes(threshold):
    """|A ∩ B| / |A ∪ B| by sets."""
    edges, _ = few(nodes=30)
    x = (torch.rand(30, 9, generator=torch.Generator().manual_seed(1)) < 0.25) * torch.linspace(0.1, 2, 9)
    x[4] = 0
    has = [set(row.nonzero().flatten().tolist()) for row in x]
    wanted = [
        (a, b) for a, b in edges.T.tolist() if has[a] | has[b] and len(has[a] & has[b]) / len(has[a] | has[b]) > threshold
    ]
    found = drop_dissimilar(edges, x, threshold)
    assert list(map(tuple, found.T.tolist())) == wanted and 0 < len(wanted) < edges.shape[1]


def test_only_words_are_alike(tmp_path):
    with pytest.raises(ValueError, match="`drop_dissimilar` expected features that are words, but those of wine are"):
        ready(drop_dissimilar=0.0)

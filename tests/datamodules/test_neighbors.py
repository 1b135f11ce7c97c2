"""Neighbour sampling: the drawn edges are edges, at most as many as allowed, each as likely as another; epochs repeat."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Data
from torch_geometric.utils import erdos_renyi_graph

from datamodules.neighbors import NeighborSampler, SeedLoader


def make(edges, num_nodes):
    """A graph whose features, labels and masks tell which node they are of."""
    node_ids = torch.arange(num_nodes)
    masks = {f"{part}_mask": node_ids % 3 == index for index, part in enumerate(("train", "val", "test"))}
    return Data(x=node_ids[:, None].float(), y=node_ids % 5, edge_index=edges, node_ids=node_ids, **masks)


def random_graph(num_nodes=40, probability=0.2, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(erdos_renyi_graph(num_nodes, probability), num_nodes)


def pairs(edge_index):
    return set(map(tuple, edge_index.T.tolist()))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def reachable(data, seeds, hops):
    """Nodes within some hops, and the edges that touch one within one hop less, by plain search."""
    edges, reached, touched = pairs(data.edge_index), set(seeds), set()
    for _ in range(hops):
        found = {(i, j) for i, j in edges if i in reached}
        touched |= found | {(j, i) for i, j in found}
        reached |= {j for _, j in found}
    return reached, touched


@settings(deadline=None, max_examples=40)
@given(
    num_nodes=st.integers(1, 30),
    probability=st.floats(0, 1),
    fanout=st.lists(st.sampled_from([-1, 1, 2, 3, 50]), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_subgraph_is_part_of_the_graph(num_nodes, probability, fanout, seed):
    data = random_graph(num_nodes, probability, seed)
    sampler = NeighborSampler(data, fanout)
    seeds = torch.randperm(num_nodes, generator=generator(seed))[: max(1, num_nodes // 3)]
    for _ in range(2):  # the sampler keeps nothing from one call to the next
        part = sampler.sample(seeds, generator(seed))
        assert part.num_seeds == len(seeds) and torch.equal(part.node_ids[: len(seeds)], seeds)
        assert len(part.node_ids.unique()) == len(part.node_ids) == part.num_nodes
        assert pairs(part.node_ids[part.edge_index]) <= pairs(data.edge_index)
        assert part.is_undirected() and part.is_coalesced() and not part.has_self_loops()
        assert torch.equal(part.x, data.x[part.node_ids]) and torch.equal(part.y, data.y[part.node_ids])
        for name in ("train_mask", "val_mask", "test_mask"):
            assert torch.equal(part[name][: len(seeds)], data[name][seeds]) and not part[name][len(seeds) :].any()


@pytest.mark.parametrize("fanout", [(-1, -1), (100, 100), (-1,)])
def test_all_neighbors_are_kept_when_fanout_allows(fanout):
    data = random_graph()
    part = NeighborSampler(data, fanout).sample(torch.tensor([3, 17]), generator())
    nodes, edges = reachable(data, [3, 17], len(fanout))
    assert set(part.node_ids.tolist()) == nodes
    assert pairs(part.node_ids[part.edge_index]) == edges


@pytest.mark.parametrize("fanout", [1, 3, 7, 100])
def test_expand_draws_distinct_neighbors(fanout):
    data = random_graph()
    nodes = torch.tensor([5, 0, 39])
    position, neighbors = NeighborSampler(data, [fanout]).expand(nodes, fanout, generator())
    drawn = list(zip(nodes[position].tolist(), neighbors.tolist(), strict=True))
    assert len(set(drawn)) == len(drawn) and set(drawn) <= pairs(data.edge_index)
    degree = torch.bincount(data.edge_index[0], minlength=40)
    assert torch.bincount(position, minlength=3).tolist() == degree[nodes].clamp(max=fanout).tolist()


def test_a_node_is_expanded_once_with_the_fanout_of_its_hop(monkeypatch):
    sampler, calls = NeighborSampler(random_graph(), (4, 2, 1)), []
    expand = sampler.expand

    def record(nodes, fanout, source):
        position, neighbors = expand(nodes, fanout, source)
        calls.append((nodes.tolist(), fanout, torch.bincount(position, minlength=len(nodes)).max()))
        return position, neighbors

    monkeypatch.setattr(sampler, "expand", record)
    sampler.sample(torch.tensor([0, 1]), generator())
    expanded = [node for nodes, _, _ in calls for node in nodes]
    assert len(set(expanded)) == len(expanded) and [fanout for _, fanout, _ in calls] == [4, 2, 1]
    assert all(most <= fanout for _, fanout, most in calls)


def test_neighbors_are_drawn_evenly():
    star = torch.stack([torch.zeros(10, dtype=torch.long), torch.arange(1, 11)])
    sampler = NeighborSampler(make(torch.cat([star, star.flip(0)], dim=1).T.unique(dim=0).T, 11), [3])
    source, counts = generator(), torch.zeros(11)
    for _ in range(2000):
        counts[sampler.expand(torch.tensor([0]), 3, source)[1]] += 1
    assert counts[0] == 0 and (counts[1:] - 600).abs().max() < 5 * (2000 * 0.3 * 0.7) ** 0.5


def test_isolated_nodes_and_graphs_without_edges():
    data = make(torch.tensor([[0, 1], [1, 0]]), 4)
    part = NeighborSampler(data, (2, 2)).sample(torch.tensor([3, 2, 0]), generator())
    assert part.node_ids.tolist() == [3, 2, 0, 1] and pairs(part.edge_index) == {(2, 3), (3, 2)}
    alone = NeighborSampler(make(torch.empty(2, 0, dtype=torch.long), 3), (2, 2)).sample(torch.tensor([1]), generator())
    assert alone.node_ids.tolist() == [1] and alone.edge_index.shape == (2, 0)


def epoch_of(loader, epoch):
    loader.set_epoch(epoch)
    return [(part.node_ids.tolist(), part.edge_index.tolist(), part.num_seeds) for part in loader]


def make_loader(seed=0, shuffle=True, batch_size=7):
    data = random_graph()
    return SeedLoader(NeighborSampler(data, (3, 3)), data.node_ids, batch_size, seed, shuffle)


def test_each_seed_once_an_epoch_in_an_order_of_seed_and_epoch():
    epochs = {(seed, epoch): epoch_of(make_loader(seed), epoch) for seed in (0, 1) for epoch in (0, 1)}
    for batches in epochs.values():
        assert sorted(node for nodes, _, size in batches for node in nodes[:size]) == list(range(40))
        assert [size for _, _, size in batches] == [7] * 5 + [5] and len(make_loader()) == 6
    assert len({str(batches) for batches in epochs.values()}) == 4
    assert epoch_of(make_loader(0), 1) == epochs[0, 1]


def test_in_order_every_epoch_is_the_same():
    loader = make_loader(shuffle=False)
    assert epoch_of(loader, 0) == epoch_of(loader, 5) != epoch_of(make_loader(1, shuffle=False), 0)
    assert [node for nodes, _, size in epoch_of(loader, 0) for node in nodes[:size]] == list(range(40))


@pytest.mark.parametrize(("batch_size", "world_size"), [(7, 2), (7, 3), (4, 4), (13, 2), (40, 3), (100, 5)])
def test_processes_share_seeds_and_subgraphs(batch_size, world_size):
    data = random_graph()
    sampler = NeighborSampler(data, (3, 3))

    def batches(shuffle, rank, count):
        return list(SeedLoader(sampler, data.node_ids, batch_size, 0, shuffle, rank, count))

    def seeds(batch):
        return batch.node_ids[: batch.num_seeds].tolist()

    shuffled = [batches(True, rank, world_size) for rank in range(world_size)]
    for alone, *shares in zip(batches(True, 0, 1), *shuffled, strict=True):
        assert sorted(node for share in shares for node in seeds(share)) == sorted(seeds(alone))
        assert max(share.num_seeds for share in shares) - min(share.num_seeds for share in shares) <= 1
    in_order = [batches(False, rank, world_size) for rank in range(world_size)]
    assert all(in_order)  # Lightning refuses processes without a batch
    found = {tuple(seeds(batch)): batch for share in in_order for batch in share if batch.num_seeds}
    alone = batches(False, 0, 1)
    assert len(found) == len(alone)
    for batch in alone:
        assert torch.equal(found[tuple(seeds(batch))].edge_index, batch.edge_index)
    for batch in (batch for share in in_order + shuffled for batch in share if not batch.num_seeds):
        assert batch.num_nodes and not (batch.train_mask | batch.val_mask | batch.test_mask).any()


def test_goes_on_within_an_epoch():
    loader = make_loader()
    whole, batches = epoch_of(loader, 3), iter(loader)
    for _ in range(4):
        next(batches)
    again = make_loader()
    again.load_state_dict(loader.state_dict())
    iter(again)  # Lightning makes one as it sets up
    again.load_state_dict(loader.state_dict())
    assert epoch_of(again, 3) == whole[4:] and epoch_of(again, 3) == whole


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    list(make_loader())
    assert torch.equal(before, torch.get_rng_state())

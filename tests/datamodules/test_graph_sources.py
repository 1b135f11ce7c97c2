"""Sources of graphs: every source becomes the same kind of graph, and splits are disjoint and repeatable.

Files are written here; nothing is downloaded.
"""

import errno
import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.datasets import load_wine
from torch_geometric import datasets
from torch_geometric.data import Data

from datamodules import GraphDataModule
from tests.helpers.small_graphs import check_form, masks, pairs, ready, sizes


def npz_arrays(num_nodes=120, num_features=6, num_classes=3, seed=0):
    """Labels in turn; node 0 has no words, node 1 no edges; an edge in one direction, one twice, and a self-loop."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 3, (num_nodes, num_features))
    words[:, 0] += 1
    words[0] = 0
    table = scipy.sparse.csr_matrix(words.astype(np.float32))
    edges = rng.integers(2, num_nodes, (300, 2))
    order = rng.permutation(num_nodes)
    labels = np.arange(num_nodes) % num_classes
    train = {n: np.concatenate([order[labels[order] == c][:n] for c in range(num_classes)]) for n in (2, 4)}
    return {
        "attr_data": table.data,
        "attr_indices": table.indices,
        "attr_indptr": table.indptr,
        "attr_shape": np.array(table.shape),
        "edge": np.concatenate([edges, [[0, 2], [0, 2], [5, 5]]]),
        "labels": labels.astype(np.int16),
        **{f"train{n}": nodes for n, nodes in train.items()},
        **{f"test{n}": np.setdiff1d(order, train[4])[:40] for n in (2, 4)},
    }, words


@pytest.fixture
def npz(tmp_path):
    arrays, _ = npz_arrays()

    def write(**changes):
        path = tmp_path / "tiny.npz"
        np.savez(path, **{key: value for key, value in {**arrays, **changes}.items() if value is not None})
        return str(path)

    return write


def fake(monkeypatch, kind, data=None, error=None):
    """In place of a class of PyG's: one that gives a graph, or fails."""
    asked = []

    class Fake:
        def __init__(self, **arguments):
            asked.append(arguments)
            if error is not None:
                raise error

        def __getitem__(self, index):
            return data

    monkeypatch.setattr(datasets, kind, Fake)
    return asked


def directed(num_nodes=60, folds=10):
    """A directed ring with one self-loop, words as features, ten splits."""
    part = (torch.arange(num_nodes)[:, None] + torch.arange(folds)) % 3
    ring = torch.stack([torch.arange(num_nodes), (torch.arange(num_nodes) + 1) % num_nodes])
    return Data(
        x=torch.ones(num_nodes, 4),
        y=torch.arange(num_nodes) // 2 % 2,
        edge_index=torch.cat([ring, torch.tensor([[3], [3]])], dim=1),
        train_mask=part == 0,
        val_mask=part == 1,
        test_mask=part == 2,
    )


# Sources


@pytest.mark.parametrize(
    ("source", "nodes", "features", "classes"),
    [("digits", 1797, 64, 10), ("Wine", 178, 13, 3), ("breast_cancer", 569, 30, 2)],
)
def test_embedded_tables(source, nodes, features, classes):
    module = ready(source)
    check_form(module)
    assert (module.data.num_nodes, module.num_features, module.num_classes) == (nodes, features, classes)
    assert sizes(module) == [20 * classes, 30, 50]
    assert module.data.x.mean(dim=0).abs().max() < 1e-5  # standardised, and not divided by sums


def test_defaults_are_digits_with_room_for_all_parts():
    module = GraphDataModule()
    module.setup("fit")
    assert sizes(module) == [200, 500, 1000] and module.split_name == "random, 20 labels a class, seed 0"


@pytest.mark.parametrize("knn", [1, 10])
def test_knn_against_brute_force(knn):
    table = load_wine().data
    features = (table - table.mean(axis=0)) / table.std(axis=0)
    edges = set()
    for i, row in enumerate(features):
        distances = [(float(((row - other) ** 2).sum()), j) for j, other in enumerate(features) if j != i]
        edges |= {edge for _, j in sorted(distances)[:knn] for edge in ((i, j), (j, i))}
    module = ready(knn=knn)
    assert pairs(module.data.edge_index) == edges
    assert torch.allclose(module.data.x, torch.from_numpy(features).float(), atol=1e-5)


def test_karate_draws_what_its_split_lacks():
    module = ready("karate", split="public", num_val=5, num_test=-1)
    check_form(module)
    assert torch.equal(module.data.x, torch.eye(34)) and sizes(module) == [4, 5, 25]
    assert module.split_name == "public, 5 for val and 25 for test drawn from the rest, seed 0"


def test_npz(npz):
    module = ready(npz(), split="public", labels_per_class=4, row_normalize=False)
    check_form(module)
    arrays, words = npz_arrays()
    assert torch.equal(module.data.x, torch.from_numpy(words).float()) and module.data.y.tolist() == arrays["labels"].tolist()
    assert pairs(module.data.edge_index) == {(i, j) for a, b in arrays["edge"].tolist() for i, j in ((a, b), (b, a)) if i != j}
    assert set(module.data.train_mask.nonzero().flatten().tolist()) == set(arrays["train4"].tolist())
    assert set(module.data.test_mask.nonzero().flatten().tolist()) == set(arrays["test4"].tolist())
    assert module.split_name == "public, train4 and test4, 30 for val drawn from the rest, seed 0"
    assert sizes(ready(npz(), split="public")) == [6, 30, 40]  # the fewest labels
    assert not torch.equal(ready(npz(), split="public", seed=1).data.val_mask, ready(npz(), split="public").data.val_mask)


def test_rows_of_words_sum_to_one_and_others_stay(npz):
    sums = ready(npz(), labels_per_class=2).data.x.sum(dim=1)
    assert sums[0] == 0 and torch.allclose(sums[1:], torch.ones(119))
    values = npz_arrays()[0]["attr_data"].copy()
    values[3] = -1
    assert ready(npz(attr_data=values), labels_per_class=2).data.x.min() == -1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "has no labels; add it"),
        ({"labels": np.array([0, 1])}, "`labels` of 120 nodes, from 0"),
        ({"labels": np.full(120, -1)}, "`labels` of 120 nodes, from 0"),
        ({"edge": np.array([[0, 120]])}, "`edge` (e, 2) of nodes below 120"),
        ({"edge": np.array([0, 1])}, "`edge` (e, 2) of nodes below 120"),
        ({"attr_indptr": np.zeros(121, int)}, "`attr_indptr` that rises from 0 to the number of values"),
        ({"attr_shape": np.array([120, 2])}, "`attr_indices` below 2"),
        ({"train2": np.array([-1])}, "`train2` of nodes below 120"),
        ({"edge": np.array([[object()]])}, "Object arrays cannot be loaded when allow_pickle=False"),
    ],
)
def test_npz_that_is_wrong(npz, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ready(npz(**changes))


def test_npz_missing_or_damaged(tmp_path):
    for content in (None, b"", b"PK\x03\x04 and no more", b"text"):
        path = tmp_path / "other.npz"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=r"Argument `source` expected a \.npz file with attr_data.* but got .*check it"):
            ready(str(path))


def test_planetoid_files(citeseer):
    public = ready("citeseer", root=citeseer, split="public")
    check_form(public)
    assert (public.data.num_nodes, sizes(public)) == (700, [40, 500, 97]) and public.split_name == "public"
    assert len(pairs(public.data.edge_index)) == 1200  # the ring, without self-loops
    again = ready("CITESEER", root=citeseer, split="public", labels_per_class=5)  # from the processed file
    assert sizes(again) == [10, 500, 97] and again.split_name == "public, cut to 5 labels a class, seed 0"
    assert (again.data.train_mask & ~public.data.train_mask).sum() == 0
    assert not torch.equal(
        again.data.train_mask,
        ready("citeseer", root=citeseer, split="public", labels_per_class=5, seed=1).data.train_mask,
    )
    everything = ready("citeseer", root=citeseer, num_test=-1)
    assert sizes(everything) == [40, 30, 627]  # of 700 all but the three without a label
    assert not masks(everything)[:, [610, 620, 630]].any()
    with pytest.raises(ValueError, match=r"at most 20, .* of class 0 of CiteSeer for training in the public split, but got 21"):
        ready("citeseer", root=citeseer, split="public", labels_per_class=21)


def test_planetoid_geom_gcn(citeseer):
    module = ready("citeseer", root=citeseer, split="geom-gcn", fold=2)
    assert torch.equal(module.data.train_mask, (torch.arange(700) - 2) % 700 % 3 == 0)
    assert module.split_name == "geom-gcn, fold 2"
    with pytest.raises(ValueError, match=r"`fold` expected to be below 10, .* geom-gcn splits of CiteSeer, but got 10"):
        ready("citeseer", root=citeseer, split="geom-gcn", fold=10)


def test_a_processed_file_with_a_pickled_object_is_not_unpickled(citeseer, tmp_path):
    ready("citeseer", root=citeseer)
    path = tmp_path / "CiteSeer" / "processed" / "data.pt"
    torch.save(SimpleNamespace(harmful=True), path)
    with pytest.raises(ValueError, match="Weights only load failed"):
        ready("citeseer", root=citeseer)


@pytest.mark.parametrize(
    ("source", "kind", "arguments"),
    [
        ("Texas", "WebKB", {"root": "R", "name": "texas"}),
        ("actor", "Actor", {"root": "R/Actor"}),
        ("WIKICS", "WikiCS", {"root": "R/WikiCS", "is_undirected": True}),
        ("photo", "Amazon", {"root": "R", "name": "Photo"}),
        ("cs", "Coauthor", {"root": "R", "name": "CS"}),
    ],
)
def test_other_sets_of_pyg(monkeypatch, source, kind, arguments):
    asked = fake(monkeypatch, kind, directed())
    module = ready(source, root="R", labels_per_class=5, num_val=10, num_test=None)
    check_form(module)
    assert asked == [arguments] and module.data.edge_index.shape[1] == 120 and sizes(module) == [10, 10, 40]
    assert module.data.x.sum(dim=1).unique().tolist() == [4.0 if kind == "WikiCS" else 1.0]


@pytest.mark.parametrize("split", ["public", "geom-gcn"])
def test_fold_of_directed_sets(monkeypatch, split):
    fake(monkeypatch, "WebKB", directed())
    module = ready("cornell", split=split, fold=4)
    assert torch.equal(masks(module), torch.stack([(torch.arange(60) + 4) % 3 == part for part in range(3)]))
    assert module.split_name == f"{split}, fold 4"


def test_folds_with_one_test_mask(monkeypatch):
    data = directed()
    data.test_mask = torch.arange(60) >= 50
    data.train_mask[50:] = data.val_mask[50:] = False
    fake(monkeypatch, "WikiCS", data)
    assert ready("wikics", split="public", fold=3).data.test_mask.sum() == 10
    data.train_mask[55] = True
    with pytest.raises(ValueError, match="`split` = 'public' of WikiCS has nodes in two parts; use random"):
        ready("wikics", split="public", fold=3)


@pytest.mark.parametrize(
    ("source", "split"), [("wine", "public"), ("wine", "geom-gcn"), ("photo", "public"), ("cs", "geom-gcn")]
)
def test_split_that_the_source_does_not_have(monkeypatch, source, split):
    fake(monkeypatch, "Amazon", directed())
    fake(monkeypatch, "Coauthor", directed())
    with pytest.raises(ValueError, match=f"`split` expected one that .* has but got '{split}'; use random"):
        ready(source, split=split)


def test_arxiv(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ogb", None)
        patch.setitem(sys.modules, "ogb.nodeproppred", None)
        with pytest.raises(ModuleNotFoundError, match=r"`source` = 'ogbn-arxiv' needs the package .*: pip install ogb"):
            ready("ogbn-arxiv")
    data, order = directed(), torch.arange(60)
    data.y = data.y[:, None]
    parts = {"train": order[:30], "valid": order[30:40], "test": order[40:]}
    ogb = ModuleType("ogb.nodeproppred")
    ogb.PygNodePropPredDataset = lambda name, root: type(
        "Fake", (), {"__getitem__": lambda self, index: data, "get_idx_split": lambda self: parts}
    )()
    monkeypatch.setitem(sys.modules, "ogb", ModuleType("ogb"))
    monkeypatch.setitem(sys.modules, "ogb.nodeproppred", ogb)
    module = ready("OGBN-arxiv", split="public")
    check_form(module)
    assert sizes(module) == [30, 10, 20]


def test_unknown_source_lists_the_accepted():
    with pytest.raises(ValueError, match=r"digits, wine, .* Cora, .* ogbn-arxiv or the path of a \.npz file but got 'corra'"):
        ready("corra")


def test_source_that_cannot_be_downloaded(monkeypatch):
    fake(monkeypatch, "Planetoid", error=ConnectionError("no route"))
    message = "`source` = 'Cora' .* `root` = '/r' but got ConnectionError: no route; without a network, .* '/r/Cora/raw'"
    with pytest.raises(ValueError, match=message):
        ready("cora", root="/r")
    with pytest.raises(ValueError, match="'/r/Cora/geom-gcn/raw'"):
        ready("cora", root="/r", split="geom-gcn")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_root_that_cannot_be_written(monkeypatch, number):
    fake(monkeypatch, "Planetoid", error=OSError(number, "not yours"))
    with pytest.raises(
        ValueError, match=r"`root` expected a folder that can be written to, .* got '/r' .*; copy Cora to a folder"
    ):
        ready("cora", root="/r")


# Splits


def test_random_split_is_balanced_and_follows_the_seed():
    module = ready(labels_per_class=7)
    assert torch.bincount(module.data.y[module.data.train_mask]).tolist() == [7, 7, 7]
    assert torch.equal(masks(module), masks(ready(labels_per_class=7)))
    assert not torch.equal(masks(module), masks(ready(labels_per_class=7, seed=1)))
    assert module.split_name == "random, 7 labels a class, seed 0"


@pytest.mark.parametrize("rest", [-1, None])
def test_the_rest_is_for_test(rest):
    assert sizes(ready(num_test=rest)) == [60, 30, 88]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_val": 500, "num_test": 1000},
            "`num_val` = 500 and `num_test` = 1000 .* at most 118 nodes, those of wine (178 nodes)",
        ),
        ({"num_val": 118, "num_test": -1}, "`num_val` = 118 and `num_test` = -1 .* at most 118 nodes, .* got 119; lower it"),
        ({"labels_per_class": 49}, "at most 48, the number of nodes of class 2 (class_2) of wine, but got 49; lower it"),
        ({"knn": 178}, "`knn` expected to be below 178, the number of nodes of wine, but got 178; lower it"),
    ],
)
def test_too_few_nodes(options, message):
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        ready(**options)


def test_public_split_of_a_file(npz):
    with pytest.raises(ValueError, match=r"`labels_per_class` expected to be one of 2, 4, .* public splits of tiny, but got 3"):
        ready(npz(), split="public", labels_per_class=3)
    with pytest.raises(
        ValueError, match=r"`num_val` = 77 expected to need at most 74 nodes, those of tiny .* but got 77; lower it"
    ):
        ready(npz(), split="public", num_val=77)
    with pytest.raises(ValueError, match="`split` expected one that tiny has but got 'public'"):
        ready(npz(train2=None, train4=None), split="public")
    with pytest.raises(ValueError, match=r"at most 0, the number of nodes of class 3 .* no value suits"):
        ready(npz(labels=np.arange(120) % 4 + (np.arange(120) % 4 == 3)), labels_per_class=2)

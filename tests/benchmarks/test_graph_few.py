"""Few labels: the same splits for every method, the choice by validation, methods that can be built."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from benchmarks import graph_attack, graph_few, graph_settings
from lightning_modules import CSG2L, SvdView

ALL = {**graph_few.METHODS, **graph_few.CANDIDATES, **graph_few.WORDS_CANDIDATES, **graph_few.UNLIKE}


def test_few_labels_have_the_same_splits_for_every_method(tmp_path):
    known = {"Cora": {"source": "Cora"}}
    methods = {"edges": {}, "joint": graph_few.JOINT}
    rows = graph_few.tasks("final", known, methods, ["Cora"], [3, 5], range(4000, 4002))
    assert len(rows) == 8 and [row["data_seed"] for row, _ in rows] == [4000] * 4 + [4001] * 4
    row, data = rows[1]
    assert data == {"source": "Cora", "split": "random", "labels_per_class": 3, "val_per_class": 30, "num_test": -1}
    made = CSG2L(**graph_settings.module_arguments(graph_settings.class_of(row["method"]), json.loads(row["arguments"])))
    assert made.view == SvdView("joint", mix=1.0) and CSG2L().hparams.keys() == made.hparams.keys()
    path = tmp_path / "x.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["phase", "dataset", "labels", "method", "seed", "val"])
        for method, seed, value in (("edges", 0, 0.5), ("joint", 0, 0.6), ("joint", 1, 0.1), ("knn", 1, 0.9)):
            writer.writerow(["choose", "Cora", 3, graph_few.PREFIX + method, seed, value])
    found = graph_few.validated(path, "choose", ["edges", "joint"])  # on the split that both have
    assert found == {"joint": 0.6, "edges": 0.5}


def test_folds_where_neighbours_differ():
    rows = graph_few.folds({"texas": {"source": "texas"}}, {"mlp": graph_few.MLP}, ["texas"])
    assert [data["fold"] for _, data in rows] == list(range(10)) == [row["seed"] for row, _ in rows]
    assert rows[3][1] == {"source": "texas", "split": "geom-gcn", "fold": 3}


def test_fresh_splits_where_neighbours_differ():
    rows = graph_few.uniform({"texas": {"source": "texas"}}, graph_few.FRESH, ["texas"], range(7000, 7003))
    assert [row["data_seed"] for row, _ in rows] == [row["seed"] for row, _ in rows] == sorted([7000, 7001, 7002] * 4)
    assert {tuple(data.items()) for _, data in rows} == {(("source", "texas"), ("split", "uniform"))}
    assert {row["phase"] for row, _ in rows} == {"unlike_fresh"} and {row["labels"] for row, _ in rows} == {""}
    names = ["edges", "mlp alone", "mlp, knn, gate, no pseudo-labels", "mlp, knn, gate"]
    assert [row["method"] for row, _ in rows[:4]] == [graph_few.PREFIX + name for name in names]


@pytest.mark.parametrize("name", ALL)
def test_methods_of_few_labels_can_be_built(name):
    flat = graph_settings.DEFAULT | ALL[name]
    CSG2L(**graph_settings.module_arguments("CSG2L", flat))


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ("few_labels", graph_few.METHODS["all words, joint"]),
        ("poisoned", graph_attack.METHODS[f"{graph_few.PREFIX}knn, balanced, jaccard"]),
    ],
)
def test_the_configs_are_the_methods_that_they_name(config, method):
    content = yaml.safe_load((Path(__file__).parents[2] / f"configs/csg2l/{config}.yaml").read_text())
    arguments, threshold = graph_attack.split_off(graph_settings.DEFAULT | method)
    parser = ArgumentParser()
    parser.add_subclass_arguments(CSG2L, "model")
    made = parser.instantiate_classes(parser.parse_object({"model": content["model"]})).model
    wanted = CSG2L(**graph_settings.module_arguments("CSG2L", arguments))
    assert dict(made.hparams) == dict(wanted.hparams)
    assert content["data"]["init_args"].get("drop_dissimilar", "") == threshold

"""Resuming of a results file, and the choice by validation."""

import argparse
import csv
import json

import pytest

import benchmarks.graph_runs as graph_runs
from benchmarks import graph_quality, graph_robust


def test_rows_that_are_there_are_not_run_again(tmp_path, monkeypatch):
    ran = []

    def run_all(rows, workers, write, stop_at, together, train):
        for row, _ in rows:
            ran.append(row["seed"])
            write(row | {"val": 0.5, "test": 0.25})

    monkeypatch.setattr(graph_runs, "run_all", run_all)
    options = argparse.Namespace(workers=2, together=1, stop_at=0.0)
    rows = [({"method": "gcn", "seed": seed}, {}) for seed in range(3)]
    keys, columns = ("method", "seed"), ("method", "seed", *graph_runs.FACTS)
    graph_runs.run_missing(rows[:2], tmp_path / "x.csv", keys, columns, options)
    graph_runs.run_missing([*rows, rows[2]], tmp_path / "x.csv", keys, columns, options)
    assert ran == [0, 1, 2] and [row["seed"] for row in graph_runs.read(tmp_path / "x.csv")] == ["0", "1", "2"]


def test_final_rows_of_another_choice_are_not_mixed_with_new_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(graph_runs, "run_all", lambda rows, workers, write, *_: [write(row) for row, _ in rows])
    options = argparse.Namespace(workers=1, together=1, stop_at=0.0)
    keys = ("phase", "dataset", "method", "arguments", "seed")

    def run(phase, dataset, arguments, seed):
        row = dict(zip(keys, (phase, dataset, "chosen", arguments, seed), strict=True))
        graph_runs.run_missing([(row, {})], tmp_path / "x.csv", keys, keys, options)

    for phase, dataset, arguments, seed in (("choose", "a", "one", 0), ("choose", "a", "two", 0), ("final", "a", "one", 1)):
        run(phase, dataset, arguments, seed)
    run("final", "a", "one", 2)
    run("final", "b", "two", 1)
    with pytest.raises(SystemExit, match=r"final rows of 'chosen' on a with arguments one, but now it is two. Remove"):
        run("final", "a", "two", 3)
    assert len(graph_runs.read(tmp_path / "x.csv")) == 5


def test_validation_chooses(tmp_path):
    path = tmp_path / "x.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["phase", "dataset", "method", "arguments", "val", "test", "seed"])
        for rank, vals in ((1, (0.7, 0.9, 0.8)), (2, (0.8, 0.8, 0.85)), (3, (0.9,))):
            for seed, val in zip(graph_quality.TUNING_SEEDS, vals, strict=False):
                writer.writerow(["tune", "Cora", "gcn", json.dumps({"rank": rank}), val, 1 - val, seed])
        writer.writerow(["final", "Cora", "gcn", json.dumps({"rank": 4}), 1.0, 1.0, 1000])
        for rank, vals in ((1, (0.5, 0.6, 0.7)), (2, (0.7, 0.7, 0.7)), (3, (0.9,))):
            for val in vals:
                writer.writerow(["tune", "acm", "csg2l, gcn", json.dumps({"rank": rank}), val, 0])
    assert graph_quality.best(path, "Cora", "gcn") == {"rank": 2}
    assert graph_quality.ranked(path, "Cora", "gcn") == [{"rank": 3}, {"rank": 2}, {"rank": 1}]
    assert graph_robust.best(path, "acm", "csg2l, gcn") == {"rank": 2}  # 3 was cut short
    assert graph_robust.best(path, "acm", "csg2l, gcn: no reweighting") == {"rank": 2, "beta": 0.0}


@pytest.mark.parametrize(
    ("accuracies", "chosen"),
    [
        ({0.0: 0.700, 0.1: 0.705, 0.3: 0.7031, 1.0: 0.702}, 0.3),  # in a tie the larger
        ({0.0: 0.710, 0.1: 0.705, 0.3: 0.690, 1.0: 0.680}, 0.1),  # none is better, but not by enough
        ({0.0: 0.716, 0.1: 0.705, 0.3: 0.690, 1.0: 0.680}, 0.0),
        ({0.0: 0.500, 0.1: 0.600, 0.3: 0.600, 1.0: 0.650}, 1.0),
    ],
)
def test_the_weight_that_validation_prefers(accuracies, chosen, tmp_path):
    assert graph_robust.preferred(accuracies) == chosen
    path = tmp_path / "x.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["phase", "arguments", "val", "test"])
        for weight, value in accuracies.items():
            for shift in (-0.1, 0.1):
                writer.writerow(["scan", json.dumps({"contrast_weight": weight}), value + shift, 0])
        writer.writerow(["final", json.dumps({"contrast_weight": 0.0}), 1, 1])
    assert graph_robust.scanned(path) == pytest.approx(accuracies)

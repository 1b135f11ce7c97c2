"""The benchmark's loop is the Trainer's; configurations, resuming of a results file and the choice by validation."""

import argparse
import csv
import json

import pytest
import torch
from lightning.pytorch import Callback, Trainer

import benchmarks.graph_runs as graph_runs
from benchmarks import graph_few, graph_quality, graph_robust, graph_settings
from datamodules import GraphDataModule
from lightning_modules import CSG2L, Contrast, DropView, NodeClassifier, PredictedLabels, SvdView

WINE = {"source": "wine", "labels_per_class": 5, "num_val": 40, "num_test": -1}
SMALL = {"hidden_channels": 16, "warmup_epochs": 4, "head_channels": 8, "anchors": 64, "rank": 20, "pseudo_weight": 0.3}


@pytest.mark.parametrize(
    ("method", "arguments"), [("csg2l, gcn", SMALL), ("gat", {"encoder": "gat", "hidden_channels": 16})], ids=["csg2l", "gat"]
)
def test_the_loop_is_the_trainers(method, arguments, tmp_path):
    seen = []

    class Watch(Callback):
        def on_validation_end(self, trainer, module):
            seen.append((float(trainer.callback_metrics["val/accuracy"]), -float(trainer.callback_metrics["val/loss"])))

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=15, accelerator="cpu", num_sanity_val_steps=0, callbacks=[Watch()], **quiet)
    torch.manual_seed(3)
    cls = CSG2L if "csg2l" in method else NodeClassifier
    module = cls(**graph_settings.module_arguments(cls.__name__, arguments))
    trainer.fit(module, datamodule=GraphDataModule(**WINE, seed=1))
    run = graph_runs.Run(method, arguments, WINE, seed=3, data_seed=1)
    for _ in range(15):
        run.advance()
    torch.testing.assert_close(run.history[:15, :2], torch.tensor(seen), rtol=1e-5, atol=1e-6)
    best = max(range(run.module.warmup_epochs, 15), key=lambda epoch: seen[epoch])
    assert run.result()["val"] == pytest.approx(seen[best][0]) and run.result()["best_epoch"] == best + 1


def test_epochs_of_the_warm_up_are_not_chosen():
    """What any epoch gives stands beside it."""
    run = graph_runs.Run("csg2l, default", SMALL, WINE, 0)
    run.epoch, run.history[:6] = (
        6,
        torch.tensor([[0.9, 0, 1.0], [0.1, 0, 0], [0, 0, 0], [0, 0, 0], [0.6, -1, 0.3], [0.6, -0.5, 0.4]]),
    )
    found = run.result()
    assert (found["val"], found["test"], found["best_epoch"]) == (pytest.approx(0.6), pytest.approx(0.4), 6)
    assert (found["any_val"], found["any_test"]) == (pytest.approx(0.9), pytest.approx(1.0))


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
        for method, seed, value in (("edges", 0, 0.5), ("joint", 0, 0.6), ("joint", 1, 0.1)):
            writer.writerow(["choose", "Cora", 3, graph_few.PREFIX + method, seed, value])
    assert graph_few.validated(path, "choose") == {"joint": 0.6, "edges": 0.5}  # on the split that both have


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


ALL = {**graph_few.METHODS, **graph_few.CANDIDATES, **graph_few.UNLIKE}


@pytest.mark.parametrize("name", ALL)
def test_methods_of_few_labels_can_be_built(name):
    flat = graph_settings.DEFAULT | ALL[name]
    CSG2L(**graph_settings.module_arguments("CSG2L", flat))


def test_unsupervised_runs_are_probed(monkeypatch):
    monkeypatch.setattr(graph_runs, "PROBED_EPOCHS", 20)
    monkeypatch.setattr(graph_runs, "PROBE_EVERY", 10)
    (found,) = graph_runs.train_together([("dgi", {"hidden_channels": 32}, WINE, 0)])
    assert found["test"] > 0.7 and found["epochs"] == 20 and found["best_epoch"] in (10, 20)


def test_a_run_that_fails_leaves_the_others():
    short = {"encoder": "gcn", "hidden_channels": 4}
    good, bad = graph_runs.train_together([("gcn", short, WINE, 0), ("gcn", {"encoder": "gnc"}, WINE, 0)])
    assert good["test"] > 0.5 and isinstance(bad, ValueError)


@pytest.mark.parametrize("method", graph_settings.METHODS)
def test_configurations_are_drawn_once_and_can_be_built(method):
    module, fixed, space = graph_settings.METHODS[method]
    arguments = graph_settings.configuration(method, 7)
    assert arguments == graph_settings.configuration(method, 7)
    assert arguments != graph_settings.configuration(method, 8) or not space
    assert all(arguments[name] in values for name, values in space.items()) and fixed.items() <= arguments.items()
    run = graph_runs.Run(method, arguments, WINE, 0)
    assert type(run.module).__name__ == module == graph_settings.class_of(f"{method}: some variant")


def test_rows_that_are_there_are_not_run_again(tmp_path, monkeypatch):
    ran = []

    def run_all(rows, workers, write, stop_at, together):
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


def test_the_default_is_that_of_the_class():
    arguments = graph_settings.module_arguments("CSG2L", graph_settings.DEFAULT)
    assert CSG2L(**arguments).hparams == CSG2L().hparams


def test_settings_that_do_not_apply_are_left_out():
    """A search draws them all; results files hold them all."""
    drawn = {
        "view": "drop",
        "rank": 7,
        "drop_edges": 0.1,
        "contrast_weight": 0.0,
        "beta": 2.0,
        "alignment": 3.0,
        "dropout": 0.2,
    }
    assert graph_settings.module_arguments("CSG2L", drawn) == {
        "view": DropView(edges=0.1),
        "contrast": Contrast(weight=0.0),
        "pseudo_labels": PredictedLabels(alignment=3.0),
        "dropout": 0.2,
    }

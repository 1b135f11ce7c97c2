"""The benchmark of encoders: each beside itself on the same splits, validation chooses the setting of CSG2L."""

import csv
import json
import sys

import pytest

import benchmarks.graph_runs as graph_runs
from benchmarks import graph_encoders, graph_settings
from lightning_modules import CSG2L, NodeClassifier

HEAD = ("phase", "dataset", "labels", "encoder", "method", "seed", "val", "test")


def rows_of(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(HEAD)
        writer.writerows(rows)


@pytest.mark.parametrize("encoder", graph_settings.ENCODERS)
def test_every_configuration_can_be_built(encoder):
    alone = {name: arguments | {"encoder": encoder} for name, arguments in graph_encoders.ALONE.items()}
    for name, arguments in (alone | graph_encoders.candidates(encoder)).items():
        cls = CSG2L if name in graph_encoders.CANDIDATES else NodeClassifier
        made = cls(**graph_settings.module_arguments(cls.__name__, arguments))
        assert made.hparams.encoder == encoder
        for shared in graph_encoders.PLAIN:
            assert made.hparams[shared] == graph_settings.DEFAULT[shared]
    default = CSG2L(**graph_settings.module_arguments("CSG2L", graph_encoders.candidates(encoder)["default"]))
    assert default.hparams == CSG2L(encoder).hparams


def test_validation_chooses_for_each_encoder_on_cells_that_all_have(tmp_path):
    path = tmp_path / "x.csv"
    rows_of(
        path,
        [
            ("choose", "Cora", 5, "gat", "csg2l, gat: default", 3000, 0.5, 1.0),
            ("choose", "Cora", 5, "gat", "csg2l, gat: joint, balanced", 3000, 0.7, 0.0),
            ("choose", "Cora", 5, "gat", "csg2l, gat: default", 3001, 1.0, 1.0),  # joint has not been there
            ("choose", "Cora", 5, "gcn", "csg2l, gcn: default", 3000, 0.9, 0.0),
            ("final", "Cora", 5, "gat", "csg2l, gat: default", 8000, 0.99, 0.9),
        ],
    )
    assert graph_encoders.validated(path, "choose", "gat") == {"joint, balanced": 0.7, "default": 0.5}
    found = graph_encoders.finalists(path, "gat")
    assert list(found) == ["alone", "pseudo-labels", "default", "chosen"]
    assert found["chosen"] == graph_encoders.candidates("gat")["joint, balanced"]
    assert graph_encoders.finalists(path, "gcn")["chosen"] == graph_encoders.candidates("gcn")["default"]
    with pytest.raises(SystemExit, match="expected rows of --study choose for sgc"):
        graph_encoders.finalists(path, "sgc")


def test_the_studies_use_the_same_splits_for_all_and_none_of_the_other(tmp_path, monkeypatch):
    ran = []

    def run_all(rows, workers, write, stop_at, together, train):
        for row, data in rows:
            ran.append((row, data))
            write(row | {"val": 0.5 + 0.1 * ("knn" in row["method"]), "test": 0.25})

    monkeypatch.setattr(graph_runs, "run_all", run_all)
    out = tmp_path / "x.csv"
    base = ["x", "--data", str(tmp_path), "--out", str(out), "--encoders", "gat", "sgc", "--workers", "1", "--together", "1"]
    monkeypatch.setattr(sys, "argv", [*base, "--study", "choose", "--seeds", "2"])
    graph_encoders.main()
    assert len(ran) == 2 * 2 * 2 * 2 * len(graph_encoders.CANDIDATES)
    ran.clear()
    monkeypatch.setattr(sys, "argv", base)
    graph_encoders.main()
    assert len(ran) == 10 * 2 * 2 * 2 * 4
    for row, data in ran:
        assert row["phase"] == "final" and row["seed"] == row["data_seed"] >= 8000
        assert data["labels_per_class"] == row["labels"] and data["val_per_class"] == 30
        assert graph_settings.class_of(row["method"]) == ("CSG2L" if "csg2l" in row["method"] else "NodeClassifier")
    by_split = {}
    for row, _ in ran:
        by_split.setdefault((row["dataset"], row["labels"], row["seed"], row["encoder"]), []).append(row)
    assert all(len(rows) == 4 for rows in by_split.values())
    chosen = [json.loads(row["arguments"]) for row, _ in ran if row["method"].endswith("chosen")]
    assert {arguments["view"] for arguments in chosen} == {"knn"}
    ran.clear()
    graph_encoders.main()
    assert not ran

"""The benchmark of contrast and reweighting: what groups differ in, validation chooses, one run from choice to final rows."""

import csv
import json
import sys

import pytest

import benchmarks.graph_runs as graph_runs
from benchmarks import graph_contrast, graph_few, graph_settings, graph_training
from lightning_modules import CSG2L, Contrast, KnnView, PredictedLabels
from tests.helpers.graph_studies import run_here

CANDIDATES = [(group, changed) for group, candidates in graph_contrast.GROUPS.items() for changed in candidates]
TAUGHT = {"alignment": 0.0, "confident": "mean", "balanced": True, "clean": True}


@pytest.mark.parametrize(("group", "changed"), CANDIDATES)
def test_a_candidate_differs_from_the_base_in_its_group_only(group, changed):
    flat = graph_settings.DEFAULT | graph_contrast.BASE | changed
    made = CSG2L(**graph_settings.module_arguments("CSG2L", flat))
    weight, beta = flat["contrast_weight"], flat["beta"]
    assert made.view == KnnView(mix=1.0, edge_weight=1.0)
    if group in (graph_contrast.NONE, graph_contrast.LABELLED):
        assert made.contrast == Contrast(weight=0.0)
    else:
        assert weight > 0 and (beta == 0) == (group == graph_contrast.WITHOUT)
        shown = {"temperature": flat["temperature"], "form": flat.get("form", "multi_positive")}
        assert made.contrast == Contrast(weight=weight, beta=beta, **shown)
    expected = PredictedLabels(**TAUGHT, beta=changed.get("pseudo_beta", 0.0))
    assert made.pseudo_labels == expected and bool(expected.beta) == (group == graph_contrast.LABELLED)


def test_groups_have_the_same_weights_and_no_candidate_twice():
    for group in (graph_contrast.WITHOUT, graph_contrast.WITH):
        weights = [c["contrast_weight"] for c in graph_contrast.GROUPS[group]]
        assert weights[:3] == [0.3, 1.0, 3.0] and set(weights[3:]) == {1.0}
    for candidates in graph_contrast.GROUPS.values():
        assert len({json.dumps(c, sort_keys=True) for c in candidates}) == len(candidates)
    assert graph_few.METHODS["knn and edges, balanced"] == graph_contrast.BASE


def test_validation_chooses_on_the_cells_that_all_candidates_have(tmp_path):
    path, group = tmp_path / "x.csv", graph_contrast.LABELLED
    flat = [json.dumps(graph_settings.DEFAULT | graph_contrast.BASE | c) for c in graph_contrast.GROUPS[group]]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["phase", "dataset", "labels", "method", "arguments", "seed", "val", "test"])
        cells = (("Cora", 3, (0.5, 0.7, 0.6, 0.6)), ("CiteSeer", 3, (0.6, 0.5, 0.7, 0.5)), ("Cora", 5, (0.99,)))
        for dataset, labels, values in cells:
            for arguments, value in zip(flat, values, strict=False):
                writer.writerow(["choose", dataset, labels, graph_few.PREFIX + group, arguments, 3000, value, 1 - value])
                writer.writerow(["final", dataset, labels, graph_few.PREFIX + group, arguments, 6000, 1 - value, value])
    assert graph_contrast.best(path, group) == {"pseudo_beta": 1.0}
    assert graph_contrast.best(path, graph_contrast.NONE) == {}
    with pytest.raises(SystemExit, match=r"no candidates of 'contrast with R': run --study choose first"):
        graph_contrast.best(path, graph_contrast.WITH)


def test_a_study_from_the_choice_to_its_rows(tmp_path, monkeypatch, capsys):
    """A second time nothing is run."""
    wine = {"wine": {"source": "wine", "num_val": 10}}
    monkeypatch.setattr(graph_contrast, "sources", lambda root: wine)
    monkeypatch.setattr(graph_few, "VAL_PER_CLASS", 5)
    monkeypatch.setattr(graph_training, "MAX_EPOCHS", 20)
    monkeypatch.setattr(graph_contrast, "BASE", graph_contrast.BASE | {"hidden_channels": 8, "warmup_epochs": 4})
    few = {group: candidates[:2] for group, candidates in graph_contrast.GROUPS.items()}
    monkeypatch.setattr(graph_contrast, "GROUPS", few)

    monkeypatch.setattr(graph_runs, "run_all", run_here)
    command = ["x", "--data", str(tmp_path), "--out", str(tmp_path / "x.csv"), "--datasets", "wine", "--seeds", "1"]
    for study in ("choose", "final", "final"):
        monkeypatch.setattr(sys, "argv", [*command, "--study", study])
        graph_contrast.main()
    rows = graph_runs.read(tmp_path / "x.csv")
    assert [row["phase"] for row in rows] == ["choose"] * 2 * 7 + ["final"] * 3 * 4
    final = [row for row in rows if row["phase"] == "final"]
    assert {(row["seed"], row["labels"]) for row in final} == {("6000", labels) for labels in "135"}
    assert len({row["arguments"] for row in final}) == len({row["method"] for row in final}) == 4
    assert "contrast with R" in capsys.readouterr().out

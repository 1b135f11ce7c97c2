"""The study of embeddings without labels: groups differ in R alone, validation chooses, one run from choice to final rows."""

import csv
import json
import sys

import pytest

import benchmarks.graph_runs as graph_runs
from benchmarks import graph_embeddings, graph_few, graph_settings, graph_training
from lightning_modules import CSG2L, ClusteredLabels
from tests.helpers.graph_studies import run_here

CONTRASTS = (graph_embeddings.WITHOUT, graph_embeddings.WITH)
CANDIDATES = [(group, one) for group in CONTRASTS for one in graph_embeddings.GROUPS[group][1]]


@pytest.mark.parametrize(("group", "one"), CANDIDATES)
def test_a_candidate_learns_by_the_contrast_alone(group, one):
    made = CSG2L(**graph_settings.module_arguments("CSG2L", one))
    assert not made.supervised and isinstance(made.pseudo_labels, ClusteredLabels) and made.contrast.weight == 1
    assert made.contrast.beta == float(group == graph_embeddings.WITH) and made.hparams.hidden_channels == 256


def test_groups_have_as_many_candidates_and_contrasts_differ_in_r_alone():
    without, weighed = ([one | {"beta": None} for one in graph_embeddings.GROUPS[group][1]] for group in CONTRASTS)
    assert without == weighed
    for _, known in graph_embeddings.GROUPS.values():
        assert len({json.dumps(one, sort_keys=True) for one in known}) == len(known) == 12


def test_a_study_from_the_choice_to_its_rows(tmp_path, monkeypatch, capsys):
    """The chosen contrasts are trained with the other's R as well; a second time nothing is run."""
    monkeypatch.setattr(graph_embeddings, "sources", lambda root: {"wine": {"source": "wine", "num_val": 10}})
    monkeypatch.setattr(graph_few, "VAL_PER_CLASS", 5)
    monkeypatch.setattr(graph_training, "PROBED_EPOCHS", 8)
    monkeypatch.setattr(graph_training, "PROBE_EVERY", 4)
    few = {
        group: (name, [one | {"hidden_channels": 8} for one in known[:2]])
        for group, (name, known) in graph_embeddings.GROUPS.items()
    }
    monkeypatch.setattr(graph_embeddings, "GROUPS", few)

    monkeypatch.setattr(graph_runs, "run_all", run_here)
    command = ["x", "--data", str(tmp_path), "--out", str(tmp_path / "x.csv"), "--datasets", "wine", "--seeds", "1"]
    for study in ("choose", "final", "final"):
        monkeypatch.setattr(sys, "argv", [*command, "--study", study])
        graph_embeddings.main()
    rows = graph_runs.read(tmp_path / "x.csv")
    assert [row["phase"] for row in rows] == ["choose"] * 8 + ["final"] * 6
    final = {row["method"]: json.loads(row["arguments"]) for row in rows if row["phase"] == "final"}
    for group, beta in zip(CONTRASTS, (1.0, 0.0), strict=True):
        swapped = final[f"csg2l, default: {graph_embeddings.SWAPPED[group]}"]
        assert swapped == final[f"csg2l, default: {group}"] | {"beta": beta}
    assert all(-1 <= float(row["ari"]) <= 1 and 0 <= float(row["nmi"]) <= 1 for row in rows)
    assert "contrast with R, R left out" in capsys.readouterr().out


def written(path, leave_out=()):
    """Choose rows of all candidates: the fourth of each group is the best by validation, and the worst by test."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["phase", "dataset", "labels", "method", "arguments", "seed", "val", "test"])
        for group, (_, known) in graph_embeddings.GROUPS.items():
            for n, one in enumerate(known):
                for dataset in ("Cora", "CiteSeer"):
                    if (group, n, dataset) not in leave_out:
                        value = 0.9 if n == 3 else 0.1 + 0.01 * n
                        row = ["choose", dataset, 20, graph_embeddings.named(group), json.dumps(one), 3000, value, 1 - value]
                        writer.writerow(row)
    return path


def test_validation_chooses_and_only_where_all_candidates_are_there(tmp_path):
    found = dict(graph_embeddings.finalists(written(tmp_path / "x.csv")))
    for group, (_, known) in graph_embeddings.GROUPS.items():
        assert found[graph_embeddings.named(group)] == known[3]
    cut_short = written(tmp_path / "y.csv", [("dgi", 7, "CiteSeer")])
    with pytest.raises(
        SystemExit, match=r"lacks choose rows of 'dgi', \{'hidden_channels': 512.*: run --study choose to its end"
    ):
        graph_embeddings.finalists(cut_short)
    with pytest.raises(SystemExit, match=r"lacks choose rows of 'contrast without R'"):
        graph_embeddings.finalists(tmp_path / "nothing.csv")

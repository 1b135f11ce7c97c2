"""The benchmark of poisoned edges: each graph once, every method on the same ones, validation chooses."""

import csv
import json
import sys
import time

import pytest

import benchmarks.graph_runs as graph_runs
import lightning_modules
from benchmarks import graph_attack, graph_attack_tables, graph_few, graph_settings, graph_training
from lightning_modules import PurifiedView
from tests.helpers.graph_studies import run_here

SMALL = {"source": "wine", "num_val": 10}
CONFIGURATIONS = {
    **graph_attack.METHODS,
    **{f"{name} {i}": c for name, choices in graph_attack.CHOICES.items() for i, c in enumerate(choices)},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_configuration_can_be_built(name):
    arguments, threshold = graph_attack.split_off(CONFIGURATIONS[name])
    cls = graph_settings.class_of(name)
    made = getattr(lightning_modules, cls)(**graph_settings.module_arguments(cls, arguments))
    assert threshold == "" or 0 <= threshold < 1
    assert isinstance(getattr(made, "local_view", None), PurifiedView) == ("svd" in name or "purified" in name)
    if "beta" in name:
        assert made.pseudo_labels.beta == arguments["pseudo_beta"] != 0


def test_each_graph_is_attacked_once_and_the_same_for_all_methods():
    methods = {("Cora", attack): list(graph_attack.METHODS.items()) for attack in graph_attack.ATTACKS}
    rows = graph_attack.tasks("final", {"Cora": {"source": "Cora"}}, methods, range(5000, 5003))
    assert len(rows) == 3 * len(methods) * len(graph_attack.METHODS)
    graphs = graph_attack.attacked(rows)
    assert [(g["seed"], g["attack_share"], g.get("attack_surrogate")) for g in graphs] == [
        (seed, *rest) for seed in (5000, 5001, 5002) for rest in ((0.1, None), (0.25, None), (0.25, "low_rank"))
    ]
    assert all("drop_dissimilar" not in graph and graph["edge_attack"] == "prbcd" for graph in graphs)
    dropped = [(row["method"], data) for row, data in rows if "drop_dissimilar" in data]
    assert {name for name, _ in dropped} == {name for name in graph_attack.METHODS if "jaccard" in name}
    assert len(dropped) == 4 * len(methods) * 3
    assert {(data["drop_dissimilar"], name.endswith("0.05")) for name, data in dropped} == {(0.0, False), (0.05, True)}
    keys = {tuple(str(row[key]) for key in graph_attack.KEYS) for row, _ in rows}
    assert len(keys) == len(rows)


def test_validation_chooses_on_the_seeds_that_all_candidates_have(tmp_path):
    path, name = tmp_path / "x.csv", "gcn: svd, chosen rank"
    candidates = [json.dumps(graph_attack.split_off(c)[0]) for c in graph_attack.CHOICES[name]]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["phase", "dataset", "attack", "method", "arguments", "drop_dissimilar", "seed", "val"])
        for seed, values in (("1", (0.5, 0.7, 0.6, 0.6)), ("2", (0.6, 0.55, 0.6, 0.5)), ("3", (0.99,))):
            for arguments, value in zip(candidates, values, strict=False):
                writer.writerow(["choose", "Cora", "none", name, arguments, "", seed, value])
                writer.writerow(["choose", "Cora", "dice 25 %", name, arguments, "", seed, 1 - value])
                writer.writerow(["final", "Cora", "none", name, arguments, "", seed, 1 - value])
    assert graph_attack.best(path, "Cora", "none", name)["purified_rank"] == 20
    assert graph_attack.best(path, "Cora", "dice 25 %", name)["purified_rank"] in (10, 100)
    with pytest.raises(SystemExit, match=r"no candidates of .* on CiteSeer, none: run --study choose first"):
        graph_attack.best(path, "CiteSeer", "none", name)


def test_thresholds_are_told_apart(tmp_path):
    path, name = tmp_path / "x.csv", "gcn: jaccard, chosen threshold"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["phase", "dataset", "attack", "method", "arguments", "drop_dissimilar", "seed", "val"])
        for configuration, value in zip(graph_attack.CHOICES[name], (0.1, 0.3, 0.2), strict=True):
            arguments, threshold = graph_attack.split_off(configuration)
            writer.writerow(["choose", "Cora", "none", name, json.dumps(arguments), threshold, 1, value])
    assert graph_attack.best(path, "Cora", "none", name)["drop_dissimilar"] == 0.02


def test_a_study_from_the_first_attack_to_its_rows(tmp_path, monkeypatch, capsys):
    """Candidates, then the final study with the one that was chosen; a second time nothing is run."""
    monkeypatch.setattr(graph_attack, "sources", lambda root: {"wine": SMALL | {"root": str(root)}})
    monkeypatch.setattr(graph_few, "VAL_PER_CLASS", 5)
    monkeypatch.setattr(graph_training, "MAX_EPOCHS", 20)
    small = {"encoder": "gcn", "hidden_channels": 8}
    monkeypatch.setattr(graph_attack, "METHODS", {"gcn": small})
    monkeypatch.setattr(graph_attack, "CHOICES", {"gcn: svd": [small | {"purified_rank": rank} for rank in (2, 20)]})
    attacks = []
    monkeypatch.setattr(graph_attack, "prepare_all", lambda graphs, workers, stop_at: attacks.append(graphs))

    monkeypatch.setattr(graph_runs, "run_all", run_here)
    command = ["x", "--data", str(tmp_path), "--out", str(tmp_path / "x.csv"), "--datasets", "wine", "--seeds", "2"]
    command += ["--attacks", "none", "dice 25 %"]
    for study in ("choose", "final", "final"):
        monkeypatch.setattr(sys, "argv", [*command, "--study", study])
        graph_attack.main()
    rows = graph_runs.read(tmp_path / "x.csv")
    assert [row["phase"] for row in rows] == ["choose"] * 8 + ["final"] * 8 and attacks == [[], [], []]
    assert {row["seed"] for row in rows if row["phase"] == "final"} == {"5000", "5001"}
    assert "wine  dice 25 %  gcn: svd" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", [*command, "--study", "choose", "--methods", "gcn"])
        graph_attack.main()


def test_graphs_are_set_up_in_processes_and_what_fails_is_told(tmp_path, capfd):
    good = {"source": "karate", "root": str(tmp_path), "labels_per_class": 2, "num_val": 10, "num_test": -1}
    good |= {"edge_attack": "prbcd", "attack_share": 0.1}
    graph_runs.prepare_all([good, good | {"source": "nothing"}], 1, time.time() + 1e6)
    assert len(list((tmp_path / "attacks").glob("karate-prbcd-gcn-0.1-0-*.safetensors"))) == 1
    printed = capfd.readouterr().out
    assert printed.count("failed:") == 1 and "'nothing'" in printed


def test_tables_have_accuracies_and_paired_differences(monkeypatch):
    ours, other = graph_attack_tables.OURS[0], "csg2l, default: some other"
    tests = {("gcn", "none"): (0.7, 0.8), (ours, "none"): (0.8, 0.7), (ours, "prbcd 25 %"): (0.6,), (other, "none"): (0.5, 0.5)}
    facts = {"phase": "final", "dataset": "Cora", "hardware": "x", "torch": "1", "torch_geometric": "2"}
    rows = [facts | {"method": method, "attack": attack, "seed": str(seed), "test": str(test)}
            for (method, attack), values in tests.items() for seed, test in enumerate(values)]  # fmt: skip
    rows.append(rows[0] | {"phase": "choose", "test": "0.0"})
    monkeypatch.setattr(graph_attack_tables, "read", lambda name: rows)
    lines = graph_attack_tables.poisoned().split("\n")
    assert lines[0] == "| Cora | none | prbcd 25 % |"
    assert lines[2:5] == [
        "| gcn | 75.0 ± 63.5 (2) |  |",  # 12.706, t of one degree of freedom, times a standard error of 5
        f"| {ours} | 75.0 ± 63.5 (2) |  |",
        f"| {other} | 50.0 ± 0.0 (2) |  |",
    ]
    (difference,) = [line for line in lines if "−" in line]
    assert difference == "| knn, balanced − gcn | +0.0 ± 127.1 (2) |  |  |  |"  # +10 and -10: a standard error of 10

"""benchmarks.graph_tables: what is paired and pooled, against sums written out here."""

import math
import statistics

from benchmarks import graph_tables
from benchmarks.markdown import read


def test_differences_are_paired_and_pooled_over_the_seeds_that_have_all_cells():
    found = {
        ("ours", "Cora"): {0: 80.0, 1: 82.0, 2: 84.0, 3: 10.0},
        ("gcn", "Cora"): {0: 79.0, 1: 79.0, 2: 79.0},
        ("ours", "CiteSeer"): {0: 70.0, 1: 70.0, 2: 73.0, 3: 10.0},
        ("gcn", "CiteSeer"): {0: 70.0, 1: 71.0, 3: 70.0},
    }
    values = graph_tables.seed_means(found, "ours", "gcn", [("Cora",), ("CiteSeer",)])
    assert values == [0.5, 1.0]  # (1 + 0) / 2 and (3 - 1) / 2; of seeds 2 and 3 a cell is missing
    half = 12.706 * statistics.stdev(values) / math.sqrt(2)  # t of one degree of freedom
    assert graph_tables.gain(values) == f"+0.8 ± {half:.1f}" and graph_tables.gain(values, counted=True).endswith(" (2)")
    assert graph_tables.gain([0.5]) == "" == graph_tables.gain(graph_tables.seed_means(found, "ours", "gat", [("Cora",)]))


def test_six_rows_are_means_over_data_sets():
    """GCN's line from the rows of the file, without what makes the table."""
    wanted = {"Cora", "CiteSeer", "acm"}
    rows = [row for row in read("csg2l_robust.csv") if row["phase"] == "final" and row["dataset"] in wanted]
    accuracy = {(r["method"], r["dataset"], r["labels"], float(r["noise"]), r["seed"]): 100 * float(r["test"]) for r in rows}
    expected = []
    for labels, noises in ((("1", "3", "5"), (0,)), (("1", "3", "5"), (0.2, 0.5)), (("1",), (0,)), (("20",), (0,))):
        keys = {key[1:] for key in accuracy if key[0] == "gcn" and key[2] in labels and key[3] in noises}
        by_seed = {seed: [k for k in keys if k[3] == seed] for seed in {k[3] for k in keys}}
        assert {len(of_one) for of_one in by_seed.values()} == {3 * len(labels) * len(noises)}
        means = [
            sum(accuracy[("csg2l, default", *k)] - accuracy[("gcn", *k)] for k in of_one) / len(of_one)
            for of_one in by_seed.values()
        ]
        assert len(means) == 10
        expected.append(f"{statistics.mean(means):+.1f} ± {2.2622 * statistics.stdev(means) / math.sqrt(10):.1f}")
    lines = graph_tables.gains().split("\n")
    assert lines[2] == f"| gcn | {' | '.join(expected)} |"
    assert [line.split("| ")[1].strip() for line in lines[2:8]] == list(graph_tables.RIVALS) and lines[8] == ""
    assert "over 10 seeds" in lines[9]


def test_public_splits_have_a_line_for_each_pair_that_is_there(monkeypatch):
    facts = {"hardware": "x", "torch": "1", "torch_geometric": "2", "phase": "final"}
    tests = {
        ("appnp", "Cora"): (0.82, 0.84),
        ("csg2l, appnp, balanced", "Cora"): (0.83, 0.83),
        ("csg2l, appnp, balanced", "CiteSeer"): (0.7,),  # cut short
    }
    rows = [facts | {"method": method, "dataset": dataset, "seed": str(seed), "test": str(test)}
            for (method, dataset), values in tests.items() for seed, test in enumerate(values)]  # fmt: skip
    monkeypatch.setattr(graph_tables, "read", lambda name: rows)
    lines = graph_tables.quality().split("\n")
    assert lines[2:5] == [
        "| appnp | 83.0 ± 1.4 |  |",
        "| csg2l, appnp, balanced | 83.0 ± 0.0 |  |",
        "| csg2l, appnp, balanced − appnp | +0.0 ± 12.7 |  |",  # +1 and -1: a standard error of 1, t of one degree of freedom
    ]
    assert lines[5] == ""

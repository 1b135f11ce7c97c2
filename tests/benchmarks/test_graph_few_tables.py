"""benchmarks.graph_few_tables: what stands in a table of few labels, against numbers written out here."""

import itertools

import pytest

from benchmarks import graph_few_tables, graph_iceberg

FACTS = {"hardware": "x", "torch": "1", "torch_geometric": "2"}


@pytest.mark.parametrize("there", [False, True])
def test_fresh_splits_have_a_table_once_they_are_run(there, monkeypatch):
    facts = FACTS | {"dataset": "texas", "phase": "fresh"}
    names = ("csg2l, default: mlp alone", "csg2l, default: edges")
    rows = [facts | {"method": name, "seed": str(seed), "test": str(0.5 + 0.1 * seed - 0.1 * i * (1 + seed))}
            for i, name in enumerate(names) for seed in (0, 1)]  # fmt: skip
    monkeypatch.setattr(graph_few_tables, "read", lambda name: rows * there)
    text = graph_few_tables.unlike("fresh", "splits", "graph_few --study fresh")
    if there:  # 40 and 40 against 50 and 60: -10 and -20, whose standard error is 5
        assert "| edges | 40.0 (-15.0 ± 63.5) |" in text and "| mlp alone | 55.0 |" in text and "mean of 2 splits" in text
    else:
        assert text == "No rows yet: `python -m benchmarks.graph_few --study fresh`."


def test_the_choice_has_validation_accuracies_the_best_first(monkeypatch):
    values = {"knn and edges, balanced": (0.7, 0.8), "decoupled, knn and edges": (0.9, 0.8), "unknown": (1.0, 1.0)}
    rows = [FACTS | {"phase": "choose", "method": graph_few_tables.PREFIX + name, "dataset": dataset, "labels": labels,
                     "seed": str(seed), "val": str(value), "test": "0"}
            for name, both in values.items() for seed, value in enumerate(both)
            for dataset in ("Cora", "CiteSeer") for labels in ("3", "5")]  # fmt: skip
    rows += [row | {"method": graph_few_tables.PREFIX + "knn and edges, balanced: sgc"} for row in rows[:4]]  # cut short
    rows += [row | {"method": graph_few_tables.PREFIX + "all words, knn", "val": "1"} for row in rows[:8]]  # of the other study
    monkeypatch.setattr(graph_few_tables, "read", lambda name: rows)
    lines = graph_few_tables.choice("choose").split("\n")
    assert lines[2:4] == [
        "| decoupled, knn and edges | 85.0 | 85.0 | 85.0 | 85.0 | 85.00 |",
        "| knn and edges, balanced | 75.0 | 75.0 | 75.0 | 75.0 | 75.00 |",
    ]
    assert lines[4] == "" and "mean of 2 splits" in lines[5]


def test_candidates_on_all_words_have_a_table_with_one_label(monkeypatch):
    rows = [FACTS | {"phase": "choose", "method": graph_few_tables.PREFIX + name, "dataset": dataset, "labels": labels,
                     "seed": "3000", "val": "0.5", "test": "0"}
            for name in ("all words, knn", "knn and edges, balanced")
            for dataset in ("Cora", "CiteSeer") for labels in ("1", "3", "5")]  # fmt: skip
    monkeypatch.setattr(graph_few_tables, "read", lambda name: rows)
    rows += [row | {"method": graph_few_tables.PREFIX + "all words, edges"} for row in rows[:6] if row["labels"] != "5"]
    lines = graph_few_tables.choice("choose_words").split("\n")
    assert lines[2] == "| all words, knn |" + " 50.0 |" * 6 + " 50.00 |" and lines[3] == ""


def test_ours_are_paired_with_the_published_code_where_it_has_three_splits(monkeypatch):
    theirs = [("Cora", "1", seed, 0.5 + 0.1 * seed) for seed in range(3)] + [("Cora", "5", 0, 0.9)]
    ours = [("Cora", "1", seed, 0.6) for seed in range(20)]
    rows = [FACTS | {"phase": "final", "method": method, "dataset": dataset, "labels": labels, "seed": str(seed),
                     "test": str(value)}
            for method, values in ((graph_iceberg.METHOD, theirs), (graph_few_tables.PREFIX + "all words, edges", ours))
            for dataset, labels, seed, value in values]  # fmt: skip
    monkeypatch.setattr(graph_few_tables, "read", lambda name: rows)
    lines = graph_few_tables.iceberg().split("\n")
    assert lines[0] == "|  | Cora, 1 label |"
    # 50, 60, 70: a standard error of 10 / sqrt(3), t of two degrees of freedom 4.303; differences 10, 0, -10
    assert lines[2] == "| iceberg, published code | 60.0 ± 24.8 (3) |"
    assert lines[3] == "| all words, edges − iceberg, published code | +0.0 ± 24.8 (3) |"


def test_pairs_are_pooled_over_all_labels_and_over_three_and_five(monkeypatch):
    """Ahead by 1, 2, 3 and 6 points with 1, 3, 5 and 20 labels on Cora, twice that on CiteSeer; the last split has one more."""
    rows = []
    for (dataset, times), (labels, ahead), seed in itertools.product(
        (("Cora", 1), ("CiteSeer", 2)), (("1", 1), ("3", 2), ("5", 3), ("20", 6)), range(3)
    ):
        facts = FACTS | {"phase": "final", "dataset": dataset, "labels": labels, "seed": str(seed)}
        for name, gained in (("edges", 0), ("edges, balanced", times * ahead + (seed == 2))):
            rows.append(facts | {"method": graph_few_tables.PREFIX + name, "test": str(0.5 + 0.1 * seed + gained / 100)})
    monkeypatch.setattr(graph_few_tables, "read", lambda name: rows)
    (line,) = [line for line in graph_few_tables.few().split("\n") if line.startswith("| edges, balanced − edges |")]
    assert "edges, balanced" not in graph_few_tables.few(("edges",))
    means = [cell.split(" ±")[0] for cell in line.split(" | ")[1:]]
    assert means == ["+3.3", "+6.3", "+4.8", "+2.8", "+5.3", "+4.1"]

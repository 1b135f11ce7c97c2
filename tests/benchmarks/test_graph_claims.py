"""benchmarks.graph_claims: lines of the tables are paired differences of the rows; what is not run yet is left out."""

import csv
import math
import statistics

import pytest

from benchmarks import graph_attack, graph_claims, graph_contrast, graph_few
from benchmarks.markdown import read


def line_of(text: str, name: str) -> list[str]:
    """Cells of the line of that name."""
    (line,) = [line for line in text.split("\n") if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_pairs_are_methods_of_the_studies():
    assert {name for pair in graph_claims.VIEWS for name in pair} <= graph_few.METHODS.keys()
    attacked = {name for pair in graph_claims.ATTACKED for name in pair}
    assert {graph_few.PREFIX + name for name in attacked} <= graph_attack.METHODS.keys()
    assert set(graph_claims.ATTACKS) <= graph_attack.ATTACKS.keys()


def test_a_line_of_the_views_is_that_of_the_rows():
    rows = [row for row in read("csg2l_few.csv") if row["phase"] == "final" and row["dataset"] == "Cora"]
    value = {(row["method"][16:], row["labels"], row["seed"]): 100 * float(row["test"]) for row in rows}
    differences: dict[str, list[float]] = {}
    for name, labels, seed in value:
        if name == "joint, balanced" and labels in ("3", "5") and ("dropped edges, balanced", labels, seed) in value:
            drop = value["dropped edges, balanced", labels, seed]
            differences.setdefault(seed, []).append(value[name, labels, seed] - drop)
    means = [sum(pair) / 2 for pair in differences.values() if len(pair) == 2]
    assert len(means) == 20
    mean, half = statistics.mean(means), 2.0930 * statistics.stdev(means) / math.sqrt(20)
    found = line_of(graph_claims.views().partition("\n\n")[0], "joint, balanced − dropped edges, balanced")[3]
    assert found.strip("*") == f"{mean:+.1f} ± {half:.1f} (20)" and found.startswith("**") == (abs(mean) > half)


@pytest.mark.parametrize(
    ("values", "text"),
    [([1.0, 2.0, 3.0], "+2.0 ± 2.5 (3)"), ([2.0, 2.1, 2.2], "**+2.1 ± 0.2 (3)**"), ([-2.0, -2.1, -2.2], "**-2.1 ± 0.2 (3)**"),
     ([1.0], "")],
)  # fmt: skip
def test_bold_is_what_leaves_out_zero(values, text):
    found = {("a", "x"): dict(enumerate(values)), ("b", "x"): dict.fromkeys(range(9), 0.0)}
    assert graph_claims.cell(found, "a", "b", [("x",)]) == text


def test_contrast_beside_neighbours_has_lines_once_it_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(graph_claims, "ROOT", tmp_path)
    assert graph_claims.beside_neighbours() == []
    (tmp_path / "results").mkdir()
    points = {graph_contrast.NONE: 0.0, graph_contrast.WITHOUT: 1.0, graph_contrast.WITH: 3.0}
    with (tmp_path / "results" / "csg2l_contrast.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["phase", "dataset", "labels", "method", "seed", "test"])
        for method, ahead in points.items():
            for dataset, times in (("Cora", 1), ("CiteSeer", 2)):
                for labels, seed in ((labels, seed) for labels in (1, 3, 5) for seed in (6000, 6001)):
                    test = 0.5 + times * ahead / 100 + (seed - 6000) * 0.1
                    writer.writerow(["final", dataset, labels, graph_few.PREFIX + method, seed, test])
                    writer.writerow(["choose", dataset, labels, graph_few.PREFIX + method, seed, 1 - test])
    lines = [[line[0], *(cell.strip("*")[:4] for cell in line[1:])] for line in graph_claims.beside_neighbours()]
    expected = {
        "contrast with R − contrast without R": ["+2.0", "+4.0", "", "+3.0"],
        "contrast without R − no contrast": ["+1.0", "+2.0", "", "+1.5"],
        "contrast with R − no contrast": ["+3.0", "+6.0", "", "+4.5"],
    }
    assert lines == [
        [f"knn and edges, balanced: {pair}, {labels}", *cells]
        for pair, cells in expected.items()
        for labels in ("3 and 5 labels", "1 label")
    ]


def test_every_encoder_has_a_line_and_gat_its_own_difference():
    rows = [row for row in read("csg2l_encoders.csv") if row["phase"] == "final" and row["dataset"] == "Cora"]
    value = {(row["method"], row["seed"]): 100 * float(row["test"]) for row in rows}
    seeds = [seed for name, seed in value if name == "gat"]
    mean = statistics.mean(value["csg2l, gat", seed] - value["gat", seed] for seed in seeds)
    text = graph_claims.any_encoder()
    assert line_of(text, "gat")[:2] == ["", ""] and line_of(text, "gat")[2].strip("*").startswith(f"{mean:+.1f} ± ")
    assert all(len(line_of(text, name)) == 5 for name in ("gcn", "graphsage", "gin", "appnp", "sgc", "decoupled, no contrast"))


def test_encoders_on_fresh_splits_are_compared_with_themselves():
    rows = [row for row in read("csg2l_encoders_fresh.csv") if row["phase"] == "final" and row["dataset"] == "CiteSeer"]
    value = {(row["method"], row["labels"], row["seed"]): 100 * float(row["test"]) for row in rows}
    seeds = [seed for name, count, seed in value if (name, count) == ("csg2l, gat: chosen", "5")]
    mean = statistics.mean(value["csg2l, gat: chosen", "5", seed] - value["gat: alone", "5", seed] for seed in seeds)
    found = line_of(graph_claims.fresh_encoders(), "gat, CiteSeer, 5 labels")
    assert len(found) == 4 and found[2].strip("*").startswith(f"{mean:+.1f} ± ")


def test_embeddings_with_r_are_compared_by_every_measure(monkeypatch):
    """The swapped settings, chosen against chosen, and both rivals; a method cut short is left out."""
    ahead = {
        "csg2l, default: contrast without R": 0,
        "csg2l, default: contrast with R": 3,
        "csg2l, default: contrast without R, R added": 1,
        "csg2l, default: contrast with R, R left out": 5,
        "dgi: dgi": 10,
        "grace: grace": 4,
    }
    facts = {"phase": "final", "hardware": "x", "torch": "1", "torch_geometric": "2"}
    rows = [
        facts | {"method": method, "dataset": dataset, "seed": str(seed), "test": str(0.5 + seed / 10 + points / 100),
                 "nmi": str(0.4 + seed / 10 + 2 * points / 100), "ari": str(0.3 + seed / 10 - points / 100)}
        for method, points in ahead.items() for dataset in ("Cora", "CiteSeer") for seed in (0, 1, 2)
    ]  # fmt: skip
    monkeypatch.setattr(graph_claims, "read", lambda name: [*rows, rows[0] | {"method": "csg2l, default: unfinished"}])
    text = graph_claims.embeddings()
    expected = {
        "contrast with R − contrast with R, R left out": -2,
        "contrast without R, R added − contrast without R": 1,
        "contrast with R − contrast without R": 3,
        "contrast with R − dgi": -7,
        "contrast with R − grace": -1,
    }
    for name, points in expected.items():
        means = [float(cell.strip("*").split(" ±")[0]) for cell in line_of(text, name)]
        assert means == [points, points, 2 * points, 2 * points, -points, -points]
    assert [cell.split(" ±")[0] for cell in line_of(text, "dgi")] == ["70.0", "70.0", "70.0", "70.0", "30.0", "30.0"]
    assert "unfinished" not in text and "over 3 fresh splits" in text

"""Tables of few labels and of unlike neighbours in docs/graphs.md, from results/csg2l_few.csv (python -m benchmarks.tables)."""

import statistics

from benchmarks import graph_iceberg
from benchmarks.graph_few import CHOOSING_LABELS, DATASETS, LABELS, PREFIX, STUDIES
from benchmarks.graph_tables import DEFAULT, NAMES, accuracies, gain, hardware, interval, seed_means
from benchmarks.markdown import read, table


def few(shown: tuple[str, ...] | None = None) -> str:
    """Test accuracy by second view on fresh splits with few labels, and paired differences pooled over labels and data sets.

    Args:
        shown: Names of the methods that the table has; None for all that have enough splits.
    """
    rows = [row for row in read("csg2l_few.csv") if row["phase"] == "final"]
    for row in rows:
        row["name"] = row["method"].removeprefix(f"{DEFAULT}: ")
    found = accuracies(rows, "final", "name", "dataset", "labels")
    cells = sorted({key[1:] for key in found}, key=lambda cell: (cell[0] != "Cora", int(cell[1])))
    names = [name for name in shown or dict.fromkeys(row["name"] for row in rows)
             if all(len(found.get((name, *cell), {})) >= LEAST_SPLITS for cell in cells)]  # fmt: skip
    lines = []
    for name in names:
        values = [list(found.get((name, *cell), {}).values()) for cell in cells]
        lines.append([name, *("{:.1f} ± {:.1f} ({})".format(*interval(v), len(v)) if len(v) > 1 else "" for v in values)])
    accuracy = table(["", *(f"{NAMES[dataset]}, {count}" for dataset, count in cells)], lines)
    pairs = [(name, "edges") for name in names if name != "edges"]
    pairs += [(one, other) for one, other in CONTROLS if one in names and other in names]
    lines = []
    for one, other in pairs:
        texts = []
        for counts in (LABELS, CHOOSING_LABELS):
            for datasets in (("Cora",), ("CiteSeer",), ("Cora", "CiteSeer")):
                pooled = [cell for cell in cells if cell[0] in datasets and int(cell[1]) in counts]
                texts.append(gain(seed_means(found, one, other, pooled), counted=True))
        lines.append([f"{one} − {other}", *texts])
    head = [f"{name}, {labels}" for labels in ("all labels", "3 and 5 labels") for name in ("Cora", "CiteSeer", "both")]
    note = (
        "Test accuracy in per cent by labels a class, mean ± half a 95 % interval over fresh splits (number of splits); below, "
        f"paired differences, pooled over labels. {hardware([row for row in rows if row['name'] in names])}."
    )
    return f"{accuracy}\n\n{table(['', *head], lines)}\n\n{note}"


def choice(study: str) -> str:
    """Validation accuracy of the candidates of a study that have all splits of all cells, the highest mean first."""
    candidates, labels, *_ = STUDIES[study]
    rows = [row for row in read("csg2l_few.csv") if row["phase"] == "choose"]
    rows = [row for row in rows if row["method"].removeprefix(PREFIX) in candidates]
    found: dict[str, dict[tuple[str, str], list[float]]] = {}
    for row in rows:
        cells = found.setdefault(row["method"].removeprefix(PREFIX), {})
        cells.setdefault((row["dataset"], row["labels"]), []).append(100 * float(row["val"]))
    cells = [(dataset, str(count)) for dataset in DATASETS for count in labels]
    most = max((len(values) for cells in found.values() for values in cells.values()), default=0)
    means = {
        name: [statistics.mean(found[name][cell]) for cell in cells]
        for name in candidates
        if all(len(found.get(name, {}).get(cell, [])) == most for cell in cells)
    }
    lines = [
        [name, *(f"{value:.1f}" for value in values), f"{statistics.mean(values):.2f}"]
        for name, values in sorted(means.items(), key=lambda entry: -statistics.mean(entry[1]))
    ]
    note = f"Validation accuracy in per cent, mean of {most} splits that nothing is tested on. {hardware(rows)}."
    return f"{table(['', *(f'{NAMES[dataset]}, {count}' for dataset, count in cells), 'mean'], lines)}\n\n{note}"


def iceberg() -> str:
    """Test accuracy of IceBerg's published code, and how far ours are ahead on the same splits, where it has enough of them."""
    rows = [row for row in read("csg2l_few.csv") if row["phase"] == "final"]
    found = accuracies(rows, "final", "method", "dataset", "labels")
    theirs = graph_iceberg.METHOD
    cells = [(dataset, str(count)) for count in graph_iceberg.LABELS for dataset in DATASETS]
    cells = [cell for cell in cells if len(found.get((theirs, *cell), {})) >= LEAST_SPLITS]
    if not cells:
        return "No rows yet: `python -m benchmarks.graph_iceberg`."
    shown = [list(found[(theirs, *cell)].values()) for cell in cells]
    lines = [[theirs, *("{:.1f} ± {:.1f} ({})".format(*interval(values), len(values)) for values in shown)]]
    for name in AGAINST_ICEBERG:
        gains = (gain(seed_means(found, PREFIX + name, theirs, [cell]), counted=True) for cell in cells)
        lines.append([f"{name} − {theirs}", *gains])
    note = (
        "Test accuracy in per cent, mean ± half a 95 % interval (splits). "
        f"{hardware([row for row in rows if row['method'] == theirs])}."
    )
    head = [f"{NAMES[dataset]}, {count} label{'s' * (count != '1')}" for dataset, count in cells]
    return f"{table(['', *head], lines)}\n\n{note}"


def unlike(phase: str, splits: str, command: str) -> str:
    """Test accuracy by local and other view on graphs whose neighbours differ, and paired differences to the MLP alone."""
    rows = [row for row in read("csg2l_few.csv") if row["phase"] == phase]
    if not rows:
        return f"No rows yet: `python -m benchmarks.{command}`."
    found = accuracies(rows, phase, "method", "dataset")
    datasets, lines = list(dict.fromkeys(row["dataset"] for row in rows)), []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for dataset in datasets:
            here, alone = found.get((method, dataset), {}), f"{DEFAULT}: mlp alone"
            ahead = gain(seed_means(found, method, alone, [(dataset,)])) if method != alone else ""
            cells.append((f"{statistics.mean(here.values()):.1f}" if here else "") + f" ({ahead})" * bool(ahead))
        lines.append([method.removeprefix(f"{DEFAULT}: "), *cells])
    count = len({row["seed"] for row in rows})
    note = (
        f"Test accuracy in per cent, mean of {count} {splits} (paired difference to the MLP alone, ± half a 95 % interval). "
        f"{hardware(rows)}."
    )
    return f"{table(['local view, other view', *datasets], lines)}\n\n{note}"


LEAST_SPLITS = 3
"""Methods with fewer splits in a cell are left out of the table of csg2l_few.csv."""
SHOWN = (
    "edges",
    "edges, balanced",
    "knn and edges, balanced",
    "decoupled, joint",
    "all words, edges",
    "all words, dropped edges",
    "all words, knn",
    "all words, knn and edges",
    "all words, joint",
)
"""Methods of the short table."""
CONTROLS = (
    ("joint, balanced", "dropped edges, balanced"),
    ("joint, balanced", "knn, balanced"),
    ("joint, balanced", "joint, aligned"),
    ("decoupled, joint", "decoupled, knn and edges"),
    ("decoupled, joint", "decoupled, knn"),
    ("decoupled, joint", "decoupled, edges"),
    ("decoupled, joint", "decoupled, dropped edges"),
    ("knn and edges, balanced", "edges, balanced"),
    ("knn and edges, balanced", "dropped edges, balanced"),
    ("all words, joint", "all words, edges"),
    ("all words, joint", "all words, dropped edges"),
    ("all words, joint", "all words, knn"),
    ("all words, joint", "all words, knn and edges"),
    ("all words, joint", "decoupled, joint"),
    ("all words, joint", "knn and edges, balanced"),
)
"""Pairs of csg2l_few.csv that differ in one thing; `edges, balanced` in its contrast too, the last two in more."""
AGAINST_ICEBERG = (
    "all words, edges",
    "all words, dropped edges",
    "all words, knn",
    "all words, knn and edges",
    "all words, joint",
    "decoupled, joint",
    "knn and edges, balanced",
    "edges",
)
"""Ours beside IceBerg's code; the first is what its method is in our terms."""

TABLES = {
    "graphs-few": lambda: few(SHOWN),
    "graphs-few-all": few,
    "graphs-few-choice": lambda: choice("choose"),
    "graphs-few-choice-words": lambda: choice("choose_words"),
    "graphs-iceberg": iceberg,
    "graphs-unlike": lambda: unlike("unlike", "geom-gcn splits", "graph_few --data FOLDER --study unlike"),
    "graphs-unlike-fresh": lambda: unlike(
        "unlike_fresh", "random splits of the same sizes", "graph_few --data FOLDER --study unlike_fresh"
    ),
}

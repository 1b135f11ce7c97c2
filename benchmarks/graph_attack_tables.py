"""Tables of poisoned edges in docs/graphs.md, from results/csg2l_attack.csv (python -m benchmarks.tables)."""

import itertools
from collections.abc import Sequence

from benchmarks.graph_attack import ATTACKS, DATASETS, FIRST_SEED
from benchmarks.graph_claims import cell
from benchmarks.graph_few import PREFIX
from benchmarks.graph_tables import NAMES, accuracies, hardware, interval
from benchmarks.markdown import read, table

SPLITS = 20
"""Splits that the methods were compared on first."""
OURS = tuple(
    PREFIX + name
    for name in (
        "knn, balanced",
        "knn, balanced, chosen threshold",
        "knn, balanced, jaccard",
        "knn, balanced, jaccard 0.05",
        "purified, knn",
        "decoupled, knn",
    )
)
RIVALS = ("gcn", "gcn: svd", "gcn: svd, chosen rank", "gcn: jaccard", "gcn: jaccard, chosen threshold")


def poisoned() -> str:
    """Test accuracy by method and attack, a table for each data set, and paired differences to the rivals."""
    rows = first_splits(read("csg2l_attack.csv"))
    found = accuracies(rows, "final", "method", "dataset", "attack")
    methods = methods_of(rows)
    attacks = [attack for attack in ATTACKS if any(row["attack"] == attack for row in rows)]
    tables = []
    for dataset in DATASETS:
        lines = [[method, *(shown(found, method, dataset, attack) for attack in attacks)] for method in methods]
        tables.append(table([NAMES[dataset], *attacks], lines))
    cells = [(dataset, attack) for dataset in DATASETS for attack in attacks]
    note = (
        "Test accuracy in per cent, 20 labels a class, mean ± half a 95 % interval over fresh splits (number of splits); "
        f"below, differences paired by split, bold where the interval leaves out 0. {hardware(rows)}."
    )
    return "\n\n".join([*tables, differences(found, OURS, RIVALS, cells), note])


def confirmed() -> str:
    """The same of twenty more splits, for the methods that were run on them."""
    rows = first_splits(read("csg2l_attack.csv"), later=True)
    found = accuracies(rows, "final", "method", "dataset", "attack")
    cells = [(dataset, attack) for dataset in DATASETS for attack in ATTACKS if any(row["attack"] == attack for row in rows)]
    lines = [[method, *(shown(found, method, *one) for one in cells)] for method in methods_of(rows)]
    header = ["", *(f"{NAMES[dataset]}, {attack}" for dataset, attack in cells)]
    return f"{table(header, lines)}\n\n{differences(found, OURS[1:2], RIVALS, cells)}\n\n{hardware(rows)}."


def first_splits(rows: list[dict[str, str]], later: bool = False) -> list[dict[str, str]]:
    """Return the final rows of the first twenty splits, or those of later ones."""
    return [row for row in rows if row["phase"] == "final" and (int(row["seed"]) >= FIRST_SEED + SPLITS) == later]


def methods_of(rows: list[dict[str, str]]) -> list[str]:
    """Return the methods of rows, rivals before views of CSG2L."""
    return sorted({row["method"] for row in rows}, key=lambda name: (name.startswith("csg2l"), name))


def shown(found: dict, method: str, dataset: str, attack: str) -> str:
    """Mean, interval and number of splits of a method in a cell; nothing if it was not run."""
    values = list(found.get((method, dataset, attack), {}).values())
    return "{:.1f} ± {:.1f} ({})".format(*interval(values), len(values)) if len(values) > 1 else ""


def differences(found: dict, ours: Sequence[str], rivals: Sequence[str], cells: Sequence[tuple[str, str]]) -> str:
    """Paired differences of each of ours to each rival, a column for each cell."""
    lines = []
    for one, rival in itertools.product(ours, rivals):
        texts = [cell(found, one, rival, [place]) for place in cells]
        if any(texts):
            lines.append([f"{one.removeprefix(PREFIX)} − {rival}", *texts])
    return table(["", *(f"{NAMES[dataset]}, {attack}" for dataset, attack in cells)], lines)


TABLES = {"graphs-attack": poisoned, "graphs-attack-confirmed": confirmed}

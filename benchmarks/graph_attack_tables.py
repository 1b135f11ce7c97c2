"""Tables of poisoned edges in docs/graphs.md, from results/csg2l_attack.csv (python -m benchmarks.tables)."""

from benchmarks.graph_attack import ATTACKS, DATASETS
from benchmarks.graph_claims import cell
from benchmarks.graph_few import PREFIX
from benchmarks.graph_tables import NAMES, accuracies, hardware, interval
from benchmarks.markdown import read, table

OURS = tuple(PREFIX + name for name in ("knn, balanced", "knn, balanced, chosen threshold", "purified, knn", "decoupled, knn"))
RIVALS = ("gcn", "gcn: svd", "gcn: svd, chosen rank", "gcn: jaccard", "gcn: jaccard, chosen threshold")


def poisoned() -> str:
    """Test accuracy by method and attack, a table for each data set, and paired differences to the rivals."""
    rows = [row for row in read("csg2l_attack.csv") if row["phase"] == "final"]
    found = accuracies(rows, "final", "method", "dataset", "attack")
    methods = sorted({row["method"] for row in rows}, key=lambda name: (name.startswith("csg2l"), name))
    attacks = [attack for attack in ATTACKS if any(row["attack"] == attack for row in rows)]
    tables = []
    for dataset in DATASETS:
        lines = []
        for method in methods:
            values = [list(found.get((method, dataset, attack), {}).values()) for attack in attacks]
            shown = ("{:.1f} ± {:.1f} ({})".format(*interval(v), len(v)) if len(v) > 1 else "" for v in values)
            lines.append([method, *shown])
        tables.append(table([NAMES[dataset], *attacks], lines))
    cells = [(dataset, attack) for dataset in DATASETS for attack in attacks]
    lines = []
    for ours in OURS:
        for rival in RIVALS:
            texts = [cell(found, ours, rival, [one]) for one in cells]
            if any(texts):
                lines.append([f"{ours.removeprefix(PREFIX)} − {rival}", *texts])
    note = (
        "Test accuracy in per cent, 20 labels a class, mean ± half a 95 % interval over fresh splits (number of splits); "
        f"below, differences paired by split, bold where the interval leaves out 0. {hardware(rows)}."
    )
    return "\n\n".join([*tables, table(["", *(f"{NAMES[one]}, {other}" for one, other in cells)], lines), note])


TABLES = {"graphs-attack": poisoned}

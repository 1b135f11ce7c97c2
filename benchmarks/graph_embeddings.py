"""Embeddings without labels: what R is worth in the contrast, beside DGI and GRACE -> results/csg2l_embeddings.csv.

    python -m benchmarks.graph_embeddings --data FOLDER --study choose     # candidates, on splits of their own
    python -m benchmarks.graph_embeddings --data FOLDER                    # the chosen ones, on fresh splits

A GCN of width 256 learns by the contrast alone (`supervised: false`), whose positives are nodes of one k-means cluster, with R
and without. Then a logistic regression on 20 labels a class is scored (30 validation nodes a class, all others for the test),
and NMI and ARI of k-means on all nodes. Both groups have the same twelve candidates of view, temperature and dropout; DGI has
as many of width, dropout and learning rate, GRACE of temperature, layers and learning rate. `choose` takes of each group, for
all data sets together, the one whose regression has the highest mean validation accuracy. The final study trains these on
splits that `choose` does not use. To tell R from the setting chosen with it, each of the two is trained with the other's R as
well. Embeddings are those of the best of epochs 50, 100 … 300 by validation; of a contrast from 100 on, since clusters begin
at 60. Test nodes choose nothing; rows are appended and not run again.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.graph_contrast import WITH, WITHOUT
from benchmarks.graph_few import DATASETS, KEYS, KNN, balanced
from benchmarks.graph_runs import CLUSTERED, FACTS, accuracies, add_options, ranked, run_missing, sources

COLUMNS = (*KEYS, *CLUSTERED, *FACTS)
LABELS = 20
SEEDS = {"choose": (3000, 3), "final": (9000, 20)}
"""First seed, and how many."""
BASE: dict[str, Any] = {
    "supervised": False,
    "hidden_channels": 256,
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "contrast_weight": 1.0,
}
ALIKE, WEIGHED = {"beta": 0.0}, {"beta": 1.0}
"""All pairs weigh the same, or by R."""
VIEWS: tuple[dict[str, Any], ...] = (
    {"mix": 0.2},
    KNN | {"edge_weight": 1.0},
    {"view": "drop", "drop_edges": 0.4, "drop_features": 0.4},
)
"""The low-rank view of the edges, edges and nearest neighbours by features, dropped edges."""
SWAPPED = {WITHOUT: f"{WITHOUT}, R added", WITH: f"{WITH}, R left out"}
"""Group -> what its chosen candidate is called with the other group's R."""


def grid(**values: list) -> list[dict[str, Any]]:
    """All combinations of settings."""
    return [dict(zip(values, one, strict=True)) for one in itertools.product(*values.values())]


CONTRASTS = [BASE | view | rest for view in VIEWS for rest in grid(temperature=[0.5, 1.0], dropout=[0.5, 0.8])]
GROUPS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    WITHOUT: ("csg2l, default", [one | ALIKE for one in CONTRASTS]),
    WITH: ("csg2l, default", [one | WEIGHED for one in CONTRASTS]),
    "dgi": ("dgi", grid(hidden_channels=[256, 512], dropout=[0.0, 0.2], learning_rate=[5e-4, 1e-3, 3e-3])),
    "grace": ("grace", grid(hidden_channels=[256], temperature=[0.2, 0.4, 0.7], num_layers=[2, 3], learning_rate=[5e-4, 1e-3])),
}
"""Group -> what graph_settings.py knows it by, and its candidates."""


def main() -> None:
    """Run one of the studies and print mean accuracies: of validation nodes to choose, of test nodes at last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--study", choices=list(SEEDS), default="final")
    parser.add_argument("--out", type=Path, default=Path("results/csg2l_embeddings.csv"))
    parser.add_argument("--datasets", nargs="+", default=DATASETS)
    parser.add_argument("--seeds", type=int, help="default 3 to choose, 20 at last")
    options = parser.parse_args()
    options.stop_at, study = time.time() + options.seconds, options.study
    first, count = SEEDS[study]
    seeds = range(first, first + (count if options.seeds is None else options.seeds))
    methods = candidates() if study == "choose" else finalists(options.out)
    rows = tasks(study, sources(options.data), methods, options.datasets, seeds)
    run_missing(rows, options.out, KEYS, COLUMNS, options)
    for (method, arguments), values in accuracies(options.out, study, "val" if study == "choose" else "test").items():
        print(f"{100 * mean(values.values()):6.2f} {len(values):3d}  {method}  {arguments}")


def candidates() -> list[tuple[str, dict[str, Any]]]:
    """Methods by name and configuration: all candidates of all groups."""
    return [(named(group), one) for group, (_, known) in GROUPS.items() for one in known]


def finalists(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Methods of the final study: of each group the chosen candidate, of both contrasts also with the other's R."""
    found = [(named(group), best(path, group)) for group in GROUPS]
    for group, changed in ((WITHOUT, WEIGHED), (WITH, ALIKE)):
        found.append((named(group, SWAPPED[group]), best(path, group) | changed))
    return found


def named(group: str, name: str = "") -> str:
    """Name of a group's rows, or of a variant's; it begins with what graph_settings.py knows."""
    return f"{GROUPS[group][0]}: {name or group}"


def best(path: Path, group: str) -> dict[str, Any]:
    """The candidate of the highest mean validation accuracy.

    Raises:
        SystemExit: If one of a group has not been trained on all graphs on which others have.
    """
    found, known = accuracies(path, "choose", "val"), GROUPS[group][1]
    values = {n: found.get((named(group), json.dumps(one)), {}) for n, one in enumerate(known)}
    cells = set().union(*values.values())
    missing = [known[n] for n, of_one in values.items() if not of_one or of_one.keys() != cells]
    if missing:
        raise SystemExit(f"{path} lacks choose rows of {group!r}, {missing[0]}: run --study choose to its end first.")
    return known[next(iter(ranked(values)))]


def tasks(phase: str, known: dict, methods: list[tuple[str, dict]], datasets, seeds: range) -> list[tuple[dict, dict]]:
    """Rows to be run and the data each is about, split by split."""
    found = []
    for seed, dataset, (method, arguments) in itertools.product(seeds, datasets, methods):
        row = (phase, dataset, LABELS, method, json.dumps(arguments), seed, seed)
        found.append((dict(zip(KEYS, row, strict=True)), known[dataset] | balanced(LABELS)))
    return found


if __name__ == "__main__":
    main()

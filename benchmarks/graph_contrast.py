"""What the contrast and its weights R are worth beside a view that differs from the edges -> results/csg2l_contrast.csv.

    python -m benchmarks.graph_contrast --data FOLDER --study choose     # candidates, on splits of their own
    python -m benchmarks.graph_contrast --data FOLDER                    # the chosen ones, on fresh splits

The base is "knn and edges, balanced" of graph_few.py: a GCN, whose second view is the edges joined with the 15 nearest
neighbours by features, balanced softmax on pseudo-labels, no contrast. Groups add one thing to it: the contrast with all pairs
alike (β = 0), the contrast weighed by R (β > 0), or R in the cross-entropy on pseudo-labels (`pseudo_beta`). `choose` trains
the candidates of every group with 3 and 5 labels a class; the highest mean validation accuracy over both data sets chooses one
of each group. The final study trains these and the base with 1, 3 and 5 labels a class on splits that `choose` does not use. 30
validation nodes a class, all others for the test. Test nodes choose nothing; rows are appended and not run again.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.graph_few import COLUMNS, DATASETS, KEYS, KNN, PREFIX, tasks
from benchmarks.graph_runs import accuracies, add_options, ranked, run_missing, sources
from benchmarks.graph_settings import BALANCED, DEFAULT

LABELS = {"choose": (3, 5), "final": (1, 3, 5)}
SEEDS = {"choose": (3000, 5), "final": (6000, 20)}
"""First seed, and how many."""
BASE = KNN | BALANCED | {"edge_weight": 1.0}
ALIKE = {"beta": 0.0}
"""All pairs of the contrast weigh the same."""


def contrasts(**changed: Any) -> list[dict[str, Any]]:
    """Candidates with a contrast: its weight, then temperature and form at a weight of 1, with `changed` in all of them."""
    around = [{"temperature": 0.2}, {"temperature": 1.0}, {"form": "negatives"}]
    weights = [{"contrast_weight": weight} for weight in (0.3, 1.0, 3.0)]
    return [entry | changed for entry in [*weights, *({"contrast_weight": 1.0} | one for one in around)]]


NONE, WITHOUT, WITH, LABELLED = "no contrast", "contrast without R", "contrast with R", "R in the pseudo-labels"
GROUPS: dict[str, list[dict[str, Any]]] = {
    NONE: [{}],
    WITHOUT: contrasts(**ALIKE),
    WITH: [
        *contrasts(beta=1.0),
        *({"contrast_weight": 1.0} | one for one in ({"form": "hsan"}, {"beta": 0.5}, {"beta": 2.0}, {"beta": 4.0})),
    ],
    LABELLED: [{"pseudo_beta": beta} for beta in (-4.0, -1.0, 1.0, 4.0)],
}
"""Group -> candidates, each what is different from BASE.

With β = 0, hsan is the form negatives. R has four candidates more than the contrast without it, to its advantage.
"""


def main() -> None:
    """Run one of the studies and print mean accuracies: of validation nodes to choose, of test nodes at last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--study", choices=["final", "choose"], default="final")
    parser.add_argument("--out", type=Path, default=Path("results/csg2l_contrast.csv"))
    parser.add_argument("--datasets", nargs="+", default=DATASETS)
    parser.add_argument("--labels", nargs="+", type=int, help="default 3 5 to choose, 1 3 5 at last")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--seeds", type=int, help="default 5 to choose, 20 at last")
    options = parser.parse_args()
    options.stop_at, study = time.time() + options.seconds, options.study
    first, count = SEEDS[study]
    seeds = range(first, first + (options.seeds or count))
    known, labels = sources(options.data), options.labels or LABELS[study]
    rows = []
    for method, candidates in configurations(study, options.out, options.groups):
        for changed in candidates:
            rows += tasks(study, known, {method: BASE | changed}, options.datasets, labels, seeds)
    rows.sort(key=lambda entry: entry[0]["seed"])  # split by split, so that a study cut short has whole ones
    run_missing(rows, options.out, KEYS, COLUMNS, options)
    for (method, arguments), values in accuracies(options.out, study, "val" if study == "choose" else "test").items():
        differs = {name: value for name, value in json.loads(arguments).items() if (DEFAULT | BASE).get(name) != value}
        print(f"{100 * mean(values.values()):6.2f} {len(values):3d}  {method.removeprefix(PREFIX)}  {json.dumps(differs)}")


def configurations(study: str, out: Path, groups: list[str]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Group -> candidates; in the final study of each the one that validation chose."""
    return [(group, GROUPS[group] if study == "choose" else [best(out, group)]) for group in groups]


def best(path: Path, group: str) -> dict[str, Any]:
    """The candidate of the highest mean validation accuracy over the cells that all candidates of a group have.

    Raises:
        SystemExit: If there is a choice and no cell has all of them.
    """
    candidates = GROUPS[group]
    if len(candidates) == 1:
        return candidates[0]
    found = accuracies(path, "choose", "val")
    values = {n: found.get((PREFIX + group, json.dumps(DEFAULT | BASE | one)), {}) for n, one in enumerate(candidates)}
    best_first = ranked(values)
    if not best_first:
        raise SystemExit(f"{path} has no candidates of {group!r}: run --study choose first.")
    return candidates[next(iter(best_first))]


if __name__ == "__main__":
    main()

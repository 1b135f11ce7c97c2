"""CSG2L and its baselines on the public splits, every method tuned alike -> results/csg2l.csv.

    python -m benchmarks.graph_quality --data FOLDER      # with Cora/, CiteSeer/ and npz/, as in the README

For each method and data set `--configs` random configurations (spaces in graph_runs.py) are trained once with one seed; the
one of the highest validation accuracy is trained with `--seeds` fresh seeds. Test nodes choose nothing. Rows are appended as
they come and not run again.
"""

import argparse
import json
import time
from pathlib import Path

import torch_geometric

from benchmarks.graph_runs import METHODS, configuration, default_workers, run_all, sources
from benchmarks.quality import ENVIRONMENT, append, environment

KEYS = ("phase", "dataset", "method", "arguments", "seed", "data_seed")
MEASURED = ("val", "test", "last_test", "epochs", "best_epoch", "seconds", "processes")
COLUMNS = (*KEYS, *MEASURED, *ENVIRONMENT, "torch_geometric")
TUNING_SEED, FIRST_SEED = 1000, 0
PUBLIC = ("Cora", "CiteSeer", "acm", "uai", "BlogCatalog", "flickr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/csg2l.csv"))
    parser.add_argument("--datasets", nargs="+", default=["Cora", "CiteSeer", "acm", "digits", "wine", "breast_cancer"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--configs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so many seconds")
    options = parser.parse_args()
    stop_at, known = time.time() + options.seconds, sources(options.data)
    measured = {"processes": options.workers, "torch_geometric": torch_geometric.__version__} | environment()

    def write(row: dict) -> None:
        append(options.out, row | measured, COLUMNS)

    def rows(phase: str, chosen) -> list[tuple[dict, dict]]:
        done, found = {tuple(row[key] for key in KEYS) for row in read(options.out)}, []
        for dataset in options.datasets:
            data = known[dataset] | ({"split": "public"} if dataset in PUBLIC else {})
            for method in options.methods:
                for number, (arguments, seed) in enumerate(chosen(dataset, method)):
                    # Embedded sets have no public split: a fresh split a seed.
                    drawn = 0 if dataset in PUBLIC else seed
                    row = dict(zip(KEYS, (phase, dataset, method, json.dumps(arguments), seed, drawn), strict=True))
                    if tuple(str(value) for value in row.values()) not in done:
                        found.append((number, row, data))
        # The first configuration of everything, then the second …: cut short, it is cut short for all alike.
        return [(row, data) for _, row, data in sorted(found, key=lambda entry: entry[0])]

    tuning = rows("tune", lambda _, method: [(configuration(method, n), TUNING_SEED) for n in range(options.configs)])
    run_all(tuning, options.workers, write, time.time() + 0.65 * options.seconds)
    tuned = [row for row in read(options.out) if row["phase"] == "tune"]

    def best(dataset: str, method: str):
        own = [row for row in tuned if (row["dataset"], row["method"]) == (dataset, method)]
        if not own:
            return []
        arguments = json.loads(max(own, key=lambda row: float(row["val"]))["arguments"])
        return [(arguments, FIRST_SEED + n) for n in range(options.seeds)]

    run_all(rows("final", best), options.workers, write, stop_at)


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a results file, all columns as text."""
    import csv

    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()

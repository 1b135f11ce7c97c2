"""Few labels and noisy edges: CSG2L and its baselines on random splits, every method tuned alike.

    python -m benchmarks.graph_robust --data FOLDER                      # -> results/csg2l_robust.csv
    python -m benchmarks.graph_robust --data FOLDER --study default      # -> results/csg2l_default.csv

Random, class-balanced splits with 1, 3, 5 or 20 labels a class and 500 validation nodes; 0, 20 or 50 % of the number of edges
added between nodes that have none. One configuration a method and data set: of `--configs` random ones that of the highest
mean validation accuracy over 1, 5 and 20 labels with 20 % noise. Then fresh seeds, each with a split and noise of its own,
the same for all methods. Rows are appended and not run again.

`default` scans the weight λ of the contrast in the class's default, on splits and noise of seeds that nothing else uses, and
prints the weight that validation accuracy prefers. Test nodes choose nothing.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from benchmarks.graph_runs import FACTS, add_options, read, run_missing, sources
from benchmarks.graph_settings import COMPARED, DEFAULT, METHODS, configuration

KEYS = ("phase", "dataset", "labels", "noise", "method", "arguments", "seed", "data_seed")
LABELS, NOISE = (1, 3, 5, 20), (0.0, 0.2, 0.5)
TUNED_ON = ((1, 0.2), (5, 0.2), (20, 0.2))
TUNING_SEED, FIRST_SEED = 1000, 0
VARIANTS = {
    "edge drop instead of SVD": {"view": "drop"},
    "no reweighting": {"beta": 0.0},
    "no contrast": {"contrast_weight": 0.0},
    "no pseudo-label cross-entropy": {"pseudo_weight": 0.0},
}
"""Variants of CSG2L's methods, asked for by name: --methods "csg2l, default: no reweighting"."""
DATASETS = ("Cora", "CiteSeer", "acm")
WEIGHTS, SCANNED_LABELS, SCAN_SEEDS = (0.0, 0.1, 0.3, 1.0), (1, 5, 20), range(2100, 2105)
NEAR, TOO_FAR = 0.002, 0.01
"""Accuracies nearer than NEAR are a tie; λ = 0 is chosen only if it is more than TOO_FAR better."""


def main() -> None:
    """Tune, then run every cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--study", choices=["methods", "default"], default="methods")
    parser.add_argument("--out", type=Path, help="default results/csg2l_robust.csv, or csg2l_default.csv")
    parser.add_argument("--datasets", nargs="+", default=DATASETS)
    parser.add_argument("--methods", nargs="+", default=COMPARED)
    parser.add_argument("--labels", nargs="+", type=int, default=LABELS)
    parser.add_argument("--configs", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    options.stop_at = time.time() + options.seconds
    known, columns = sources(options.data), (*KEYS, *FACTS)
    scans = options.study == "default"
    out = options.out or Path("results") / ("csg2l_default.csv" if scans else "csg2l_robust.csv")
    if scans:
        run_missing(scan(known, options.datasets), out, KEYS, columns, options)
        print(scanned(out), preferred(scanned(out)), sep="\n")
        return
    tuning = [
        task(known, "tune", dataset, labels, noise, method, configuration(method, number), TUNING_SEED)
        for number in range(options.configs)
        for dataset in options.datasets
        for method in options.methods
        if ":" not in method and (number == 0 or METHODS[method][2])
        for labels, noise in TUNED_ON
    ]
    run_missing(tuning, out, KEYS, columns, options)
    chosen = {(dataset, method): best(out, dataset, method) for dataset in options.datasets for method in options.methods}
    final = [
        task(known, "final", dataset, labels, noise, method, chosen[dataset, method], seed)
        for seed in range(FIRST_SEED, FIRST_SEED + options.seeds)
        for dataset in options.datasets
        for labels in options.labels
        for noise in NOISE
        for method in options.methods
    ]
    run_missing(final, out, KEYS, columns, options)


def task(known: dict, phase: str, dataset: str, labels: int, noise: float, method: str, arguments: dict, seed: int):
    """A row's keys and the data it is about: split and noise are drawn by its seed."""
    data = known[dataset] | {"split": "random", "labels_per_class": labels, "edge_noise": noise}
    row = (phase, dataset, labels, noise, method, json.dumps(arguments), seed, seed)
    return dict(zip(KEYS, row, strict=True)), data


def scan(known: dict, datasets: Sequence[str] = DATASETS) -> list[tuple[dict, dict]]:
    """The default with every weight of the contrast on every cell, those of one graph beside one another."""
    return [
        task(known, "scan", dataset, labels, noise, "csg2l, default", DEFAULT | {"contrast_weight": weight}, seed)
        for seed in SCAN_SEEDS
        for dataset in datasets
        for labels in SCANNED_LABELS
        for noise in NOISE
        for weight in WEIGHTS
    ]


def scanned(path: Path) -> dict[float, float]:
    """Weight of the contrast -> mean validation accuracy over all cells and seeds."""
    found: dict[float, list[float]] = {}
    for row in read(path):
        if row["phase"] == "scan":
            found.setdefault(json.loads(row["arguments"])["contrast_weight"], []).append(float(row["val"]))
    return {weight: mean(values) for weight, values in sorted(found.items())}


def preferred(accuracies: dict[float, float]) -> float:
    """The weight of the highest accuracy, in a tie the largest; 0, no contrast at all, only if that is clearly better."""
    highest = max(value for weight, value in accuracies.items() if weight)
    chosen = max(weight for weight, value in accuracies.items() if weight and value > highest - NEAR)
    return 0.0 if accuracies.get(0.0, 0.0) - accuracies[chosen] > TOO_FAR else chosen


def best(path: Path, dataset: str, method: str) -> dict:
    """The configuration of the highest mean validation accuracy among those with all cells; of a variant, its method's."""
    method, _, variant = method.partition(": ")
    scores: dict[str, list[float]] = {}
    for row in read(path):
        if (row["phase"], row["dataset"], row["method"]) == ("tune", dataset, method):
            scores.setdefault(row["arguments"], []).append(float(row["val"]))
    whole = {arguments: mean(values) for arguments, values in scores.items() if len(values) == len(TUNED_ON)}
    return json.loads(max(whole, key=whole.get)) | VARIANTS.get(variant, {})


if __name__ == "__main__":
    main()

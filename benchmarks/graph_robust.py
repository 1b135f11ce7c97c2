"""Few labels and noisy edges: CSG2L and its baselines on random splits, every method tuned alike -> results/csg2l_robust.csv.

    python -m benchmarks.graph_robust --data FOLDER

Random, class-balanced splits with 1, 3, 5 or 20 labels a class and 500 validation nodes; 0, 20 or 50 % of the number of edges
added between nodes that have none. One configuration a method and data set: of `--configs` random ones that of the highest
mean validation accuracy over 1, 5 and 20 labels with 20 % noise. Then fresh seeds, each with a split and noise of its own,
the same for all methods. Rows are appended and not run again.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean

from benchmarks.graph_runs import COMPARED, FACTS, METHODS, add_options, configuration, read, run_missing, sources

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
"""Of CSG2L's methods, asked for by name: --methods "csg2l, default: no reweighting"."""


def main() -> None:
    """Tune, then run every cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--out", type=Path, default=Path("results/csg2l_robust.csv"))
    parser.add_argument("--datasets", nargs="+", default=["Cora", "CiteSeer", "acm"])
    parser.add_argument("--methods", nargs="+", default=COMPARED)
    parser.add_argument("--labels", nargs="+", type=int, default=LABELS)
    parser.add_argument("--configs", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    options.stop_at = time.time() + options.seconds
    known, columns = sources(options.data), (*KEYS, *FACTS)

    def task(phase: str, dataset: str, labels: int, noise: float, method: str, arguments: dict, seed: int):
        data = known[dataset] | {"split": "random", "labels_per_class": labels, "edge_noise": noise}
        row = (phase, dataset, labels, noise, method, json.dumps(arguments), seed, seed)
        return dict(zip(KEYS, row, strict=True)), data

    tuning = [
        task("tune", dataset, labels, noise, method, configuration(method, number), TUNING_SEED)
        for number in range(options.configs)
        for dataset in options.datasets
        for method in options.methods
        if ":" not in method and (number == 0 or METHODS[method][2])
        for labels, noise in TUNED_ON
    ]
    run_missing(tuning, options.out, KEYS, columns, options)
    chosen = {
        (dataset, method): best(options.out, dataset, method) for dataset in options.datasets for method in options.methods
    }
    final = [
        task("final", dataset, labels, noise, method, chosen[dataset, method], seed)
        for seed in range(FIRST_SEED, FIRST_SEED + options.seeds)
        for dataset in options.datasets
        for labels in options.labels
        for noise in NOISE
        for method in options.methods
    ]
    run_missing(final, options.out, KEYS, columns, options)


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

"""Each encoder under CSG2L beside itself alone, on fresh splits -> results/csg2l_encoders_fresh.csv.

    python -m benchmarks.graph_encoders --data FOLDER --study choose     # candidates, on splits of their own
    python -m benchmarks.graph_encoders --data FOLDER                    # what was chosen, on fresh splits

Random balanced splits with 5 or 20 labels a class, 30 validation nodes a class, all others for the test. Every encoder is
trained as a plain classifier, with its own pseudo-labels, and under CSG2L: by the class's default, and by the candidate of the
highest mean validation accuracy over all graphs and labels, which `choose` finds for each encoder. All have the same width,
dropout, learning rate and weight decay. Test nodes choose nothing; rows are appended and not run again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.graph_few import DATASETS, JOINT, KNN, balanced
from benchmarks.graph_runs import EARLY, FACTS, add_options, ranked, read, run_missing, sources
from benchmarks.graph_settings import BALANCED, DEFAULT, ENCODERS

KEYS = ("phase", "dataset", "labels", "encoder", "method", "arguments", "seed", "data_seed")
COLUMNS = (*KEYS, *EARLY, *FACTS)
LABELS, CHOOSING_SEED, FIRST_SEED = (5, 20), 3000, 8000
PLAIN = {name: DEFAULT[name] for name in ("hidden_channels", "dropout", "learning_rate", "weight_decay")}
PSEUDO = {name: DEFAULT[name] for name in ("pseudo_weight", "alignment", "confident", "warmup_epochs")}
ALONE: dict[str, dict[str, Any]] = {"alone": PLAIN, "pseudo-labels": PLAIN | PSEUDO}
"""The rivals of each encoder: itself."""
CANDIDATES: dict[str, dict[str, Any]] = {
    "default": {},
    "joint, balanced": JOINT | BALANCED,
    "knn and edges, balanced": KNN | BALANCED | {"edge_weight": 1.0},
    "dropped edges, balanced": {"view": "drop"} | BALANCED,
}
"""Settings of CSG2L among which validation chooses: name -> what is different from the class's default."""
CHOSEN = "chosen"


def main() -> None:
    """Run the choice, or the final study of what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--study", choices=["final", "choose"], default="final")
    parser.add_argument("--out", type=Path, default=Path("results/csg2l_encoders_fresh.csv"))
    parser.add_argument("--datasets", nargs="+", default=DATASETS)
    parser.add_argument("--labels", nargs="+", type=int, default=LABELS)
    parser.add_argument("--encoders", nargs="+", default=ENCODERS, choices=ENCODERS)
    parser.add_argument("--seeds", type=int, help="default 10, and 4 to choose")
    options = parser.parse_args()
    options.stop_at = time.time() + options.seconds
    choosing = options.study == "choose"
    first, count = (CHOOSING_SEED, 4) if choosing else (FIRST_SEED, 10)
    seeds = range(first, first + (options.seeds or count))
    methods = {name: candidates(name) if choosing else finalists(options.out, name) for name in options.encoders}
    rows = tasks(options.study, sources(options.data), methods, options.datasets, options.labels, seeds)
    run_missing(rows, options.out, KEYS, COLUMNS, options)
    for encoder in options.encoders:
        for name, value in validated(options.out, options.study, encoder).items():
            print(f"{100 * value:.2f}  {encoder}: {name}")


def candidates(encoder: str) -> dict[str, dict[str, Any]]:
    """Configurations of CSG2L on an encoder, by name."""
    return {name: DEFAULT | {"encoder": encoder} | changed for name, changed in CANDIDATES.items()}


def finalists(path: Path, encoder: str) -> dict[str, dict[str, Any]]:
    """Configurations of the final study: the encoder alone, the default and the chosen candidate.

    Raises:
        SystemExit: If the file has no candidate of the encoder.
    """
    best_first = validated(path, "choose", encoder)
    if not best_first:
        raise SystemExit(f"Argument `out` expected rows of --study choose for {encoder} but got {path}. Run that study first.")
    alone = {name: {"encoder": encoder} | arguments for name, arguments in ALONE.items()}
    known = candidates(encoder)
    return alone | {"default": known["default"], CHOSEN: known[next(iter(best_first))]}


def tasks(phase: str, known: dict, methods: dict[str, dict[str, dict]], datasets, labels, seeds) -> list[tuple[dict, dict]]:
    """Rows to be run and the data each is about, split by split; `method` begins with what graph_settings.py knows it by."""
    found = []
    for seed in seeds:
        for dataset in datasets:
            for count in labels:
                for encoder, configurations in methods.items():
                    for name, arguments in configurations.items():
                        base = encoder if name in ALONE else f"csg2l, {encoder}"
                        row = (phase, dataset, count, encoder, f"{base}: {name}", json.dumps(arguments), seed, seed)
                        found.append((dict(zip(KEYS, row, strict=True)), known[dataset] | balanced(count)))
    return found


def validated(path: Path, phase: str, encoder: str) -> dict[str, float]:
    """Method -> mean validation accuracy over the cells that all methods of an encoder have, the best first."""
    found: dict[str, dict[tuple, float]] = {}
    for row in read(path):
        if (row["phase"], row["encoder"]) == (phase, encoder):
            cells = found.setdefault(row["method"].split(": ")[1], {})
            cells[row["dataset"], row["labels"], row["seed"]] = float(row["val"])
    return ranked(found)


if __name__ == "__main__":
    main()

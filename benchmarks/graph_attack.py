"""Poisoned edges: what views and rivals hold, on fresh splits -> results/csg2l_attack.csv.

    python -m benchmarks.graph_attack --data FOLDER --study choose     # ranks, thresholds and β, on splits of their own
    python -m benchmarks.graph_attack --data FOLDER                    # all methods, on fresh splits

Random balanced splits with 20 labels a class, 30 validation nodes a class, all other nodes for the test; the edges are attacked
before training (datamodules/graph_attacks.py). First every graph is attacked, once for all methods, and kept in FOLDER/attacks;
then every method trains on the same graphs. `choose` trains the candidates of CHOICES on splits that the final study does not
use. The final study takes of each the one of the highest mean validation accuracy on the same data set under the same attack.
Test nodes choose nothing; rows are appended and not run again.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.graph_few import DECOUPLED, JOINT, KNN, MLP, PREFIX, balanced
from benchmarks.graph_runs import EARLY, FACTS, add_options, prepare_all, ranked, read, run_missing, sources
from benchmarks.graph_settings import BALANCED, DEFAULT

KEYS = ("phase", "dataset", "labels", "attack", "method", "arguments", "drop_dissimilar", "seed", "data_seed")
COLUMNS = (*KEYS, *EARLY, *FACTS)
DATASETS, LABELS = ("Cora", "CiteSeer"), 20
CHOOSING_SEED, FIRST_SEED = 4500, 5000
PRBCD = {"edge_attack": "prbcd", "attack_share": 0.25}
ATTACKS: dict[str, dict[str, Any]] = {
    "none": {},
    "prbcd 10 %": PRBCD | {"attack_share": 0.1},
    "prbcd 25 %": PRBCD,
    "dice 25 %": {"edge_attack": "dice", "attack_share": 0.25},
    "prbcd 25 %, low rank": PRBCD | {"attack_surrogate": "low_rank"},
}
"""Name of an attack -> what GraphDataModule is given. The last one, which knows of the low-rank view, is run if asked for."""
PURIFIED, JACCARD = {"purified_rank": 20}, {"drop_dissimilar": 0.0}
PLAIN = {name: DEFAULT[name] for name in ("hidden_channels", "dropout", "learning_rate", "weight_decay")}
PSEUDO = {name: DEFAULT[name] for name in ("pseudo_weight", "alignment", "confident", "warmup_epochs")}
GCN, APPNP = ({"encoder": name} | PLAIN for name in ("gcn", "appnp"))
METHODS: dict[str, dict[str, Any]] = {
    "gcn": GCN,
    "appnp": APPNP,
    "gcn, pseudo-labels": GCN | PSEUDO,
    "gcn: svd": GCN | PURIFIED,
    "gcn: jaccard": GCN | JACCARD,
    "dgi": {},
    "grace": {},
    "csg2l, default": DEFAULT,
    **{
        PREFIX + name: DEFAULT | changed
        for name, changed in {
            "joint, balanced": JOINT | BALANCED,
            "dropped edges, balanced": {"view": "drop"} | BALANCED,
            "knn, balanced": KNN | BALANCED,
            "purified, joint": PURIFIED | JOINT | BALANCED,
            "purified, knn": PURIFIED | KNN | BALANCED,
            "purified, purified": PURIFIED | {"base": "purified", "rank": 20, "mix": 1.0} | BALANCED,
            "decoupled, joint": DECOUPLED | JOINT,
            "decoupled, dropped edges": DECOUPLED | {"view": "drop"},
            "decoupled, knn": DECOUPLED | KNN,
            "decoupled, mlp, knn": DECOUPLED | MLP | KNN,
            "decoupled, knn, jaccard": DECOUPLED | KNN | JACCARD,
            "knn, balanced, jaccard": KNN | BALANCED | JACCARD,
            "knn, balanced, jaccard 0.05": KNN | BALANCED | {"drop_dissimilar": 0.05},
        }.items()
    },
}
"""Name -> flat configuration; `drop_dissimilar` is given to the data. DGI and GRACE have the defaults of their classes.

The filter of 0.05, which validation chooses under PRBCD, was run on clean graphs alone: what it costs there.
"""
FILTERED = [{"drop_dissimilar": threshold} for threshold in (0.0, 0.02, 0.05)]
CHOICES: dict[str, list[dict[str, Any]]] = {
    "gcn: svd, chosen rank": [GCN | {"purified_rank": rank} for rank in (10, 20, 50, 100)],
    "gcn: jaccard, chosen threshold": [GCN | filtered for filtered in FILTERED],
    f"{PREFIX}knn, balanced, chosen threshold": [DEFAULT | KNN | BALANCED | filtered for filtered in FILTERED],
    f"{PREFIX}decoupled, knn, chosen threshold": [DEFAULT | DECOUPLED | KNN | filtered for filtered in FILTERED],
    f"{PREFIX}decoupled, knn, chosen beta": [
        DEFAULT | DECOUPLED | KNN | {"pseudo_beta": beta} for beta in (-4.0, -1.0, 1.0, 4.0)
    ],
}
"""Name -> candidates, of which validation chooses one for each data set and attack."""


def main() -> None:
    """Attack the graphs, then run one of the studies and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--study", choices=["final", "choose"], default="final")
    parser.add_argument("--out", type=Path, default=Path("results/csg2l_attack.csv"))
    parser.add_argument("--datasets", nargs="+", default=DATASETS)
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(ATTACKS)[:-1])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *CHOICES], help="default all")
    parser.add_argument("--seeds", type=int, help="default 20, to choose 5")
    options = parser.parse_args()
    options.stop_at, known, final = time.time() + options.seconds, sources(options.data), options.study == "final"
    count, first = (20, FIRST_SEED) if final else (5, CHOOSING_SEED)
    seeds = range(first, first + (options.seeds or count))
    names = options.methods or ([*METHODS, *CHOICES] if final else list(CHOICES))
    if not final and (fixed := [name for name in names if name not in CHOICES]):
        parser.error(f"--methods {fixed[0]!r} has no candidates to choose from: {', '.join(CHOICES)} have")
    cells = [(dataset, attack) for dataset in options.datasets for attack in options.attacks]
    methods = {cell: configurations(options.study, options.out, *cell, names) for cell in cells}
    rows = tasks(options.study, known, methods, seeds)
    prepare_all(attacked(rows), options.workers, options.stop_at)
    run_missing(rows, options.out, KEYS, COLUMNS, options)
    measure = "test" if final else "val"
    for key, values in sorted(accuracies(options.out, options.study, measure).items()):
        print(f"{100 * mean(values):6.2f} {len(values):3d}  {'  '.join(key)}")


def configurations(study: str, out: Path, dataset: str, attack: str, names: list[str]) -> list[tuple[str, dict]]:
    """Method -> configuration of a cell: to choose, all candidates; at last the chosen one."""
    if study == "choose":
        return [(name, candidate) for name in names for candidate in CHOICES[name]]
    return [(name, METHODS[name] if name in METHODS else best(out, dataset, attack, name)) for name in names]


def best(path: Path, dataset: str, attack: str, method: str) -> dict[str, Any]:
    """The candidate of the highest mean validation accuracy over the seeds that all candidates have.

    Raises:
        SystemExit: If no seed has all.
    """
    cells = [split_off(candidate) for candidate in CHOICES[method]]
    found: dict[tuple[str, str], dict[str, float]] = {(json.dumps(a), str(d)): {} for a, d in cells}
    for row in read(path):
        key = row["arguments"], row["drop_dissimilar"]
        if (row["phase"], row["dataset"], row["attack"], row["method"]) == ("choose", dataset, attack, method) and key in found:
            found[key][row["seed"]] = float(row["val"])
    best_first = ranked(found)
    if not best_first:
        raise SystemExit(f"{path} has no candidates of {method!r} on {dataset}, {attack}: run --study choose first.")
    return CHOICES[method][list(found).index(next(iter(best_first)))]


def split_off(configuration: dict[str, Any]) -> tuple[dict[str, Any], float | str]:
    """Arguments of the module, and the data's `drop_dissimilar`, empty if there is none."""
    arguments = {name: value for name, value in configuration.items() if name != "drop_dissimilar"}
    return arguments, configuration.get("drop_dissimilar", "")


def tasks(
    phase: str, known: dict, methods: dict[tuple[str, str], list[tuple[str, dict]]], seeds: range
) -> list[tuple[dict, dict]]:
    """Rows to be run and the data each is about, graph by graph."""
    found = []
    for seed in seeds:
        for (dataset, attack), chosen in methods.items():
            data = known[dataset] | balanced(LABELS) | ATTACKS[attack]
            for name, configuration in chosen:
                arguments, threshold = split_off(configuration)
                row = (phase, dataset, LABELS, attack, name, json.dumps(arguments), threshold, seed, seed)
                dropped = {} if threshold == "" else {"drop_dissimilar": threshold}
                found.append((dict(zip(KEYS, row, strict=True)), data | dropped))
    return found


def attacked(rows: list[tuple[dict, dict]]) -> list[dict[str, Any]]:
    """Graphs of the rows whose attack is kept on disk, each once."""
    found = {}
    for row, data in rows:
        if data.get("edge_attack") == "prbcd":
            graph = {name: value for name, value in data.items() if name != "drop_dissimilar"} | {"seed": row["data_seed"]}
            found[json.dumps(graph)] = graph
    return list(found.values())


def accuracies(path: Path, phase: str, measure: str) -> dict[tuple[str, ...], list[float]]:
    """Data set, attack, method (to choose, configuration too) -> accuracies of all seeds."""
    found: dict[tuple[str, ...], list[float]] = {}
    for row in read(path):
        if row["phase"] == phase:
            differs = (row["arguments"], row["drop_dissimilar"]) if phase == "choose" else ()
            found.setdefault((row["dataset"], row["attack"], row["method"], *differs), []).append(float(row[measure]))
    return found


if __name__ == "__main__":
    main()

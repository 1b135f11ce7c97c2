"""Few labels on fresh splits: which second view pays, and what the SVD adds to it -> results/csg2l_few.csv.

    python -m benchmarks.graph_few --data FOLDER --study choose     # candidates, on splits of their own
    python -m benchmarks.graph_few --data FOLDER --study choose_words     # those on all words, with 1 label too
    python -m benchmarks.graph_few --data FOLDER                    # named methods, on fresh splits
    python -m benchmarks.graph_few --data FOLDER --study unlike     # local views where neighbours differ
    python -m benchmarks.graph_few --data FOLDER --study unlike_fresh     # some of them again, on fresh splits

Random balanced splits with 1, 3, 5 or 20 labels a class, 30 validation nodes a class, all others for the test. `choose` and
`choose_words` train candidates on splits that the final study does not use, and print their mean validation accuracy. The
final study trains what METHODS names, every method on the same splits, one seed each. `unlike` takes the ten geom-gcn splits of
graphs whose neighbours differ, `unlike_fresh` random splits of the same sizes (GraphDataModule's split uniform) that nobody
looked at when the methods were made. Test nodes choose nothing; rows are appended and not run again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.graph_runs import EARLY, FACTS, add_options, ranked, read, run_missing, sources
from benchmarks.graph_settings import BALANCED, DEFAULT

KEYS = ("phase", "dataset", "labels", "method", "arguments", "seed", "data_seed")
COLUMNS = (*KEYS, *EARLY, *FACTS)
DATASETS, LABELS, VAL_PER_CLASS = ("Cora", "CiteSeer"), (1, 3, 5, 20), 30
UNLIKE_DATASETS, FOLDS = ("texas", "cornell", "wisconsin"), 10
FRESH_DATASETS = (*UNLIKE_DATASETS, "Actor")
CHOOSING_SEED, FIRST_SEED, FRESH_SEED = 3000, 4000, 7000
CHOOSING_LABELS, WORDS_LABELS = (3, 5), (1, 3, 5)
"""Labels a class that `choose` and `choose_words` look at."""
PREFIX = "csg2l, default: "
NO_CONTRAST = {"contrast_weight": 0.0}
JOINT = {"base": "joint", "mix": 1.0}
KNN = {"view": "knn", "mix": 1.0}
MLP = {"local_view": "mlp"}
UNLIKE: dict[str, dict[str, Any]] = {
    "edges": {},
    "mlp alone": MLP | NO_CONTRAST | {"fusion": "local", "pseudo_weight": 0.0},
    "mlp, edges": MLP,
    "mlp, edges, gate": MLP | {"fusion": "attention"},
    "mlp, knn": MLP | KNN | NO_CONTRAST,
    "mlp, knn, gate, no pseudo-labels": MLP | KNN | NO_CONTRAST | {"fusion": "attention", "pseudo_weight": 0.0},
    "mlp, knn, gate": MLP | KNN | NO_CONTRAST | {"fusion": "attention"},
}
"""Where neighbours differ: local view, other view."""
FRESH = {name: UNLIKE[name] for name in ("edges", "mlp alone", "mlp, knn, gate, no pseudo-labels", "mlp, knn, gate")}
"""Of them those that fresh splits judge."""
DECOUPLED = BALANCED | {"encoder": "decoupled", "hidden_channels": 256, "weight_decay": 1e-2}
WORDS = DECOUPLED | {
    "encoder_args": {"K": 20, "dimensions": None, "length": 1.0},
    "hidden_channels": 128,
    "learning_rate": 0.1,
    "weight_decay": 5e-3,
    "warmup_epochs": 0,
}
"""IceBerg's encoder and training in our terms: all words, 20 steps of propagation, a large learning rate, no warm-up."""
METHODS: dict[str, dict[str, Any]] = {
    "edges": {},
    "joint, balanced": JOINT | BALANCED,
    "dropped edges, balanced": {"view": "drop"} | BALANCED,
    "edges, balanced": BALANCED | {"contrast_weight": DEFAULT["contrast_weight"]},
    "knn and edges, balanced": KNN | BALANCED | {"edge_weight": 1.0},
    "decoupled, labels alone": DECOUPLED | {"fusion": "local", "pseudo_weight": 0.0, "balanced": False, "clean": False},
    "decoupled, dropped edges": DECOUPLED | {"view": "drop"},
    "decoupled, edges": DECOUPLED,
    "decoupled, knn": DECOUPLED | KNN,
    "decoupled, knn and edges": DECOUPLED | KNN | {"edge_weight": 1.0},
    "decoupled, joint": DECOUPLED | JOINT,
    "joint, aligned": JOINT | NO_CONTRAST,
    "knn, balanced": KNN | BALANCED,
    "all words, edges": WORDS,
    "all words, dropped edges": WORDS | {"view": "drop"},
    "all words, knn": WORDS | KNN,
    "all words, knn and edges": WORDS | KNN | {"edge_weight": 1.0},
    "all words, joint": WORDS | JOINT,
}
"""Of the final study: name -> what is different from the class's default."""
FEW, WIDER = "knn and edges, balanced", {"encoder_args": {"dimensions": 256}}


def varied(bases: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return candidates by name, "<method>: <change>", of changes in some methods; without a change the method itself."""
    return {
        f"{base}: {change}" if change else base: METHODS[base] | changed
        for base, changes in bases.items()
        for change, changed in changes.items()
    }


CANDIDATES = varied(
    {
        FEW: {
            "": {},
            "hidden 256": {"hidden_channels": 256},
            "dropout 0.8": {"dropout": 0.8},
            "weight decay 2e-3": {"weight_decay": 2e-3},
            "weight decay 5e-3": {"weight_decay": 5e-3},
            "5 neighbours": {"neighbors": 5},
            "30 neighbours": {"neighbors": 30},
            "pseudo-labels weigh 0.3": {"pseudo_weight": 0.3},
            "pseudo-labels weigh 3": {"pseudo_weight": 3.0},
            "0.8 of a class trusted": {"confident": 0.8},
            "aligned": {"alignment": 2.0},
            "no warm-up": {"warmup_epochs": 0},
            "warm-up 30": {"warmup_epochs": 30},
            "warm-up 120": {"warmup_epochs": 120},
            "sgc": {"encoder": "sgc"},
            "appnp": {"encoder": "appnp"},
            "appnp, dropout 0.8": {"encoder": "appnp", "dropout": 0.8},
            "appnp, weight decay 2e-3": {"encoder": "appnp", "weight_decay": 2e-3},
        },
        "decoupled, knn and edges": {
            "": {},
            "256 dimensions": WIDER,
            "512 dimensions": {"encoder_args": {"dimensions": 512}},
            "no warm-up": {"warmup_epochs": 0},
            "weight decay 2e-3": {"weight_decay": 2e-3},
            "256 dimensions, weight decay 2e-3": WIDER | {"weight_decay": 2e-3},
            "512 dimensions, weight decay 2e-3": {"encoder_args": {"dimensions": 512}, "weight_decay": 2e-3},
            "256 dimensions, dropout 0.8": WIDER | {"dropout": 0.8},
            "256 dimensions, K = 10": {"encoder_args": {"dimensions": 256, "K": 10}},
            "256 dimensions, K = 20": {"encoder_args": {"dimensions": 256, "K": 20}},
            "dropped edges instead": {"view": "drop"},
            "dropped edges instead, 256 dimensions": {"view": "drop"} | WIDER,
        },
    }
)
"""Of `choose`: one or two things changed in a setting on a GCN and in one on propagated features."""
WORDS_CANDIDATES = varied(
    {
        "all words, joint": {
            "": {},
            "512 dimensions": {"encoder_args": WORDS["encoder_args"] | {"dimensions": 512}},
            "length 2": {"encoder_args": WORDS["encoder_args"] | {"length": 2.0}},
            "K = 10": {"encoder_args": WORDS["encoder_args"] | {"K": 10}},
            "learning rate 0.03": {"learning_rate": 0.03},
            "weight decay 1e-3": {"weight_decay": 1e-3},
            "weight decay 2e-3": {"weight_decay": 2e-3},
            "weight decay 1e-2": {"weight_decay": 1e-2},
            "hidden 64": {"hidden_channels": 64},
            "dropout 0.3": {"dropout": 0.3},
            "warm-up 60": {"warmup_epochs": 60},
            "learning rate 0.03, hidden 64": {"learning_rate": 0.03, "hidden_channels": 64},
            "learning rate 0.03, dropout 0.3": {"learning_rate": 0.03, "dropout": 0.3},
        },
        **{f"all words, {view}": {"": {}} for view in ("knn", "knn and edges", "dropped edges", "edges")},
    }
)
"""Of `choose_words`: one or two things changed in a setting on all words, and other second views."""


STUDIES: dict[str, tuple[dict[str, dict[str, Any]], tuple[int, ...], int, int]] = {
    "final": (METHODS, LABELS, FIRST_SEED, 20),
    "choose": (CANDIDATES, CHOOSING_LABELS, CHOOSING_SEED, 10),
    "choose_words": (WORDS_CANDIDATES, WORDS_LABELS, CHOOSING_SEED, 10),
    "unlike": (UNLIKE, (), 0, FOLDS),
    "unlike_fresh": (FRESH, (), FRESH_SEED, 20),
}
"""Study -> methods, labels a class, the first seed of its splits, and how many there are."""


def main() -> None:
    """Run one of the studies and print what validation says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--study", choices=list(STUDIES), default="final")
    parser.add_argument("--out", type=Path, default=Path("results/csg2l_few.csv"))
    parser.add_argument("--datasets", nargs="+", help="default those of the study")
    parser.add_argument("--labels", nargs="+", type=int, help="default those of the study")
    parser.add_argument("--methods", nargs="+", help="default all")
    parser.add_argument("--seeds", type=int, help="default 20, to choose 10")
    options = parser.parse_args()
    options.stop_at, phase = time.time() + options.seconds, options.study.removesuffix("_words")
    methods, labels, first, count = STUDIES[options.study]
    methods = {name: methods[name] for name in options.methods or methods}
    known, seeds = sources(options.data), range(first, first + (count if options.seeds is None else options.seeds))
    if options.study == "unlike":
        rows = folds(known, methods, options.datasets or UNLIKE_DATASETS)
    elif options.study == "unlike_fresh":
        rows = uniform(known, methods, options.datasets or FRESH_DATASETS, seeds)
    else:
        rows = tasks(phase, known, methods, options.datasets or DATASETS, options.labels or labels, seeds)
    run_missing(rows, options.out, KEYS, COLUMNS, options)
    for name, value in validated(options.out, phase, list(methods)).items():
        print(f"{100 * value:.2f}  {name}")


def tasks(phase: str, known: dict, methods: dict[str, dict], datasets, labels, seeds) -> list[tuple[dict, dict]]:
    """Rows to be run and the data each is about, split by split."""
    found = []
    for seed in seeds:
        for dataset in datasets:
            for count in labels:
                for name, changed in methods.items():
                    arguments = json.dumps(DEFAULT | changed)
                    row = (phase, dataset, count, PREFIX + name, arguments, seed, seed)
                    found.append((dict(zip(KEYS, row, strict=True)), known[dataset] | balanced(count)))
    return found


def balanced(labels: int) -> dict[str, Any]:
    """What GraphDataModule is given for a random split with as many labels of each class."""
    return {"split": "random", "labels_per_class": labels, "val_per_class": VAL_PER_CLASS, "num_test": -1}


def folds(known: dict, methods: dict[str, dict], datasets) -> list[tuple[dict, dict]]:
    """Rows and data of the geom-gcn splits, fold by fold; `seed` is the fold, `labels` is empty."""
    found = []
    for fold in range(FOLDS):
        for dataset in datasets:
            for name, changed in methods.items():
                row = ("unlike", dataset, "", PREFIX + name, json.dumps(DEFAULT | changed), fold, 0)
                found.append((dict(zip(KEYS, row, strict=True)), known[dataset] | {"split": "geom-gcn", "fold": fold}))
    return found


def uniform(known: dict, methods: dict[str, dict], datasets, seeds) -> list[tuple[dict, dict]]:
    """Rows and data of random splits of the sizes of geom-gcn's, split by split; `labels` is empty."""
    found = []
    for seed in seeds:
        for dataset in datasets:
            for name, changed in methods.items():
                row = ("unlike_fresh", dataset, "", PREFIX + name, json.dumps(DEFAULT | changed), seed, seed)
                found.append((dict(zip(KEYS, row, strict=True)), known[dataset] | {"split": "uniform"}))
    return found


def validated(path: Path, phase: str, names: list[str]) -> dict[str, float]:
    """Method of ours -> mean validation accuracy over the cells that all have, the best first; without those hardly begun."""
    found: dict[str, dict[tuple, float]] = {}
    for row in read(path):
        name = row["method"].removeprefix(PREFIX)
        if row["phase"] == phase and name in names:
            found.setdefault(name, {})[row["dataset"], row["labels"], row["seed"]] = float(row["val"])
    most = max(map(len, found.values()), default=0)
    return ranked({name: values for name, values in found.items() if 2 * len(values) >= most})


if __name__ == "__main__":
    main()

"""IceBerg's published code on the splits of graph_few.py -> results/csg2l_few.csv.

    git clone https://github.com/ZhixunLEE/IceBerg ICEBERG
    python -m benchmarks.graph_iceberg --data FOLDER --code ICEBERG

"IceBerg: Debiased Self-Training for Class-Imbalanced Node Classification" (WWW 2025, arXiv 2502.06280). Its trainer, its model
on propagated features and its loss run as they are, with the settings of its run_iceberg.sh for Cora and CiteSeer, which are
those for imbalanced classes (it has none for few labels), and without imbalance; the splits are ours. It chooses the epoch by
the mean of accuracy and macro-F1 of validation nodes, which stands as `val` in its rows. Measured with commit 98bdb11.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import sys
import time
import types
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.graph_few import COLUMNS, DATASETS, FIRST_SEED, KEYS, balanced
from benchmarks.graph_runs import add_options, read, run_missing, sources
from benchmarks.graph_training import graph_on

METHOD, LABELS = "iceberg, published code", (1, 3, 5)
SETTINGS = (
    "--net Diff --patience 2000 --loss_type bs --T 20 --alpha 0.1 --lr 0.1 --feat_dim 128 --no_feat_norm --weight_decay 0.005"
)
"""Those of run_iceberg.sh."""
UNUSED = ("torch_scatter", "ogb", "ogb.nodeproppred")
"""Modules that the code imports and, with these settings, does not call."""


def main() -> None:
    """Run the code on every split that has no row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--code", type=Path, required=True, help="clone of its repository")
    parser.add_argument("--out", type=Path, default=Path("results/csg2l_few.csv"))
    parser.add_argument("--datasets", nargs="+", default=DATASETS, choices=DATASETS)
    parser.add_argument("--labels", nargs="+", type=int, default=LABELS)
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    if not (options.code / "trainer.py").is_file():
        parser.error(f"--code expected a clone of github.com/ZhixunLEE/IceBerg but {options.code} has no trainer.py")
    options.stop_at, options.together = time.time() + options.seconds, 1
    rows = tasks(sources(options.data), options.datasets, options.labels, range(FIRST_SEED, FIRST_SEED + options.seeds))
    run_missing(rows, options.out, KEYS, COLUMNS, options, functools.partial(train, options.code))
    for row in read(options.out):
        if row["method"] == METHOD:
            print(row["dataset"], row["labels"], row["seed"], row["test"])


def tasks(known: dict, datasets, labels, seeds: range) -> list[tuple[dict, dict]]:
    """Rows to be run and the data each is about: the splits of graph_few.py, words not normalised, as the settings have it."""
    found = []
    for seed in seeds:
        for dataset in datasets:
            for count in labels:
                row = ("final", dataset, count, METHOD, json.dumps({"settings": SETTINGS, "labels": count}), seed, seed)
                found.append((dict(zip(KEYS, row, strict=True)), known[dataset] | balanced(count) | {"row_normalize": False}))
    return found


def train(code: Path, runs: list[tuple]) -> list[dict[str, float] | Exception]:
    """Results of several runs, given as arguments of graph_training.Run, one after the other; of one that fails its error."""
    found: list[Any] = []
    for _, arguments, data, seed, data_seed in runs:
        try:
            found.append(_train_one(code, arguments, data, seed, data_seed))
        except Exception as error:
            found.append(error)
    return found


def _train_one(code: Path, arguments: dict[str, Any], data: dict[str, Any], seed: int, data_seed: int) -> dict[str, float]:
    batch, num_classes = graph_on(torch.device("cpu"), json.dumps({**data, "seed": data_seed}))
    start, device = time.perf_counter(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    published, options = import_published(code, arguments)

    class OnSplit(published.Trainer):
        def init_data_few(self) -> None:
            """Take the masks of our data in place of drawing some."""
            for name in ("train", "val", "test"):
                setattr(self, f"data_{name}_mask", self.data[f"{name}_mask"].clone())
            self.data_unlabel_mask = ~self.data_train_mask
            self.class_num_list = torch.full((num_classes,), options.label_per_class)

    trainer = OnSplit(options, batch.clone(), device)
    with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(torch.optim.lr_scheduler, "ReduceLROnPlateau"):
        score, accuracy, _, _ = trainer.train(seed)  # its scheduler takes no step, and asks for an argument that is gone
    return {"val": score, "test": accuracy, "seconds": time.perf_counter() - start}


def import_published(code: Path, arguments: dict[str, Any]) -> tuple[types.ModuleType, argparse.Namespace]:
    """Import its trainer, and parse the settings by its parser."""
    missing = [name for name in UNUSED if name not in sys.modules and importlib.util.find_spec(name.split(".")[0]) is None]
    sys.modules.update({name: mock.MagicMock() for name in missing})
    if str(code) not in sys.path:
        sys.path.insert(0, str(code))
    argv = ["main.py", *arguments["settings"].split(), "--imb_ratio", "1", "--label_per_class", str(arguments["labels"])]
    with mock.patch.object(sys, "argv", argv):
        options = importlib.import_module("args").parse_args()
    return importlib.import_module("trainer"), options


if __name__ == "__main__":
    main()

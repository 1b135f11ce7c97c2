"""What the studies of graphs share: many trainings in worker processes, and rows of a results file."""

import argparse
import csv
import functools
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch_geometric

from benchmarks.graph_training import train_together
from benchmarks.quality import ENVIRONMENT, append, environment

MEASURED = ("val", "test", "last_test", "epochs", "best_epoch", "seconds")
EARLY = ("any_val", "any_test")
"""Accuracies when validation may choose an epoch of the warm-up too; columns of csg2l_few.csv."""
CLUSTERED = ("nmi", "ari")
"""Of embeddings without labels: k-means clusters against the classes."""
FACTS = (*MEASURED, "processes", *ENVIRONMENT, "torch_geometric")
"""Columns of every results file of graphs, after what tells rows apart."""


def _start(counter) -> None:
    """Worker processes: one thread each, GPUs in turn."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with counter.get_lock():
        number, counter.value = counter.value, counter.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def _task(train: Callable, rows: list[tuple[dict, dict]]) -> list[dict | Exception]:
    runs = [(row["method"], json.loads(row["arguments"]), data, row["seed"], row["data_seed"]) for row, data in rows]
    found = train(runs)
    return [result if isinstance(result, Exception) else row | result for (row, _), result in zip(rows, found, strict=True)]


def run_all(
    rows: list[tuple[dict, dict]],
    workers: int,
    write,
    stop_at: float,
    together: int = 1,
    train: Callable = train_together,
) -> None:
    """Run (row, data arguments) in worker processes, `write` each result; what has not begun by `stop_at` is left out.

    `together` runs take turns in a process, on a GPU that one of them leaves idle. `train` is what trains them.
    """
    groups = [rows[first : first + together] for first in range(0, len(rows), together)]
    for group, future in _ended(functools.partial(_task, train), groups, workers, stop_at):
        for (row, _), result in zip(group, future.result(), strict=True):
            if isinstance(result, Exception):
                print("failed:", row["method"], row["dataset"], row["arguments"], repr(result), flush=True)
            else:
                write(result)


def _ended(task: Callable, entries: list, workers: int, stop_at: float) -> Iterator[tuple[Any, Future]]:
    """Run a task on entries in worker processes, and yield each with its future when it ends; after `stop_at` begin none."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(context.Value("i", 0),)) as pool:
        waiting, running = iter(entries), {}
        for entry in itertools.islice(waiting, workers):
            running[pool.submit(task, entry)] = entry
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future
                following = next(waiting, None) if time.time() < stop_at else None
                if following is not None:
                    running[pool.submit(task, following)] = following


def _prepare(data: dict[str, Any]) -> None:
    from datamodules import GraphDataModule

    GraphDataModule(**data).setup()


def prepare_all(graphs: list[dict[str, Any]], workers: int, stop_at: float) -> None:
    """Set up graphs, each given as arguments of GraphDataModule, in worker processes, for what is kept on disk.

    After `stop_at` none is begun. What fails is printed; the runs that need it fail for the same reason.
    """
    for data, future in _ended(_prepare, graphs, workers, stop_at):
        if error := future.exception():
            print("failed:", data, repr(error), flush=True)


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a results file, all columns as text."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run_missing(
    rows: list[tuple[dict, dict]],
    out: Path,
    keys: tuple[str, ...],
    columns: tuple[str, ...],
    options,
    train: Callable = train_together,
) -> None:
    """Run what a results file does not have yet, and append it with hardware and versions.

    Args:
        rows: (row, data arguments), in the order in which they are to be run.
        out: The file.
        keys: Columns that tell rows apart.
        columns: All columns.
        options: Parsed arguments of `add_options`, with `stop_at`.
        train: What trains several runs, given as arguments of Run, and returns their results.

    Raises:
        SystemExit: If the file has final rows of a method whose configuration was another.
    """
    old = read(out)
    _check_final(rows, old, keys, out)
    done = {tuple(row[key] for key in keys) for row in old}
    keyed = {tuple(str(row[key]) for key in keys): (row, data) for row, data in rows}  # a configuration can be drawn twice
    missing = [entry for key, entry in keyed.items() if key not in done]
    facts = environment() | {"processes": options.workers * options.together, "torch_geometric": torch_geometric.__version__}

    def write(row: dict) -> None:
        found = row | facts
        values = {name: found[name] for name in columns if name in found}
        rounded = {
            name: round(values[name], 4) for name in (*MEASURED, *EARLY, *CLUSTERED) if isinstance(values.get(name), float)
        }
        append(out, values | rounded, columns)

    run_all(missing, options.workers, write, options.stop_at, options.together, train)


CONFIGURED = ("arguments", "drop_dissimilar")
"""Columns of a method's configuration."""


def _check_final(rows: list[tuple[dict, dict]], old: list[dict[str, str]], keys: tuple[str, ...], out: Path) -> None:
    """Refuse to add to final rows of another choice: a table would take the mean of both."""
    apart = [key for key in keys if key not in (*CONFIGURED, "seed", "data_seed")]
    wanted = {tuple(str(row[key]) for key in apart): row for row, _ in rows if row.get("phase") == "final"}
    for row in old:
        now = wanted.get(tuple(row[key] for key in apart), row)
        for key in CONFIGURED:
            if key in keys and row[key] != str(now[key]):
                raise SystemExit(
                    f"{out} has final rows of {row['method']!r} on {row['dataset']} with {key} {row[key]}, but now it is "
                    f"{now[key]}. Remove these rows, or give another --out."
                )


def accuracies(path: Path, phase: str, measure: str) -> dict[tuple[str, str], dict[tuple[str, str, str], float]]:
    """(Method, configuration) -> (data set, labels, seed) -> a column of the rows of a phase, such as `val` or `test`."""
    found: dict[tuple[str, str], dict[tuple[str, str, str], float]] = {}
    for row in read(path):
        if row["phase"] == phase:
            values = found.setdefault((row["method"], row["arguments"]), {})
            values[row["dataset"], row["labels"], row["seed"]] = float(row[measure])
    return found


def ranked(found: dict[Any, dict[Any, float]]) -> dict[Any, float]:
    """Name -> mean over the cells that all names have, the highest first; nothing if there is no such cell."""
    cells = set.intersection(*map(set, found.values())) if found else set()
    means = {name: mean(values[cell] for cell in cells) for name, values in found.items() if cells}
    return dict(sorted(means.items(), key=lambda entry: -entry[1]))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all studies of graphs have."""
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--data", type=Path, required=True, help="folder with Cora/, CiteSeer/, texas/ …, and npz/")
    parser.add_argument("--workers", type=int, default=max(os.cpu_count() or 2, 2) // (4 if on_gpu else 1), help="processes")
    parser.add_argument("--together", type=int, default=6 if on_gpu else 1, help="runs that take turns in a process")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so many seconds")


def sources(root: Path) -> dict[str, dict[str, Any]]:
    """Data sets by name: what GraphDataModule is given. Words are not normalised where a plain GCN is better without."""
    names = ("acm", "uai", "BlogCatalog", "flickr")
    files = {name: {"source": str(root / "npz" / f"{name}.npz"), "row_normalize": False} for name in names}
    return {
        "Cora": {"source": "Cora", "root": str(root)},
        "CiteSeer": {"source": "CiteSeer", "root": str(root)},
        **{name: {"source": name, "root": str(root)} for name in ("texas", "cornell", "wisconsin", "Actor")},
        **files,
        "digits": {"source": "digits", "num_val": 300, "num_test": 1000},
        "wine": {"source": "wine", "num_val": 30, "num_test": -1, "labels_per_class": 10},
        "breast_cancer": {"source": "breast_cancer", "num_val": 100, "num_test": -1, "labels_per_class": 10},
    }

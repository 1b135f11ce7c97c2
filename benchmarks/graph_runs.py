"""What the studies of graphs share: train a method once and measure it, many of them in worker processes, rows of a file."""

import argparse
import contextlib
import copy
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

from benchmarks.graph_settings import class_of, module_arguments
from benchmarks.quality import ENVIRONMENT, append, environment

MEASURED = ("val", "test", "last_test", "epochs", "best_epoch", "seconds")
EARLY = ("any_val", "any_test")
"""Accuracies when validation may choose an epoch of the warm-up too; columns of csg2l_few.csv."""
CLUSTERED = ("nmi", "ari")
"""Of embeddings without labels: k-means clusters against the classes."""
FACTS = (*MEASURED, "processes", *ENVIRONMENT, "torch_geometric")
"""Columns of every results file of graphs, after what tells rows apart."""
MAX_EPOCHS, PATIENCE = 400, 80
PROBED_EPOCHS, PROBE_EVERY = 300, 50


class Run:
    """One training in progress. Each method takes epochs in its turn, so that small ones can share a GPU.

    The loop is the Trainer's for one whole-graph batch an epoch (tests/benchmarks/test_graph_runs.py holds them together),
    without its hooks. It ends PATIENCE epochs after the best validation accuracy, but not before pseudo-labels had as many.
    Only epochs after the warm-up are chosen, since before it there are no pseudo-labels to judge. Among equal validation
    accuracies the lower loss wins; without logits a linear probe measures every PROBE_EVERY epochs, and the chosen embeddings
    are clustered too.
    """

    def __init__(self, method: str, arguments: dict[str, Any], data: dict[str, Any], seed: int, data_seed: int = 0) -> None:
        import lightning_modules

        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        self.batch, num_classes = graph_on(device, json.dumps({**data, "seed": data_seed}))
        self.start, self.epoch = time.perf_counter(), 0
        torch.manual_seed(seed)
        name = class_of(method)
        self.module = getattr(lightning_modules, name)(**module_arguments(name, arguments))
        self.module.num_classes = num_classes
        self.module.build(self.batch, num_classes)
        self.module.to(device).train()
        self.history = torch.zeros(MAX_EPOCHS, 3, device=device)
        """Validation accuracy, negative validation loss and test accuracy of each epoch, or of each probe."""
        self.probed: list[torch.Tensor] = []
        """Embeddings (N, H) of each probe."""
        self.steps = Steps(self.module, self.batch)

    def advance(self) -> bool:
        """Train for one more epoch, and tell whether there is another."""
        if not self.module.supervised:
            return self._advance_probed()
        with self.steps.on_stream():
            self.steps.train(self.epoch)
            self.history[self.epoch] = self.steps.evaluate()
            self.epoch += 1
            if self.epoch % 20 == 0:  # looked at seldom, since looking waits for the GPU
                first = min(self.steps.phases[-1], self.epoch - 1)
                best = first + int(self.history[first : self.epoch, 0].argmax())
                return self.epoch < min(max(best, self.steps.phases[-1]) + PATIENCE, MAX_EPOCHS)
        return self.epoch < MAX_EPOCHS

    def _advance_probed(self) -> bool:
        from lightning_modules import CSG2L
        from lightning_modules.parts.node_probes import probe_predictions

        if isinstance(self.module, CSG2L) and self.module.clusters_due(self.epoch):
            self.module.take_clusters(*self.module.clustered(self._embeddings()))
        self.steps.train(self.epoch)
        self.epoch += 1
        if self.epoch % PROBE_EVERY == 0:
            whole, embeddings = copy.copy(self.batch).cpu(), self._embeddings()
            self.probed.append(embeddings)
            right = probe_predictions(embeddings, whole.y, whole.train_mask, whole.val_mask) == whole.y
            val, test = (right[mask].double().mean().item() for mask in (whole.val_mask, whole.test_mask))
            self.history[self.epoch // PROBE_EVERY - 1] = torch.tensor([val, 0.0, test])
        return self.epoch < PROBED_EPOCHS

    @torch.no_grad()
    def _embeddings(self) -> torch.Tensor:
        self.module.eval()
        found = self.module.encode(self.batch)[0].float().cpu()
        self.module.train()
        return found

    def result(self) -> dict[str, float]:
        """Accuracies at the best validation epoch after the warm-up, at the end, and at the best of all (`any`)."""
        every = 1 if self.module.supervised else PROBE_EVERY
        with self.steps.on_stream():
            history = self.history[: self.epoch // every].tolist()
        first = min(self.module.warmup_epochs // every, len(history) - 1)
        best = max(range(first, len(history)), key=lambda epoch: history[epoch][:2])
        found = {"val": history[best][0], "test": history[best][2], "last_test": history[-1][2]}
        earliest = max(history, key=lambda epoch: epoch[:2])
        found |= {"any_val": earliest[0], "any_test": earliest[2]}
        if self.probed:
            from lightning_modules.parts.node_probes import clustering_scores

            found |= clustering_scores(self.probed[best], self.batch.y.cpu(), self.module.num_classes)
        return found | {"epochs": self.epoch, "best_epoch": (best + 1) * every, "seconds": time.perf_counter() - self.start}


def train_together(runs: list[tuple]) -> list[dict[str, float] | Exception]:
    """Results of several runs, given as arguments of Run, an epoch of each in turn; of one that fails its error."""
    found: list[Any] = [None] * len(runs)
    active = {}
    for number, arguments in enumerate(runs):
        try:
            active[number] = Run(*arguments)
        except Exception as error:
            found[number] = error
    while active:
        for number, run in list(active.items()):
            try:
                if run.advance():
                    continue
                found[number] = run.result()
            except Exception as error:
                found[number] = error
            del active[number]
    return found


class Steps:
    """Training steps and evaluations of one module on one graph; on a GPU captured once and replayed where that can be done."""

    def __init__(self, module, batch) -> None:
        self.module, self.batch = module, batch
        self.optimizer = module.configure_optimizers()
        fixed_shapes = module.encoder.symmetric and not module.draws_edges
        self.captures = batch.x.is_cuda and module.supervised and fixed_shapes
        for group in self.optimizer.param_groups:
            group["capturable"] = self.captures
        self.phases = sorted({0, module.warmup_epochs})
        self.graph = self.eval_graph = None
        self.stream = torch.cuda.Stream() if self.captures else None
        if self.captures:
            self.stream.wait_stream(torch.cuda.current_stream())

    def on_stream(self):
        """Put what follows on this run's stream."""
        return torch.cuda.stream(self.stream) if self.captures else contextlib.nullcontext()

    def train(self, epoch: int) -> None:
        """Train for one epoch. A phase begins with three steps run for real, then its step is captured."""
        if not self.captures:
            return self._step(epoch)
        since = epoch - max(phase for phase in self.phases if phase <= epoch)
        if since < 3:
            return self._step(epoch)
        if since == 3:
            self.stream.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self._step(epoch)
        self.graph.replay()
        return None

    def _step(self, epoch: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.module.losses(self.batch, epoch)["loss"].backward()
        self.optimizer.step()

    def evaluate(self) -> torch.Tensor:
        """Validation accuracy, negative validation loss and test accuracy, (3,)."""
        if not self.captures:
            return self._evaluate()
        if self.eval_graph is None:
            self._evaluate()
            self.stream.synchronize()
            self.eval_graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.eval_graph, stream=self.stream):
                self.measured = self._evaluate()
        self.eval_graph.replay()
        return self.measured

    @torch.no_grad()
    def _evaluate(self) -> torch.Tensor:
        from functional.graph import masked_cross_entropy

        self.module.eval()
        logits, batch = self.module.encode(self.batch)[1].float(), self.batch
        self.module.train()
        right = (logits.argmax(1) == batch.y).float()
        val, test = ((right * mask).sum() / mask.sum() for mask in (batch.val_mask, batch.test_mask))
        return torch.stack([val, -masked_cross_entropy(logits, batch.y, batch.val_mask), test])


@functools.lru_cache(maxsize=8)
def graph_on(device: torch.device, arguments: str):
    """The graph of a GraphDataModule on a device, and its number of classes."""
    from datamodules import GraphDataModule

    module = GraphDataModule(**json.loads(arguments))
    module.setup()
    return module.data.to(device), module.num_classes


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

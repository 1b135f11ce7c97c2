"""Factors and epochs of CSG2L, timed on this machine's CPU or GPU -> results/csg2l_speed.csv.

    python -m benchmarks.graph_speed --data FOLDER

Factors of Cora's regularised adjacency against torch.svd_lowrank and scipy.sparse.linalg.svds, whose singular values are the
reference. An epoch is one of Trainer.fit, validation included, without logger; median over epochs. Of the methods of LOOPED,
which differ by an order of magnitude, it is a training step and a pass without dropout, since logs and metrics of the Trainer
take as long as the faster ones.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
import torch_geometric
from lightning.pytorch import Callback, Trainer

from benchmarks.graph_few import METHODS
from benchmarks.graph_runs import sources
from benchmarks.graph_settings import DEFAULT
from benchmarks.graph_training import Run
from benchmarks.quality import ENVIRONMENT, environment
from datamodules import GraphDataModule
from functional.graph import low_rank_factors, normalized_adjacency
from lightning_modules import CSG2L, Contrast, NodeClassifier, SvdView

LOOPED = {"csg2l, gcn": "edges", "csg2l, gcn, joint": "joint, balanced", "csg2l, decoupled": "decoupled, joint"}
"""Name in the file -> in graph_few.py; the last one is compared with the others."""
COLUMNS = ("what", "setting", "value", "unit", "threads", *ENVIRONMENT, "torch_geometric")


class Clock(Callback):
    """Seconds between the ends of epochs."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def epoch_ms(module, data: GraphDataModule, epochs: int) -> float:
    """Median time of an epoch, the first twenty left out."""
    clock, quiet = Clock(), {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=epochs, num_sanity_val_steps=0, enable_model_summary=False, callbacks=[clock], **quiet)
    trainer.fit(module, datamodule=data)
    steps = [b - a for a, b in zip(clock.ends[20:], clock.ends[21:], strict=False)]
    return 1000 * statistics.median(steps)


def loop_ms(arguments: dict, data: dict, epochs: int) -> float:
    """Median time of a training step and a pass without dropout, the warm-up and twenty epochs after it left out.

    Args:
        arguments: Flat configuration of CSG2L.
        data: Arguments of GraphDataModule.
        epochs: Number of epochs in all.
    """
    run, times = Run("csg2l, default", arguments, data, seed=0), []
    for epoch in range(epochs):
        start = time.perf_counter()
        run.steps.train(epoch)
        run.steps.evaluate()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[run.module.warmup_epochs + 20 :])


def seconds(function, repeats: int = 3) -> tuple[float, object]:
    """Shortest time of some calls, and the result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return min(times), result


def main() -> None:
    """Time everything and write the file."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.linalg import svds

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/csg2l_speed.csv"))
    parser.add_argument("--epochs", type=int, default=140)
    options = parser.parse_args()
    data = GraphDataModule("Cora", str(options.data), "public")
    data.setup()
    edges, nodes = data.data.edge_index, data.data.num_nodes
    matrix = normalized_adjacency(edges, nodes, 1.0)
    crow, col, values = (part.numpy() for part in (matrix.crow_indices(), matrix.col_indices(), matrix.values()))
    plain = csr_matrix((values, col, crow), shape=(nodes, nodes))
    rows = []

    def row(what: str, setting: str, value: float, unit: str) -> None:
        rows.append({"what": what, "setting": setting, "value": f"{value:.3g}", "unit": unit})
        print(what, setting, f"{value:.3g}", unit, flush=True)

    for rank in (20, 100, 400):
        took, exact = seconds(lambda rank=rank: svds(plain, rank, random_state=0), 1)
        reference = torch.from_numpy(exact[1].copy()).sort(descending=True).values
        row("factors of Cora, scipy svds", f"rank {rank}", took, "s")
        candidates = {
            "ours": lambda rank=rank: low_rank_factors(edges, nodes, rank).s,
            "torch.svd_lowrank, niter 2": lambda rank=rank: torch.svd_lowrank(matrix, rank, niter=2)[1],
            "torch.svd_lowrank, niter 8": lambda rank=rank: torch.svd_lowrank(matrix, rank, niter=8)[1],
        }
        for name, function in candidates.items():
            torch.manual_seed(0)
            took, found = seconds(function)
            row(f"factors of Cora, {name}", f"rank {rank}", took, "s")
            error = ((found.double() - reference).abs() / reference).max().item()
            row(f"largest relative error of a singular value, {name}", f"rank {rank}", error, "")
    for width in (64, 256):
        times = {}
        for name, make in {"gcn": NodeClassifier, "csg2l, gcn": CSG2L}.items():
            times[name] = epoch_ms(make(hidden_channels=width), data, options.epochs)
            row(f"epoch on Cora, {name}", f"width {width}", times[name], "ms")
        row("epoch of csg2l / epoch of gcn", f"width {width}", times["csg2l, gcn"] / times["gcn"], "")
        decoupled = CSG2L("decoupled", hidden_channels=width, view=SvdView("joint", mix=1.0), contrast=Contrast(weight=0.0))
        took = epoch_ms(decoupled, data, options.epochs)
        row("epoch on Cora, csg2l, decoupled", f"width {width}", took, "ms")
        row("epoch of csg2l, gcn / epoch of csg2l, decoupled", f"width {width}", times["csg2l, gcn"] / took, "")
        known, steps = sources(options.data)["Cora"] | {"split": "public"}, {}
        for name, method in LOOPED.items():
            steps[name] = loop_ms(DEFAULT | METHODS[method] | {"hidden_channels": width}, known, options.epochs)
            row(f"step and pass without dropout on Cora, {name}", f"width {width}", steps[name], "ms")
        *others, last = steps
        for name in others:
            row(f"step and pass of {name} / of {last}", f"width {width}", steps[name] / steps[last], "")
    facts = {**environment(), "threads": torch.get_num_threads(), "torch_geometric": torch_geometric.__version__}
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(entry | facts for entry in rows)


if __name__ == "__main__":
    main()

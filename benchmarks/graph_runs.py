"""Train one graph method once and measure it; many of them in worker processes (graph_quality.py, graph_robust.py)."""

import itertools
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

MAX_EPOCHS, PATIENCE = 400, 80
CSG2L_DEFAULT: dict[str, Any] = {"hidden_channels": 256, "head_channels": 64}

COMMON = {
    "learning_rate": [0.005, 0.01],
    "weight_decay": [1e-4, 5e-4, 1e-3, 3e-3],
    "dropout": [0.3, 0.5, 0.7, 0.8],
    "hidden_channels": [64, 256],
}
UNSUPERVISED = {
    "learning_rate": [5e-4, 1e-3, 3e-3],
    "weight_decay": [0.0, 1e-5, 1e-4],
    "dropout": [0.0, 0.2],
    "hidden_channels": [256, 512],
    "num_layers": [2, 3],
}
CONTRAST = {
    "rank": [50, 100, 200, 400],
    "mix": [0.1, 0.2, 0.4, 0.8],
    "contrast_weight": [0.3, 1.0, 3.0],
    "temperature": [0.2, 0.5, 1.0],
    "beta": [0.5, 1.0, 2.0],
    "confident": [0.3, 0.6, 0.8, 1.0],
    "warmup_epochs": [10, 30, 60],
    "anchors": [512],
}
PSEUDO = {"pseudo_weight": [0.1, 0.3, 1.0], "confident": [0.3, 0.6, 0.8, 1.0], "warmup_epochs": [30, 60, 100]}
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, list]]] = {
    "gcn": ("NodeClassifier", {"encoder": "gcn"}, COMMON),
    "gat": ("NodeClassifier", {"encoder": "gat"}, COMMON),
    "appnp": ("NodeClassifier", {"encoder": "appnp"}, COMMON),
    "gcn, pseudo-labels": ("NodeClassifier", {"encoder": "gcn"}, COMMON | PSEUDO),
    "dgi": ("DGI", {}, {**UNSUPERVISED, "num_layers": [2]}),
    "grace": ("GRACE", {}, UNSUPERVISED | {"temperature": [0.2, 0.4, 0.7]}),
    "csg2l, gcn": ("CSG2L", {"encoder": "gcn"}, COMMON | CONTRAST),
    "csg2l, appnp": ("CSG2L", {"encoder": "appnp"}, COMMON | CONTRAST),
    "csg2l, gcn, edge drop": ("CSG2L", {"encoder": "gcn", "view": "drop"}, COMMON | CONTRAST | {"drop_edges": [0.2, 0.4]}),
}
"""Name of a row -> class, what is fixed, and values among which the random search draws."""


def configuration(method: str, number: int) -> dict[str, Any]:
    """The number-th random configuration of a method, the same on every data set."""
    import random

    _, fixed, space = METHODS[method]
    draw = random.Random(f"{method}/{number}")
    return fixed | {name: draw.choice(values) for name, values in space.items()}


def train_once(method: str, arguments: dict[str, Any], data: dict[str, Any], seed: int, data_seed: int = 0) -> dict[str, float]:
    """Fit with early stopping on validation accuracy; accuracies of the best epoch, and of the last one."""
    import logging
    import warnings

    from lightning.pytorch import Callback, Trainer, seed_everything
    from lightning.pytorch.callbacks import EarlyStopping

    import lightning_modules
    from datamodules import GraphDataModule

    class Best(Callback):
        score, epoch, state = (-1.0, 0.0), -1, None

        def on_validation_end(self, trainer, module):
            metrics = trainer.callback_metrics  # among equal accuracies the lower loss, without a loss the later epoch
            score = (float(metrics["val/accuracy"]), -float(metrics.get("val/loss", 0.0)))
            if score >= self.score:
                state = {name: value.clone() for name, value in module.state_dict().items() if "factor_" not in name}
                self.score, self.epoch, self.state = score, trainer.current_epoch, state

    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    seed_everything(seed, verbose=False)
    cls = METHODS[method][0] if method in METHODS else "CSG2L"
    module = getattr(lightning_modules, cls)(**arguments)
    every = 1 if module.supervised else 20
    best, start = Best(), time.perf_counter()
    stop = EarlyStopping("val/accuracy", mode="max", patience=max(PATIENCE // every, 3))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=MAX_EPOCHS,
            accelerator="auto",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=every,
            default_root_dir=folder,
            callbacks=[best, stop],
        )
        graph = GraphDataModule(**data, seed=data_seed)
        trainer.fit(module, datamodule=graph)
        seconds = time.perf_counter() - start
        module.to(trainer.strategy.root_device if torch.cuda.is_available() else "cpu")
        last = test_accuracy(module)
        module.load_state_dict(best.state, strict=False)
        found = {"val": best.score[0], "test": test_accuracy(module), "last_test": last}
    return found | {"epochs": trainer.current_epoch, "best_epoch": best.epoch, "seconds": seconds}


def test_accuracy(module) -> float:
    """Share of test nodes that are right, by the logits or, without, by a linear probe."""
    from lightning_modules.node_probes import linear_probe

    embeddings, logits = module.embed_all()
    data = module.graph.to("cpu")
    if logits is None:
        return linear_probe(embeddings, data.y, data.train_mask, data.val_mask, data.test_mask)
    return float((logits.argmax(1) == data.y)[data.test_mask].float().mean())


def _task(row: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    return row | train_once(row["method"], json.loads(row["arguments"]), data, row["seed"], row["data_seed"])


def run_all(rows: list[tuple[dict, dict]], workers: int, write, stop_at: float) -> None:
    """Run (row, data arguments) in worker processes, `write` each result; what has not begun by `stop_at` is left out."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting, running = iter(rows), {}
        for row, data in itertools.islice(waiting, workers):
            running[pool.submit(_task, row, data)] = row
        while running:
            for future in as_completed(list(running)):
                row = running.pop(future)
                try:
                    write(future.result())
                except Exception as error:
                    print("failed:", row["method"], row["dataset"], row["arguments"], repr(error), flush=True)
                following = next(waiting, None) if time.time() < stop_at else None
                if following is not None:
                    running[pool.submit(_task, *following)] = following[0]
                break


def sources(root: Path) -> dict[str, dict[str, Any]]:
    """Data sets by name: what GraphDataModule is given."""
    files = {name: {"source": str(root / "npz" / f"{name}.npz")} for name in ("acm", "uai", "BlogCatalog", "flickr")}
    return {
        "Cora": {"source": "Cora", "root": str(root)},
        "CiteSeer": {"source": "CiteSeer", "root": str(root)},
        **files,
        "digits": {"source": "digits", "num_val": 300, "num_test": 1000},
        "wine": {"source": "wine", "num_val": 30, "num_test": -1, "labels_per_class": 10},
        "breast_cancer": {"source": "breast_cancer", "num_val": 100, "num_test": -1, "labels_per_class": 10},
    }


def default_workers() -> int:
    """A process a core; a small graph leaves most of a GPU idle."""
    return max((os.cpu_count() or 2) - 2, 2) if torch.cuda.is_available() else 2

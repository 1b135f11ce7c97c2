"""Script: train and measure some graph modules with so many processes, and write what was seen, for tests that compare.

python graph_runs.py DEVICES FOLDER [FOLDER OF THE RUN WHOSE WEIGHTS ARE MEASURED]
"""

import json
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load_file

from callbacks import AverageWeights, GraphMonitor
from datamodules import GraphDataModule
from lightning_modules import CSG2L, DGI, GRACE, ClusteredLabels, Contrast, NodeClassifier, PredictedLabels, SvdView

SMALL = {"hidden_channels": 16, "view": SvdView(rank=10), "contrast": Contrast(head_channels=8, anchors=32)}
LABELLED = SMALL | {"pseudo_labels": PredictedLabels(warmup_epochs=2)}
UNLABELLED = SMALL | {"pseudo_labels": ClusteredLabels(warmup_epochs=2, every=2), "supervised": False}
SAMPLED = {"batch_size": 50, "fanout": [3, 3]}
ALL_NEIGHBOURS = {"batch_size": 7, "fanout": [-1, -1, -1]}
CASES = {
    "whole": (lambda: CSG2L(**LABELLED), {}),
    "self-supervised": (lambda: CSG2L(**UNLABELLED), {}),
    "without contrast": (lambda: CSG2L(**LABELLED | {"contrast": Contrast(weight=0.0), "fusion": "concat"}), {}),
    "averaged": (lambda: CSG2L(**LABELLED | {"view": "drop"}), {}),
    "sampled classifier": (lambda: NodeClassifier(hidden_channels=16, dropout=0.0), ALL_NEIGHBOURS),
    "sampled": (lambda: CSG2L(**LABELLED, fusion="attention"), SAMPLED),
    "sampled self-supervised": (lambda: CSG2L(**UNLABELLED), SAMPLED),
    "sampled dgi": (lambda: DGI(hidden_channels=16), SAMPLED),
    "sampled grace": (lambda: GRACE(hidden_channels=16, head_channels=8), SAMPLED),
    "few seeds": (lambda: NodeClassifier(hidden_channels=16, dropout=0.0), {**ALL_NEIGHBOURS, "batch_size": 59}),
}


class Unused(NodeClassifier):
    """With a layer that the loss never sees."""

    def build(self, data, num_classes):
        super().build(data, num_classes)
        self.spare = torch.nn.Linear(2, 2)


class Watch(Callback):
    """Losses of the steps and scores of the epochs."""

    def __init__(self):
        self.losses, self.scores, self.nodes = [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.nodes.append(batch.node_ids[: batch.get("num_seeds", 0)].tolist())
        if outputs is not None:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.scores.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})


class Half(Callback):
    """A checkpoint in the middle."""

    def __init__(self, folder):
        self.path = folder / "half.ckpt"

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


def resumed(module, data, folder, common):
    """Weights of a run that goes on from the middle, each process with its own random numbers."""
    torch.manual_seed(7)
    trainer = Trainer(max_epochs=4, logger=False, **common)
    trainer.fit(module, datamodule=data, ckpt_path=folder / "half.ckpt", weights_only=True)
    return {key: value.double().sum().item() for key, value in module.state_dict().items()}


def wait_for(path, seconds=100):
    """The run whose weights are measured goes on meanwhile; its files are there whole or not at all."""
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)


def run(name, devices, folder, measured):
    make, options = CASES[name]
    seed_everything(0, verbose=False)
    data = GraphDataModule("wine", labels_per_class=5, num_val=41, num_test=60, **options)
    watch, monitored = Watch(), name == "whole"
    common = {"accelerator": "cpu", "devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
    common |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    common |= {"default_root_dir": folder, "num_sanity_val_steps": 2}
    callbacks = [
        watch,
        *[Half(folder)] * (name == "sampled"),
        *[GraphMonitor(2)] * monitored,
        *[AverageWeights(decay=0.9)] * (name == "averaged"),
    ]
    logger = TensorBoardLogger(folder, "run", "whole") if monitored else False
    trainer, module = Trainer(max_epochs=4, callbacks=callbacks, logger=logger, **common), make()
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(folder / f"{name}.ckpt")
    weights = {key: value.double().sum().item() for key, value in module.state_dict().items()}
    found = {"losses": watch.losses, "scores": watch.scores, "weights": weights, "nodes": watch.nodes}
    if name == "sampled":
        found["resumed"] = resumed(make(), data, folder, common)
    trainer, again = Trainer(logger=False, **common), make()
    path = measured / f"{name}.ckpt"
    wait_for(path)
    found["val"] = trainer.validate(again, data, ckpt_path=path, weights_only=True, verbose=False)[0]
    found["test"] = trainer.test(again, data, ckpt_path=path, weights_only=True, verbose=False)[0]
    trainer.predict(again, data, ckpt_path=path, weights_only=True, return_predictions=False)
    trainer.strategy.barrier()
    found["predictions"] = {key: value.tolist() for key, value in load_file(folder / "predictions.safetensors").items()}
    trainer.strategy.barrier()
    return found, trainer


def main(devices, folder, measured):
    found = {}
    for name in CASES:
        found[name], trainer = run(name, devices, folder, measured)
    for name, module, options in (
        ("unused", Unused(hidden_channels=4), {}),
        ("batch_size", NodeClassifier(hidden_channels=4), {"batch_size": 1}),
    ):
        trainer = Trainer(max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
                          devices=devices, strategy="ddp" if devices > 1 else "auto")  # fmt: skip
        try:
            trainer.fit(module, datamodule=GraphDataModule("wine", num_val=41, num_test=60, **options))
            found[name] = None
        except ValueError as error:
            found[name] = str(error)
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    main(int(sys.argv[1]), folder, Path(sys.argv[3]) if len(sys.argv) > 3 else folder)

"""Script: train without interruption; train, be killed by SIGKILL, and go on from last.ckpt; say where weights differ.

python resumed_runs.py FOLDER
"""

import json
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from callbacks import AverageWeights
from datamodules import GraphDataModule, ImageDataModule
from lightning_modules import (
    CSG2L,
    DGI,
    ClusteredLabels,
    Contrast,
    ImageClassifier,
    NodeClassifier,
    PredictedLabels,
    SvdView,
)

SMALL = {"hidden_channels": 16, "view": SvdView(rank=10), "contrast": Contrast(head_channels=8, anchors=32)}
LABELLED = SMALL | {"pseudo_labels": PredictedLabels(warmup_epochs=2)}
UNLABELLED = SMALL | {"pseudo_labels": ClusteredLabels(warmup_epochs=2, every=5), "supervised": False}
SAMPLED = {"batch_size": 50, "fanout": [3, 3]}
KILLED_IN_EPOCH = 5


def graph(**options):
    return GraphDataModule("wine", labels_per_class=5, num_val=41, num_test=60, **options)


def vision(**options):
    small = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 10}
    return ImageClassifier("deit_tiny_patch16_224", model_args=small | {"drop_path_rate": 0.3, "drop_rate": 0.1}, **options)


def digits(**options):
    augmentation = {"hflip": 0.0, "scale": [0.7, 1.0], "color_jitter": 0.2, "re_prob": 0.3, "auto_augment": "rand-m5-n1"}
    return ImageDataModule("digits", batch_size=64, crop_pct=1.0, augmentation=augmentation, **options)


CASES = {
    "whole": (lambda: (CSG2L(**LABELLED), graph()), {}),
    "self-supervised": (lambda: (CSG2L(**UNLABELLED), graph()), {}),
    "sampled": (lambda: (CSG2L(**LABELLED), graph(**SAMPLED)), {}),
    "within an epoch": (lambda: (NodeClassifier(hidden_channels=16), graph(**SAMPLED)), {"every_n_train_steps": 3}),
    "without validation": (lambda: (DGI(hidden_channels=16), graph()), {"limit_val_batches": 0}),
    "ema": (lambda: (CSG2L(**LABELLED), graph()), {"callback": lambda: AverageWeights(decay=0.8)}),
    "swa": (lambda: (CSG2L(**LABELLED), graph(**SAMPLED)), {"callback": lambda: AverageWeights(decay=None)}),
    "images": (lambda: (vision(mixup=0.3, cutmix=0.5), digits()), {"limit_train_batches": 5}),
    "images without validation": (lambda: (vision(), digits()), {"limit_train_batches": 5, "limit_val_batches": 0}),
    "images, saved after validation": (
        lambda: (vision(), digits()),
        {"limit_train_batches": 3, "limit_val_batches": 2, "save_on_train_epoch_end": False},
    ),
    "images, worker": (lambda: (vision(), digits(num_workers=1)), {"limit_train_batches": 3, "limit_val_batches": 2}),
    "images, ema": (
        lambda: (vision(), digits()),
        {"limit_train_batches": 3, "callback": lambda: EMAWeightAveraging(decay=0.8)},
    ),
}


class Kill(Callback):
    """Ends the process at once, as a power cut would."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == KILLED_IN_EPOCH:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(name, folder, *callbacks, resume=False):
    make, settings = CASES[name]
    settings = dict(settings)
    callback = settings.pop("callback", None)
    when = {key: settings.pop(key) for key in ("every_n_train_steps", "save_on_train_epoch_end") if key in settings}
    seed_everything(0, workers=True, verbose=False)
    module, data = make()
    checkpoint = ModelCheckpoint(folder, save_last=True, **when)
    trainer = Trainer(
        max_epochs=8,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoint, *callbacks, *([callback()] if callback else [])],
        **settings,
    )
    trainer.fit(module, datamodule=data, ckpt_path=folder / "last.ckpt" if resume else None, weights_only=True)
    return module.state_dict()


def compare(folder, name):
    """One case: killed, gone on with, and left in peace."""
    place = folder / name
    child = os.fork()
    if not child:
        fit(name, place, Kill())
        os._exit(0)
    killed = os.WTERMSIG(os.waitpid(child, 0)[1])
    stored = torch.load(place / "last.ckpt", weights_only=True)
    weights = [fit(name, where, resume=resume) for where, resume in ((place, True), (folder / f"{name}, whole", False))]
    differing = [key for key, value in weights[1].items() if not torch.equal(value, weights[0][key])]
    moved = [key for key, value in weights[0].items() if not torch.equal(value, stored["state_dict"][key])]
    return {"signal": killed, "epoch": stored["epoch"], "differing": differing, "moved": moved}


def main(folder):
    """Two cases at a time."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        found = dict(zip(CASES, pool.map(partial(compare, folder), CASES), strict=True))
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

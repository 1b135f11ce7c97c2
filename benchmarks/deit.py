"""DeiT-Tiny on Tiny-ImageNet: every method x sparsity x number of calibration images x seed -> results/deit_tiny_imagenet.csv.

    python -m benchmarks.deit --data ../shared/data/tiny-imagenet-200

Calibration images come from the folder `calib` (training images); as many as `--heldout` others of it judge settings and the
perplexity rule, and the validation images are only reported. `--study` runs the choice of λ, s and the number of images that
the attention rule looks at; the defaults come from its held-out columns. Images are decoded once and kept.
Rows are appended as they come and not run again if they are there; `--shard 0/8` lets several processes share the work and
the file, whose seconds are then no timings (column `processes`).
"""

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader

from benchmarks.quality import ENVIRONMENT, append, environment, finished
from callbacks import AttentionRule, BlockwisePruning, Diagnostics, FixedRule, Score
from datamodules import ImageDataModule
from lightning_modules import ImageClassifier

MODEL = {"img_size": 64, "patch_size": 8, "num_classes": 200}
METHODS = {name: {"method": name} for name in ("magnitude", "wanda", "sparsegpt", "d2_sparsegpt")} | {
    **{f"d2prune, {role} held": {"update_rule": FixedRule(role)} for role in "qkv"},
    "d2prune, outlier": {"update_rule": "outlier"},
    "d2prune, perplexity": {"update_rule": "perplexity"},
    "d2prune, attention": {},
    "d2prune, attention, block reference": {"reference": "block"},
    "d2prune, attention, 4 candidates, block reference": {"candidates": "single", "reference": "block"},
    "d2prune, attention, Eq. 12": {"candidates": "single", "objective": "divergence", "reference": "block"},
}
"""Name of a row -> arguments of BlockwisePruning; of rows with the attention rule, those of AttentionRule."""

STUDY = [
    {"lambda1": lambda1, "lambda2": lambda2, "scale": scale, "activation_norm": norm}
    for norm, scale, lambda1, lambda2 in [
        *itertools.product(["rms"], ["auto"], [0.0, 0.03, 0.1, 0.3, 1.0, 3.0], [0.0]),
        *itertools.product(["rms"], ["auto"], [0.0, 0.1, 1.0], [0.5]),
        *itertools.product(["rms"], [1500.0], [0.1, 1.0], [0.0]),
        *itertools.product(["official"], ["auto"], [0.1, 1.0], [0.0]),
    ]
]
DEFAULTS = {"lambda1": 1.0, "lambda2": 0.0, "scale": "auto", "activation_norm": "rms", "rule_windows": 4}
KEYS = ("row", "target", "images", "seed", *DEFAULTS)
MEASURED = (
    "sparsity", "heldout_loss", "heldout_top1", "val_loss", "val_top1", "val_top5", "attention_relative_error",
    "updated_q", "updated_k", "updated_v", "seconds", "processes",
)  # fmt: skip
COLUMNS = (*KEYS, *MEASURED, "seq_len", *ENVIRONMENT)


class DecodedImages(ImageDataModule):
    """An ImageDataModule whose batches are made once: val, held-out, and the calibration images of the seed asked for last."""

    kept: dict

    def setup(self, stage: str) -> None:
        """Nothing the second time."""
        if not hasattr(self, "kept"):
            super().setup(stage)
            self.kept = {}

    def train_dataloader(self) -> DataLoader:
        """The calibration batches."""
        if "train" not in self.kept:
            self.kept["train"] = list(super().train_dataloader())
        return DataLoader(self.kept["train"], batch_size=None)

    def val_dataloader(self) -> list[DataLoader]:
        """The validation and the held-out batches."""
        if "val" not in self.kept:
            self.kept["val"] = [list(loader) for loader in super().val_dataloader()]
        return [DataLoader(batches, batch_size=None) for batches in self.kept["val"]]


def settings_of(row: dict) -> dict[str, Any]:
    """Arguments of BlockwisePruning for a row; attention is measured wherever the rule goes over the blocks once."""
    settings, name = dict(METHODS[row["row"]]), row["row"]
    if name.startswith("d2prune, attention"):
        settings = {"update_rule": AttentionRule(**settings, windows=row["rule_windows"])}
    if settings.get("method", "d2prune").startswith("d2"):
        settings["score"] = Score(**{key: row[key] for key in ("lambda1", "lambda2", "scale", "activation_norm")})
    if name not in ("d2prune, perplexity", "magnitude"):
        settings["diagnostics"] = Diagnostics(attention=True, attention_maps=[])
    return settings


def measure(module: ImageClassifier, data: ImageDataModule, row: dict, dense: dict, scratch: Path) -> dict:
    """Restore the dense weights, prune as the row says, validate."""
    module.model.load_state_dict(dense)
    target = {"pattern": row["target"]} if ":" in row["target"] else {"sparsity": float(row["target"])}
    callback = BlockwisePruning(**target, **settings_of(row), output_dir=str(scratch / "pruned"))
    trainer = Trainer(
        callbacks=[callback], devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=scratch,
    )  # fmt: skip
    trainer.fit(module, data)
    records, metrics = callback.records, callback.metrics["pruned"]

    def mean(values) -> float:
        values = list(values)
        return round(sum(values) / len(values), 6)

    row = {name.replace("/", "_"): round(value, 6) for name, value in metrics.items() if "heldout/top5" not in name}
    row |= {"sparsity": mean(x.sparsity for x in records), "seconds": round(sum(x.seconds for x in records), 2)}
    if records[0].update_shares:
        row |= {f"updated_{role}": mean(x.update_shares[role] for x in records) for role in "qkv"}
    if records[0].attention:
        row["attention_relative_error"] = mean(x.attention["relative_error"] for x in records)
    return row


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder tiny-imagenet-200 with val, calib and weights")
    parser.add_argument("--output", type=Path, default=Path("results/deit_tiny_imagenet.csv"))
    parser.add_argument("--targets", nargs="+", default=["0.5", "0.6", "0.7", "0.8", "2:4"])
    parser.add_argument("--rows", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="ROW")
    parser.add_argument("--images", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--heldout", type=int, default=2000)
    parser.add_argument("--rule-windows", type=int, nargs="+", default=[128])
    parser.add_argument("--lambda1", type=float, nargs="+", default=[1.0])
    parser.add_argument("--study", action="store_true", help="the grid of λ and s instead, for the rows given")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th run, from the i-th on")
    args = parser.parse_args()
    index, count = map(int, args.shard.split("/"))
    done, facts = finished(args.output, KEYS), environment() | {"processes": count, "seq_len": 65}

    weights = args.data / "deit_tiny_patch8_64.safetensors"
    module = ImageClassifier("deit_tiny_patch16_224", checkpoint=str(weights), model_args=MODEL)
    module.configure_model()
    dense = {name: value.clone() for name, value in module.model.state_dict().items()}
    grid = STUDY if args.study else [{"lambda1": value} for value in args.lambda1]
    runs = list(itertools.product(args.images, args.seeds, args.rule_windows, args.targets, grid, args.rows))[index::count]
    loaded: tuple[int, int] | None = None
    with tempfile.TemporaryDirectory() as folder:
        kept: dict = {}
        for images, seed, windows, target, settings, name in runs:
            row = {"row": name, "target": target, "images": images, "seed": seed} | DEFAULTS | settings
            row["rule_windows"] = min(windows, images)
            if tuple(str(row[key]) for key in KEYS) in done:
                continue
            if loaded != (images, seed):
                data = DecodedImages(
                    root=str(args.data), train="calib", classes=str(args.data / "classes.tsv"), image_size=64, crop_pct=1.0,
                    num_calibration=images, num_heldout=args.heldout, seed=seed, batch_size=500,
                )  # fmt: skip
                data.setup("fit")
                if kept.get("seed") == seed:
                    data.kept["val"] = kept["val"]
                loaded = (images, seed)
            seed_everything(seed, verbose=False)
            measured = measure(module, data, row, dense, Path(folder))
            kept = {"seed": seed, "val": data.kept["val"]}
            append(args.output, row | measured | facts, COLUMNS)
            shown = {key: row[key] for key in KEYS[:6]} | measured
            print({key: value for key, value in shown.items() if "updated" not in key}, flush=True)


if __name__ == "__main__":
    main()

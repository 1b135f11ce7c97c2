"""d2prune with each allocation of zeros over blocks, and with each solver -> one row each of results/allocation.csv.

    python -m benchmarks.allocation --wikitext ../shared/data/wikitext-2
    python -m benchmarks.allocation --task deit --data ../shared/data/tiny-imagenet-200
    python -m benchmarks.allocation --wikitext ../shared/data/wikitext-2 --samples 16 --seq-len 512 --test-samples 0   (a CPU)

Defaults are chosen by the held-out columns: text, or training images, that were not calibrated on. Test perplexity and the
accuracy on validation images are only reported; `test_samples` says of how many windows or images, 0 none. Rows are appended as
they come and not run again if they are there; `--shard 0/4` lets several processes share the work and the file.
"""

import argparse
import itertools
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lightning import LightningDataModule
from lightning.pytorch import Trainer, seed_everything

from benchmarks.deit import MODEL, DecodedImages
from benchmarks.markdown import read, spread
from benchmarks.markdown import table as markdown_table
from benchmarks.quality import ENVIRONMENT, SMOLLM2, append, environment, finished, plain_wikitext
from callbacks import BlockwisePruning, Diagnostics
from datamodules import TextDataModule
from lightning_modules import CausalLM, ImageClassifier
from lightning_modules.base.prunable import PrunableModule

VARIANTS = {
    "uniform, obs": {},
    "owl, obs": {"allocation": "owl"},
    "error, obs": {"allocation": "error"},
    "uniform, admm": {"solver": "admm"},
    "owl, admm": {"allocation": "owl", "solver": "admm"},
    "error, admm": {"allocation": "error", "solver": "admm"},
}
"""Arguments of BlockwisePruning."""
KEYS = ("task", "model", "dtype", "method", "allocation", "solver", "target", "calibration", "seq_len", "samples", "heldout",
        "test_samples", "seed")  # fmt: skip
MEASURED = ("sparsity", "least_sparse_block", "most_sparse_block", "relative_error", "heldout_perplexity", "test_perplexity",
            "heldout_loss", "heldout_top1", "val_top1", "seconds", "processes")  # fmt: skip
IMAGES = 500
"""Number of windows of a batch."""
COLUMNS = (*KEYS, *MEASURED, *ENVIRONMENT)


def prune(module: PrunableModule, data: LightningDataModule, dense: dict, row: dict, scratch: Path) -> dict:
    """Restore the dense weights, prune as the row says, validate."""
    module.model.load_state_dict(dense)
    target = {"pattern": row["target"]} if ":" in row["target"] else {"sparsity": float(row["target"])}
    settings = {name: row[name] for name in ("method", "allocation", "solver")}
    callback = BlockwisePruning(
        **target, **settings, diagnostics=Diagnostics(attention_maps=[]), output_dir=str(scratch / "pruned")
    )
    limit = math.ceil(row["heldout"] / IMAGES) if (row["task"], row["test_samples"]) == ("deit", 0) else 1.0
    quiet_trainer(scratch, callbacks=[callback], limit_val_batches=limit).fit(module, data)
    records, metrics = callback.records, callback.metrics["pruned"]
    linears = [linear for record in records for linear in record.linears.values()]
    found = {
        "sparsity": sum(linear.zeros for linear in linears) / sum(linear.weights for linear in linears),
        "least_sparse_block": min(record.sparsity for record in records),
        "most_sparse_block": max(record.sparsity for record in records),
        "relative_error": sum(record.relative_error for record in records) / len(records),
        "seconds": sum(record.seconds for record in records),
    }
    if row["task"] == "llm":
        found["heldout_perplexity"] = metrics["val/perplexity"]
    else:
        names = ("heldout/loss", "heldout/top1", *(("val/top1",) if row["test_samples"] else ()))
        found |= {name.replace("/", "_"): metrics[name] for name in names}
    return {name: round(value, 6) for name, value in found.items()}


def quiet_trainer(scratch: Path, **options) -> Trainer:
    """Return a quiet Trainer of one device."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(devices=1, default_root_dir=scratch, **quiet, **options)


def language_model(args: argparse.Namespace, scratch: Path) -> Iterator[tuple[PrunableModule, LightningDataModule, dict]]:
    """Yield the model with the data of each text and seed, and the common entries of their rows."""
    paths = plain_wikitext(args.wikitext, scratch)
    module = CausalLM(args.model or SMOLLM2, dtype=args.dtype)
    for seed, text in itertools.product(args.seeds, args.calibration):
        seed_everything(seed, verbose=False)
        data = TextDataModule(
            tokenizer=args.model or SMOLLM2, source=paths[text], test_source=paths["test"], seq_len=args.seq_len or 2048,
            num_calibration=args.samples or 128, num_heldout=args.heldout or 16, batch_size=args.batch_size, seed=seed,
        )  # fmt: skip
        yield module, data, {"calibration": text, "seq_len": args.seq_len or 2048, "samples": args.samples or 128,
                             "heldout": args.heldout or 16, "seed": seed, "model": Path(args.model or SMOLLM2).stem,
                             "test_samples": "all" if args.test_samples is None else args.test_samples}  # fmt: skip


def vision_transformer(args: argparse.Namespace, _: Path) -> Iterator[tuple[PrunableModule, LightningDataModule, dict]]:
    """The same of DeiT-Tiny on Tiny-ImageNet, as in benchmarks/deit.py; images that are held out are training images too."""
    name, options, checkpoint = "deit_tiny_patch16_224", MODEL, args.data / "deit_tiny_patch8_64.safetensors"
    module = ImageClassifier(name, checkpoint=str(checkpoint), model_args=options)
    for seed in args.seeds:
        seed_everything(seed, verbose=False)
        samples, heldout = args.samples or 128, args.heldout or 2000
        data = DecodedImages(
            root=str(args.data), train="calib", classes=str(args.data / "classes.tsv"), image_size=64, crop_pct=1.0,
            num_calibration=samples, num_heldout=heldout, seed=seed, batch_size=IMAGES,
        )  # fmt: skip
        data.setup("fit")
        yield module, data, {"calibration": "calib", "seq_len": 65, "samples": samples, "heldout": heldout, "seed": seed,
                             "model": checkpoint.stem,
                             "test_samples": "all" if args.test_samples is None else args.test_samples}  # fmt: skip


def table() -> str:
    """Return a table for each setting of the rows: variants by target, held-out and test, mean over seeds."""
    rows, texts = read("allocation.csv"), []
    for setting in dict.fromkeys(_setting(row) for row in rows):
        chosen = [row for row in rows if _setting(row) == setting]
        task, targets = chosen[0]["task"], sorted({row["target"] for row in chosen})
        columns = ["heldout_perplexity", "test_perplexity"] if task == "llm" else ["heldout_loss", "val_top1"]
        columns = [column for column in columns if any(row[column] for row in chosen)]
        names = {
            "heldout_perplexity": "held-out",
            "test_perplexity": "test",
            "heldout_loss": "held-out loss",
            "val_top1": "top-1",
        }
        lines = [
            [name, *(_cell(chosen, name, target, column) for column in columns for target in targets)]
            for name in VARIANTS
            if any(_variant(row) == name for row in chosen)
        ]
        header = ["allocation, solver", *(f"{names[column]}, {target}" for column in columns for target in targets)]
        seeds = sorted({row["seed"] for row in chosen})
        texts.append(f"{markdown_table(header, lines)}\n\n{setting}, seed {', '.join(seeds)}.")
    return "\n\n".join(texts)


def _variant(row: dict) -> str:
    return f"{row['allocation']}, {row['solver']}"


def _setting(row: dict) -> str:
    of = "test windows" if row["task"] == "llm" else "validation images"
    test = "" if row["test_samples"] == "0" else f", {row['test_samples']} {of}"
    return (
        f"{row['model']} ({row['dtype']}), {row['method']}, {row['calibration']}, {row['samples']} x {row['seq_len']} "
        f"calibration tokens, {row['heldout']} held out{test}, {row['hardware']}, "
        f"torch {row['torch']}, lightning {row['lightning']}"
    )


def _cell(rows: list[dict], variant: str, target: str, column: str) -> str:
    values = [float(row[column]) for row in rows if (_variant(row), row["target"]) == (variant, target) and row[column]]
    values = [100 * value if column == "val_top1" else value for value in values]
    if len(values) > 1 and column != "heldout_loss":
        return spread(values)
    return f"{sum(values) / len(values):.3g}" if values and column == "heldout_loss" else f"{values[0]:.2f}" if values else ""


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["llm", "deit"], default="llm")
    parser.add_argument("--wikitext", type=Path, help="folder with wiki.test.raw and wiki.valid.tokens")
    parser.add_argument("--data", type=Path, help="folder tiny-imagenet-200 with val, calib and weights")
    parser.add_argument("--output", type=Path, default=Path("results/allocation.csv"))
    parser.add_argument("--model", help="language model; SmolLM2-135M when left out")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--method", default="d2prune")
    parser.add_argument("--calibration", nargs="+", default=["wikitext2-valid"], choices=["wikitext2-valid", "pydoc"])
    parser.add_argument("--targets", nargs="+", default=["0.6", "0.7", "0.8", "2:4"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seq-len", type=int, help="of a window; 2048 when left out")
    parser.add_argument("--samples", type=int, help="calibration windows or images; 128 when left out")
    parser.add_argument("--heldout", type=int, help="windows or images held out; 16 or 2000 when left out")
    parser.add_argument(
        "--test-samples", type=int, help="windows of the test text; 0 for none, also of images; all when left out"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th run, from the i-th on")
    args = parser.parse_args()
    if (args.wikitext if args.task == "llm" else args.data) is None:
        parser.error("give --wikitext, or --task deit with --data")
    index, count = map(int, args.shard.split("/"))
    done, facts = finished(args.output, KEYS), environment() | {"processes": count}
    cells = list(itertools.product(args.targets, args.variants))
    cells = [(target, name) for target, name in cells if ":" not in target or "allocation" not in VARIANTS[name]]
    number, dense = -1, None
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for module, data, common in (language_model if args.task == "llm" else vision_transformer)(args, scratch):
            if dense is None:
                module.configure_model()
                dense = {name: value.clone() for name, value in module.model.state_dict().items()}
            common |= {"task": args.task, "dtype": args.dtype, "method": args.method, "allocation": "uniform", "solver": "obs"}
            for target, name in cells:
                row, number = common | {"target": target} | VARIANTS[name], number + 1
                if number % count != index or tuple(str(row[key]) for key in KEYS) in done:
                    continue
                row |= prune(module, data, dense, row, scratch) | facts
                if args.task == "llm" and args.test_samples != 0:
                    limit = 1.0 if args.test_samples is None else math.ceil(args.test_samples / args.batch_size)
                    (test,) = quiet_trainer(scratch, limit_test_batches=limit).test(module, data, verbose=False)
                    row["test_perplexity"] = round(test["test/perplexity"], 4)
                append(args.output, row, COLUMNS)
                print({key: row.get(key) for key in ("allocation", "solver", "target", *MEASURED)}, flush=True)


if __name__ == "__main__":
    main()

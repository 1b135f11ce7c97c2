"""Perplexity of a language model dense, pruned, and recovered by a short training -> one CSV row each.

    python -m benchmarks.recovery                                   results/recovery.csv, 10 minutes on two CPU cores
    python -m benchmarks.recovery --source ../shared/data/wikitext-2 --samples 400 --seq-len 512 --batch-size 8       on a GPU

Pruned by the joint solver. The windows that pruning is calibrated on are those that the recovery trains on, once; perplexity is
that of held-out text, and with WikiText-2 of its test text. Recoveries: full (all weights train, KeepSparsity keeps the zeros),
lora (adapters trained and merged where weights are not zero), lora apart (adapters as usual, kept apart: the model that is
measured is not sparse).
Rows are appended as they come and not run again if they are there; `seconds` are those of pruning, or of training.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from benchmarks.markdown import read
from benchmarks.markdown import table as markdown_table
from benchmarks.quality import ENVIRONMENT, SMOLLM2, append, environment, finished, plain_wikitext
from callbacks import BlockwisePruning, KeepSparsity, LoRA
from callbacks.base.sparsity import linear_weights, share_of, zeros_of
from datamodules import TextDataModule
from lightning_modules import CausalLM

RECOVERIES = {"full": (KeepSparsity, 1e-4), "lora": (LoRA, 1e-3), "lora apart": (lambda: LoRA(merge="none"), 1e-3)}
SHOWN = {
    "none": "pruned",
    "full": "all weights trained, zeros kept",
    "lora": "LoRA, merged where weights are not zero",
    "lora apart": "LoRA, adapters apart (not sparse)",
}
KEYS = ("model", "dtype", "source", "target", "recovery", "learning_rate", "seq_len", "samples", "batch_size", "steps", "seed")
MEASURED = ("sparsity", "heldout_perplexity", "test_perplexity", "seconds")
COLUMNS = (*KEYS, *MEASURED, *ENVIRONMENT)


TEXTS = {"pydoc": "Python docs", "wikitext2": "WikiText-2"}


def table() -> str:
    """Perplexity by target and recovery, a table for each text."""
    rows = read("recovery.csv")
    return "\n\n".join(_of_text([row for row in rows if row["source"] == text], name) for text, name in TEXTS.items())


def _of_text(rows: list[dict[str, str]], name: str) -> str:
    value = {(row["target"], row["recovery"]): row for row in rows}
    targets = [row["target"] for row in rows if row["recovery"] == "none" and row["target"] != "dense"]
    columns = {"held-out": "heldout_perplexity", "test": "test_perplexity"}
    columns = {title: column for title, column in columns.items() if rows[0][column]}
    cells = [(title, column, target) for title, column in columns.items() for target in targets]
    lines = [
        [shown, *(f"{float(row[column]):.2f}" if (row := value.get((target, recovery))) else "" for _, column, target in cells)]
        for recovery, shown in SHOWN.items()
    ]
    first, dense = value[targets[0], "full"], value["dense", "none"]
    reached = ", ".join(f"{title} {float(dense[column]):.2f}" for title, column in columns.items())
    where = "two CPU cores" if first["hardware"] == "x86_64" else "one GPU"
    note = (
        f"SmolLM2-135M-Instruct ({first['dtype']}; dense: {reached}), {name}: pruned with {first['samples']} x "
        f"{first['seq_len']} tokens, trained on them in {first['steps']} steps of {first['batch_size']}, {where} "
        f"({first['hardware']}), torch {first['torch']}, transformers {first['transformers']}, lightning {first['lightning']}, "
        f"seed {first['seed']}."
    )
    return f"{markdown_table(['perplexity', *(f'{title}, {target}' for title, _, target in cells)], lines)}\n\n{note}"


def trainer_of(scratch: Path, *callbacks, **options) -> Trainer:
    """Return a quiet Trainer of one device."""
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(devices=1, callbacks=list(callbacks), default_root_dir=scratch, num_sanity_val_steps=0, **silent, **options)


def perplexities(module: CausalLM, data: TextDataModule, scratch: Path) -> dict[str, float]:
    """Measure on held-out text, and on the test text if there is one."""
    trainer = trainer_of(scratch)
    (found,) = trainer.validate(module, data, verbose=False)
    values = {"heldout_perplexity": round(found["val/perplexity"], 4)}
    if data.hparams.test_source is not None:
        (found,) = trainer.test(module, data, verbose=False)
        values["test_perplexity"] = round(found["test/perplexity"], 4)
    return values


def prune(args: argparse.Namespace, target: str, data: TextDataModule, scratch: Path) -> Path:
    """Directory of the pruned model."""
    output = scratch / target.replace(":", "of")
    settings = {"pattern": target} if ":" in target else {"sparsity": float(target)}
    callback = BlockwisePruning(**settings, method="d2_sparsegpt", solver="joint", output_dir=str(output))
    trainer_of(scratch, callback).fit(CausalLM(args.model, dtype=args.dtype), data)
    return output


def recover(path: Path, recovery: str, learning_rate: float, data: TextDataModule, scratch: Path) -> CausalLM:
    """The pruned model after one pass over the training windows."""
    module = CausalLM(str(path), learning_rate=learning_rate)
    trainer_of(scratch, RECOVERIES[recovery][0](), max_epochs=1, gradient_clip_val=1.0).fit(module, data)
    return module


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="pydoc", help="pydoc, or a folder with wiki.test.raw and wiki.valid.tokens")
    parser.add_argument("--output", type=Path, default=Path("results/recovery.csv"))
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--targets", nargs="+", default=["2:4", "0.6"])
    parser.add_argument("--recoveries", nargs="+", default=list(RECOVERIES), choices=list(RECOVERIES))
    parser.add_argument("--learning-rate", type=float, help="another than that of the recovery")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--samples", type=int, default=48, help="windows to prune and to train on")
    parser.add_argument("--heldout", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    done, facts = finished(args.output, KEYS), environment()

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        texts = {"source": "pydoc", "test_source": None}
        if args.source != "pydoc":
            paths = plain_wikitext(Path(args.source), scratch)
            texts = {"source": paths["wikitext2-valid"], "test_source": paths["test"]}
        fixed = {"model": Path(args.model).stem, "dtype": args.dtype, "seq_len": args.seq_len, "samples": args.samples}
        fixed |= {"source": "pydoc" if args.source == "pydoc" else "wikitext2", "batch_size": args.batch_size}
        for seed, target in itertools.product(args.seeds, ["dense", *args.targets]):
            seed_everything(seed, verbose=False)
            data = TextDataModule(
                tokenizer=args.model, **texts, seq_len=args.seq_len, num_calibration=args.samples,
                num_heldout=args.heldout, batch_size=args.batch_size, seed=seed,
            )  # fmt: skip
            path = None
            for recovery in ["none"] if target == "dense" else ["none", *args.recoveries]:
                trained = recovery != "none"
                rate = args.learning_rate or RECOVERIES[recovery][1] if trained else ""
                steps = -(-args.samples // args.batch_size) if trained else 0
                row = fixed | {"seed": seed, "target": target, "recovery": recovery, "learning_rate": rate, "steps": steps}
                if tuple(str(row[key]) for key in KEYS) in done:
                    continue
                started = time.perf_counter()
                if target == "dense":
                    module = CausalLM(args.model, dtype=args.dtype)
                else:
                    path = path or prune(args, target, data, scratch)
                    seed_everything(seed, verbose=False)
                    module = recover(path, recovery, rate, data, scratch) if trained else CausalLM(str(path))
                row["seconds"] = round(time.perf_counter() - started, 1)
                row |= perplexities(module, data, scratch) | facts
                if recovery != "lora apart":  # that one is not sparse
                    row["sparsity"] = round(share_of(zeros_of(linear_weights(module))), 6)
                append(args.output, row, COLUMNS)
                print({key: row.get(key) for key in ("target", "recovery", "learning_rate", *MEASURED)}, flush=True)


if __name__ == "__main__":
    main()

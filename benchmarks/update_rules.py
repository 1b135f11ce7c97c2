"""Compare update rules: every rule x sparsity x calibration text x seed -> results/update_rules.csv.

    python -m benchmarks.update_rules --wikitext ../shared/data/wikitext-2

Attention is measured on the first calibration windows against the dense model: mean over blocks of KL (nats) and of the RMSE of
the attention module's output. `prune_seconds` is statistics and solve of all blocks (three times for the perplexity rule),
`rule_seconds` what looking at attention took: part of the attention rule, only a measurement for the others. Rows are
appended as they come and not run again if they are there; `--shard 0/6` lets several processes share the work and the file,
whose seconds are then no timings (column `processes`).
"""

import argparse
import itertools
import json
import sysconfig
import tempfile
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

from benchmarks.quality import ENVIRONMENT, SMOLLM2, append, environment, finished, plain_wikitext, test_perplexity
from callbacks import AttentionRule, BlockwisePruning, Diagnostics, FixedRule
from datamodules import TextDataModule
from lightning_modules import CausalLM

FIXED = {f"{held} held": {"update_rule": FixedRule(held)} for held in ("none", "q", "k", "v", "all")}
RULES = FIXED | {
    "outlier": {"update_rule": "outlier"},
    "perplexity": {"update_rule": "perplexity"},
    "attention": {},
    "attention, 16 windows": {"windows": 16},
    "attention, block reference": {"reference": "block"},
    "attention, 8 subsets": {"candidates": "all"},
    "attention, 8 subsets, block reference": {"candidates": "all", "reference": "block"},
    "attention, 4 candidates": {"candidates": "single"},
    "attention, Eq. 12": {"candidates": "single", "objective": "divergence", "reference": "block"},
    "attention, windows of source code": {"source": "code"},
}
"""Name of a row -> arguments of BlockwisePruning; of rows with the attention rule, those of AttentionRule."""

SHOWN = ("none held", "q held", "k held", "v held", "outlier", "perplexity", "attention")
KEYS = ("model", "dtype", "rule", "target", "calibration", "seq_len", "samples", "seed")
MEASURED = (
    "sparsity", "heldout_perplexity", "test_perplexity", "attention_kl", "attention_rmse", "attention_relative_error",
    "updated_q", "updated_k", "updated_v", "prune_seconds", "rule_seconds", "peak_memory_gib", "processes",
)  # fmt: skip
COLUMNS = (*KEYS, *MEASURED, *ENVIRONMENT)


def source_code(scratch: Path) -> str:
    """Path of a text that is no prose: modules of Python's standard library."""
    path = scratch / "code.txt"
    if not path.exists():
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        path.write_text("\n\n".join(file.read_text(encoding="utf-8") for file in files), encoding="utf-8")
    return str(path)


def measure(module: CausalLM, data: TextDataModule, row: dict, dense: dict[str, torch.Tensor], scratch: Path) -> dict:
    """Restore the dense weights, prune with the row's rule, and evaluate on held-out and test text."""
    module.model.load_state_dict(dense)
    target = {"pattern": row["target"]} if ":" in row["target"] else {"sparsity": float(row["target"])}
    settings = dict(RULES[row["rule"]])
    if settings.get("source") == "code":
        settings["source"] = source_code(scratch)
    if row["rule"].startswith("attention"):
        settings = {"update_rule": AttentionRule(**settings)}
    looked_at = row["rule"] != "perplexity"  # measured for its best run by the fixed rules
    diagnostics = Diagnostics(attention=looked_at)
    callback = BlockwisePruning(**target, **settings, diagnostics=diagnostics, output_dir=str(scratch / "pruned"))
    trainer = Trainer(
        callbacks=[callback], devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=scratch,
    )  # fmt: skip
    trainer.fit(module, data)
    records, report = callback.records, json.loads((scratch / "pruned" / "pruning.json").read_text())

    def mean(values) -> float:
        values = list(values)
        return round(sum(values) / len(values), 6)

    row = {
        "sparsity": mean(x.sparsity for x in records),
        "heldout_perplexity": round(callback.metrics["pruned"]["val/perplexity"], 4),
        "test_perplexity": test_perplexity(module, data, scratch),
        "prune_seconds": round(sum(x.seconds - x.seconds_rule for x in records), 2),
        "rule_seconds": round(sum(x.seconds_rule for x in records), 2),
        "peak_memory_gib": round(max(x.peak_memory_gib for x in records), 2),
    }
    row |= {f"updated_{role}": mean(x.update_shares[role] for x in records) for role in "qkv"}
    if looked_at:
        names = {"kl": "attention_kl", "rmse": "attention_rmse", "relative_error": "attention_relative_error"}
        row |= {column: mean(x.attention[name] for x in records) for name, column in names.items()}
    else:
        row["prune_seconds"] = round(report["seconds"], 2)  # of all three runs
    return row


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikitext", type=Path, required=True, help="folder with wiki.test.raw and wiki.valid.tokens")
    parser.add_argument("--output", type=Path, default=Path("results/update_rules.csv"))
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--calibration", nargs="+", default=["wikitext2-valid", "pydoc"])
    parser.add_argument("--targets", nargs="+", default=["0.5", "0.6", "0.7", "0.8", "2:4"])
    parser.add_argument("--rules", nargs="+", default=list(SHOWN), choices=list(RULES), metavar="RULE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--heldout", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th run, from the i-th on")
    args = parser.parse_args()
    index, count = map(int, args.shard.split("/"))
    done, facts = finished(args.output, KEYS), environment() | {"processes": count}

    module = CausalLM(args.model, dtype=args.dtype)
    module.configure_model()
    dense = {name: value.clone() for name, value in module.model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        paths = plain_wikitext(args.wikitext, scratch)
        texts = {}
        runs = itertools.product(args.seeds, args.calibration, args.targets, args.rules)
        for number, (seed, calibration, target, rule) in enumerate(runs):
            row = {"model": Path(args.model).stem, "dtype": args.dtype, "rule": rule, "target": target, "seed": seed}
            row |= {"calibration": calibration, "seq_len": args.seq_len, "samples": args.samples}
            if number % count != index or tuple(str(row[key]) for key in KEYS) in done:
                continue
            if (seed, calibration) not in texts:
                seed_everything(seed, verbose=False)
                texts = {(seed, calibration): TextDataModule(
                    tokenizer=args.model, source=paths[calibration], test_source=paths["test"], seq_len=args.seq_len,
                    num_calibration=args.samples, num_heldout=args.heldout, batch_size=args.batch_size, seed=seed,
                )}  # fmt: skip
            row |= measure(module, texts[seed, calibration], row, dense, scratch) | facts
            append(args.output, row, COLUMNS)
            print({key: row.get(key) for key in ("rule", "target", "calibration", "seed", *MEASURED)}, flush=True)


if __name__ == "__main__":
    main()

"""The joint solver: its quality, what each of its ideas brings, and the choice of its defaults -> rows of results/joint.csv.

    python -m benchmarks.joint --wikitext ../shared/data/wikitext-2 --study quality --seeds 0 1 2
    python -m benchmarks.joint --wikitext ../shared/data/wikitext-2 --study ablation
    python -m benchmarks.joint --wikitext ../shared/data/wikitext-2 --study choice --calibration wikitext2-valid pydoc
    python -m benchmarks.joint --wikitext ../shared/data/wikitext-2 --study rivals
    python -m benchmarks.joint --wikitext ../shared/data/wikitext-2 --study quality --calibration self --targets 0.5 0.6
    python -m benchmarks.joint --data ../shared/data/tiny-imagenet-200 --study deit --seeds 0 1 2

`choice` looks at held-out text only: that of the calibration text and that of the other one. Rows are appended as they come and
not run again if they are there.
"""

import argparse
import itertools
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from lightning import LightningDataModule
from lightning.pytorch import seed_everything

from benchmarks.allocation import IMAGES, quiet_trainer
from benchmarks.deit import MODEL, DecodedImages
from benchmarks.markdown import read, spread
from benchmarks.markdown import table as markdown_table
from benchmarks.quality import ENVIRONMENT, SMOLLM2, append, environment, finished, plain_wikitext
from benchmarks.rivals import as_solver
from callbacks import BlockwisePruning, JointSolver, Score
from callbacks.blockwise.block import BlockStep
from callbacks.blockwise.run import PruningRun
from datamodules import TextDataModule
from lightning_modules import CausalLM, ImageClassifier
from lightning_modules.base.prunable import PrunableModule

JOINT = {"method": "d2_sparsegpt", "solver": "joint"}
QUALITY = {"joint": JOINT, "joint, error": JOINT | {"allocation": "error"}}
PLAIN = {"method": "sparsegpt", "target": "pruned", "stages": False}
ALONE = PLAIN | {"solver": "joint"}
RIVALS = {
    "L-ADMM": ALONE | {"rival": "ladmm"},
    "ALPS": ALONE | {"rival": "alps"},
    "L-ADMM, our stages and target": JOINT | {"rival": "ladmm"},
    "ALPS, our stages and target": JOINT | {"rival": "alps"},
}
"""Both as published: one pass over each block, against the inputs of the pruned model; and in the place of our solver alone."""
ABLATION = {
    "published update": {"method": "d2_sparsegpt"},
    "joint solver alone": ALONE,
    "stages alone": PLAIN | {"stages": True},
    "dense target alone": PLAIN | {"target": 0.35},
    "all": JOINT,
    "all but the joint solver (admm)": JOINT | {"solver": "admm", "score": 1.0, "target": 0.35, "stages": True},
    "all but the dense target": JOINT | {"target": "pruned"},
    "all but the hidden states in the target": JOINT | {"stream": False},
    "all but stages": JOINT | {"stages": False},
    "all but the activation term": JOINT | {"score": 0.0},
    "all, attention rule": {"method": "d2prune", "solver": "joint"},
    "all, v held": {"method": "d2prune", "solver": "joint", "update_rule": "outlier"},
}
CHOICE = {
    **{f"α = {share}": JOINT | {"target": share} for share in (0.2, 0.35, 0.5)},
    **{f"λ1 = {value:g}": JOINT | {"score": value} for value in (0.0, 1.0, 10.0, 100.0)},
    "by rows": JOINT | {"solver": JointSolver("row")},
    "damping 0.03": JOINT | {"solver": JointSolver(damping=0.03)},
}
CLASS_TOKEN = {"method": "sparsegpt", "solver": "joint", "target": 0.2, "class_token_weight": 16.0}
"""λ1 = 0 is method sparsegpt: the weights are the same, bit for bit."""
DEIT = {
    "joint": JOINT,
    "class token": CLASS_TOKEN,
    "class token, depth": CLASS_TOKEN | {"allocation": "depth"},
    "joint, error": QUALITY["joint, error"],
    "sparsegpt": {"method": "sparsegpt"},
    "admm": {"method": "d2_sparsegpt", "solver": "admm"},
}
STUDIES = {
    "quality": (QUALITY, ["0.5", "0.6", "0.7", "0.8", "2:4"]),
    "ablation": (ABLATION, ["0.5", "0.7", "2:4"]),
    "choice": (CHOICE, ["0.5", "0.6", "0.7"]),
    "rivals": (RIVALS, ["0.5", "0.6", "0.7", "0.8", "2:4"]),
    "deit": (DEIT, ["0.6", "0.7", "0.8", "2:4"]),
}
TEXTS = {"wikitext2-valid": "WikiText-2 valid", "pydoc": "Python docs", "self": "its own text"}
KEYS = ("study", "model", "dtype", "variant", "target", "calibration", "seq_len", "samples", "heldout", "seed")
MEASURED = ("sparsity", "heldout_perplexity", "other_text", "other_heldout_perplexity", "test_perplexity", "heldout_top1",
            "val_top1", "seconds", "peak_memory_gib", "processes")  # fmt: skip
COLUMNS = (*KEYS, *MEASURED, *ENVIRONMENT)


def prune(module: PrunableModule, data: LightningDataModule, dense: dict, row: dict, variant: dict, scratch: Path) -> dict:
    """Restore the dense weights, prune as the variant says, validate."""
    module.model.load_state_dict(dense)
    settings = dict(variant)
    aim = {"pattern": row["target"]} if ":" in row["target"] else {"sparsity": float(row["target"])}
    if "score" in settings:
        settings["score"] = Score(settings["score"])
    shutil.rmtree(scratch / "pruned", ignore_errors=True)
    with _without_stream(settings.pop("stream", True)), as_solver(settings.pop("rival", "")):
        callback = BlockwisePruning(**aim, **settings, output_dir=str(scratch / "pruned"))
        quiet_trainer(scratch, callbacks=[callback]).fit(module, data)
    linears = [linear for record in callback.records for linear in record.linears.values()]
    found = {
        "sparsity": sum(linear.zeros for linear in linears) / sum(linear.weights for linear in linears),
        "seconds": sum(record.seconds for record in callback.records),
        "peak_memory_gib": max(record.peak_memory_gib for record in callback.records),
    }
    names = {"val/perplexity": "heldout_perplexity", "heldout/top1": "heldout_top1", "val/top1": "val_top1"}
    metrics = callback.metrics["pruned"]
    if row["study"] == "deit":
        names.pop("val/perplexity")
    found |= {column: metrics[name] for name, column in names.items() if name in metrics}
    return {name: round(value, 6) for name, value in found.items()}


@contextmanager
def _without_stream(wanted: bool) -> Iterator[None]:
    """Leave what hidden states lack out of all targets, unless it is wanted."""
    if wanted:
        yield
        return
    with mock.patch.object(BlockStep, "_channels", lambda self, siblings: 0):
        yield


@contextmanager
def _dense_validated_once() -> Iterator[None]:
    """Validate the dense model in the first of all runs; the others report the metrics that it had there."""
    validate, dense = PruningRun.validate, {}

    def known(run: PruningRun) -> dict[str, float]:
        if "dense" in run.metrics:
            return validate(run)
        if not dense:
            dense.update(validate(run))
        return dict(dense)

    with mock.patch.object(PruningRun, "validate", known):
        yield


def facts_of(args: argparse.Namespace) -> dict[str, str | int]:
    """Return the hardware, the versions and the number of processes that share the machine."""
    return environment() | {"processes": args.processes}


def text_data(args: argparse.Namespace, paths: dict[str, str], text: str, seed: int) -> TextDataModule:
    """Return the data of a calibration text."""
    own = {"source": "self", "self_file": paths["self"].format(seed)} if text == "self" else {"source": paths[text]}
    return TextDataModule(
        tokenizer=args.model, **own, test_source=paths["test"], seq_len=args.seq_len,
        num_calibration=args.samples, num_heldout=args.heldout, batch_size=args.batch_size, seed=seed,
    )  # fmt: skip


def language_rows(args: argparse.Namespace, scratch: Path) -> None:
    """Run what is missing of a study of a language model."""
    paths, facts, done = plain_wikitext(args.wikitext, scratch), facts_of(args), finished(args.output, KEYS)
    variants, targets = STUDIES[args.study]
    paths["self"] = str(scratch / "self-{}.safetensors")
    module, dense = CausalLM(args.model, dtype=args.dtype), None
    common = {"study": args.study, "model": Path(args.model).stem, "dtype": args.dtype, "seq_len": args.seq_len}
    common |= {"samples": args.samples, "heldout": args.heldout}
    runs = itertools.product(args.seeds, args.calibration, args.targets or targets, args.variants or variants)
    for seed, text, target, name in runs:
        row = common | {"seed": seed, "calibration": text, "target": target, "variant": name}
        if tuple(str(row[key]) for key in KEYS) in done or (":" in target and "allocation" in variants[name]):
            continue
        seed_everything(seed, verbose=False)
        if dense is None:
            module.configure_model()
            if torch.cuda.is_available():
                module.model.cuda()
            dense = {key: value.clone() for key, value in module.model.state_dict().items()}
        data = text_data(args, paths, text, seed)
        row |= prune(module, data, dense, row, variants[name], scratch) | facts
        if args.study == "choice":
            row["other_text"] = "pydoc" if text == "wikitext2-valid" else "wikitext2-valid"
            other = text_data(args, paths, row["other_text"], seed)
            (heldout,) = quiet_trainer(scratch).validate(module, other, verbose=False)
            row["other_heldout_perplexity"] = round(heldout["val/perplexity"], 4)
        else:
            (test,) = quiet_trainer(scratch).test(module, data, verbose=False)
            row["test_perplexity"] = round(test["test/perplexity"], 4)
        append(args.output, row, COLUMNS)
        print({key: row.get(key) for key in ("variant", "target", "calibration", "seed", *MEASURED)}, flush=True)


def vision_rows(args: argparse.Namespace, scratch: Path) -> None:
    """Run what is missing of the study of DeiT-Tiny on Tiny-ImageNet, as in benchmarks/deit.py."""
    facts, done = facts_of(args), finished(args.output, KEYS)
    variants, targets = STUDIES["deit"]
    checkpoint = args.data / "deit_tiny_patch8_64.safetensors"
    module = ImageClassifier("deit_tiny_patch16_224", checkpoint=str(checkpoint), model_args=MODEL)
    module.configure_model()
    dense = {key: value.clone() for key, value in module.model.state_dict().items()}
    for seed in args.seeds:
        seed_everything(seed, verbose=False)
        data = DecodedImages(
            root=str(args.data), train="calib", classes=str(args.data / "classes.tsv"), image_size=64, crop_pct=1.0,
            num_calibration=args.samples, num_heldout=2000, seed=seed, batch_size=IMAGES,
        )  # fmt: skip
        data.setup("fit")
        common = {"study": "deit", "model": checkpoint.stem, "dtype": "float32", "calibration": "calib", "seq_len": 65}
        common |= {"samples": args.samples, "heldout": 2000, "seed": seed}
        for target, name in itertools.product(args.targets or targets, args.variants or variants):
            row = common | {"target": target, "variant": name}
            if tuple(str(row[key]) for key in KEYS) in done or (":" in target and "allocation" in variants[name]):
                continue
            row |= prune(module, data, dense, row, variants[name], scratch) | facts
            append(args.output, row, COLUMNS)
            print({key: row.get(key) for key in ("variant", "target", "seed", *MEASURED)}, flush=True)


def table() -> str:
    """Return test perplexity by variant, calibration text and target, mean ± standard deviation over seeds."""
    rows = [row for row in read("joint.csv") if row["study"] == "quality"]
    columns = list(dict.fromkeys((row["calibration"], row["target"]) for row in sorted(rows, key=_place)))
    values: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        values.setdefault((row["variant"], row["calibration"], row["target"]), []).append(row["test_perplexity"])
    lines = [[name, *(_seeds(values.get((name, *column), [])) for column in columns)] for name in QUALITY]
    header = ["", *(f"{TEXTS[text]}, {target}" for text, target in columns)]
    return f"{markdown_table(header, lines)}\n\n{_setting(rows[0])}; mean ± standard deviation (number of seeds)."


def choice_table() -> str:
    """Return held-out perplexity by variant: of the calibration text, and of the other text in brackets."""
    rows = [row for row in read("joint.csv") if row["study"] == "choice"]
    columns = list(dict.fromkeys((row["calibration"], row["target"]) for row in sorted(rows, key=_place)))
    found = {(row["variant"], row["calibration"], row["target"]): row for row in rows}
    lines = [
        [name, *(_heldout(found.get((name, *column))) for column in columns)]
        for name in CHOICE
        if any(row["variant"] == name for row in rows)
    ]
    header = ["", *(f"{TEXTS[text]}, {target}" for text, target in columns)]
    return f"{markdown_table(header, lines)}\n\n{_setting(rows[0])}, seed 0."


def deit_table() -> str:
    """Return top-1 of DeiT-Tiny in per cent by variant and target, mean ± standard deviation over seeds."""
    rows = [row for row in read("joint.csv") if row["study"] == "deit"]
    targets = sorted({row["target"] for row in rows})
    values: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        values.setdefault((row["variant"], row["target"]), []).append(f"{100 * float(row['val_top1']):.2f}")
    lines = [
        [name, *(_seeds(values.get((name, target), [])) for target in targets)]
        for name in DEIT
        if any((name, target) in values for target in targets)
    ]
    first = rows[0]
    note = (
        f"DeiT-Tiny of 64 x 64 images ({first['seq_len']} tokens, {first['dtype']}), {first['samples']} calibration images, "
        f"{first['hardware']}, torch {first['torch']}, lightning {first['lightning']}; mean ± standard deviation (number of "
        "seeds)."
    )
    return f"{markdown_table(['', *targets], lines)}\n\n{note}"


def ablation_table() -> str:
    """Return test perplexity by variant and target, held-out perplexity in brackets."""
    return _by_variant("ablation", ABLATION, "heldout_perplexity")


def rivals_table() -> str:
    """Return test perplexity by solver and target: ours from `quality`, seed 0, beside the rivals."""
    return _by_variant("rivals", {**RIVALS, "joint": JOINT})


def _by_variant(study: str, variants: Iterable[str], in_brackets: str = "") -> str:
    rows = [row for row in read("joint.csv") if row["study"] == study]
    ours = [row for row in read("joint.csv") if row["study"] == "quality" and row["seed"] == "0"]
    ours = [row for row in ours if row["calibration"] == rows[0]["calibration"]] if study == "rivals" else []
    found = {(row["variant"], row["target"]): row for row in (*rows, *ours)}
    targets = sorted({row["target"] for row in rows}, key=lambda target: (":" in target, target))

    def cell(row: dict[str, str] | None) -> str:
        if row is None:
            return ""
        brackets = f" ({float(row[in_brackets]):.1f})" if in_brackets else ""
        return f"{float(row['test_perplexity']):.1f}{brackets}"

    lines = [[name, *(cell(found.get((name, target))) for target in targets)] for name in variants]
    return f"{markdown_table(['', *targets], lines)}\n\n{_setting(rows[0])}, {TEXTS[rows[0]['calibration']]}, seed 0."


def _place(row: dict) -> tuple[int, str]:
    return list(TEXTS).index(row["calibration"]), row["target"]


def _seeds(values: list[str]) -> str:
    return f"{spread(values)} ({len(values)})" if len(values) > 1 else "".join(values)


def _heldout(row: dict | None) -> str:
    if row is None:
        return ""
    return f"{float(row['heldout_perplexity']):.1f} ({float(row['other_heldout_perplexity']):.1f})"


def _setting(row: dict) -> str:
    versions = f"torch {row['torch']}, transformers {row['transformers']}, lightning {row['lightning']}"
    return (
        f"{row['model']} ({row['dtype']}), {row['samples']} x {row['seq_len']} calibration tokens, {row['heldout']} windows "
        f"held out, one {row['hardware']}, {versions}"
    )


def main() -> None:
    """Run what is missing of a study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=list(STUDIES), default="quality")
    parser.add_argument("--wikitext", type=Path, help="folder with wiki.test.raw and wiki.valid.tokens")
    parser.add_argument("--data", type=Path, help="folder tiny-imagenet-200 with val, calib and weights")
    parser.add_argument("--output", type=Path, default=Path("results/joint.csv"))
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--dtype", default="float16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--calibration", nargs="+", default=["wikitext2-valid"], choices=["wikitext2-valid", "pydoc", "self"])
    parser.add_argument("--targets", nargs="+", help="only these, e.g. 0.5 2:4")
    parser.add_argument("--variants", nargs="+", help="only these")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--heldout", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--processes", type=int, default=1, help="that run at the same time; seconds are no timings then")
    args = parser.parse_args()
    if (args.data if args.study == "deit" else args.wikitext) is None:
        parser.error("give --wikitext, or --data for --study deit")
    with tempfile.TemporaryDirectory() as folder:
        if args.study == "deit":
            with _dense_validated_once():
                vision_rows(args, Path(folder))
        else:
            language_rows(args, Path(folder))


if __name__ == "__main__":
    main()

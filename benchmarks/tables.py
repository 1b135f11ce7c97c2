"""Write the tables of README.md and docs/ from the files in results/, between their <!-- name --> and <!-- /name --> marks.

python -m benchmarks.tables
"""

import itertools
import math
import re
from collections.abc import Sequence

from benchmarks import (
    allocation,
    graph_attack_tables,
    graph_claims,
    graph_few_tables,
    graph_tables,
    joint,
    recovery,
    speed_tables,
)
from benchmarks.markdown import ROOT, read, spread, table
from lightning_modules.parts.architectures import ARCHITECTURES

METHODS = ("magnitude", "wanda", "d2_wanda", "sparsegpt", "d2_sparsegpt")
TARGETS = ("0.5", "0.6", "0.7", "2:4")
TEXTS = {"wikitext2-valid": "WikiText-2 valid", "pydoc": "Python docs"}
RULES = ("none held", "q held", "k held", "v held", "outlier", "perplexity", "attention")


def shown(value: str) -> str:
    """Four digits, or fewer where a perplexity is in the thousands."""
    number = float(value)
    return f"{number:,.0f}" if number >= 1000 else f"{number:.2f}"


def quality() -> str:
    """Perplexity on WikiText-2 test by method and target, one half of the columns for each calibration text."""
    header = ["calibrated on", *(f"{name}, {target}" for name in TEXTS.values() for target in TARGETS)]
    return _qualities(header, tuple(TEXTS))


def headline() -> str:
    """The half of `quality` that is calibrated on the test text's own kind, and the joint solver."""
    value = {
        (row["variant"], row["target"]): row["test_perplexity"]
        for row in read("joint.csv")
        if (row["study"], row["calibration"], row["seed"]) == ("quality", "wikitext2-valid", "0")
    }
    value |= {(row["variant"], row["target"]): row["test_perplexity"] for row in read("joint.csv") if row["study"] == "rivals"}
    names = {
        "L-ADMM": "L-ADMM (arXiv 2401.02938)",
        "ALPS": "ALPS (arXiv 2406.07831)",
        "joint": "d2_sparsegpt, `solver: joint`",
        "joint, error": "the same, `allocation: error`",
    }
    more = [
        [name, *(shown(value[key, target]) if (key, target) in value else "" for target in TARGETS)]
        for key, name in names.items()
    ]
    return _qualities(["method", "50 %", "60 %", "70 %", "2:4"], ("wikitext2-valid",), more)


def _qualities(header: list[str], texts: tuple[str, ...], more: Sequence[list[str]] = ()) -> str:
    """Perplexity on WikiText-2 test by method, a column for each calibration text and target, and `more` lines."""
    rows = read("smollm2_quality.csv")
    value = {(r["method"], r["target"], r["calibration"]): r["test_perplexity"] for r in rows if r["non_updated"] == "none"}
    value |= {
        ("d2prune", r["target"], r["calibration"]): r["test_perplexity"]
        for r in read("update_rules.csv")
        if (r["rule"], r["seed"]) == ("attention", rows[0]["seed"])
    }
    lines = [
        [method, *(shown(value[method, target, text]) for text in texts for target in TARGETS)]
        for method in (*METHODS, "d2prune")
    ]
    note = f"{setting(rows[0], shown(value['dense', '0.0', 'pydoc']))}, seed {rows[0]['seed']}."
    return f"{table(header, [*lines, *more])}\n\n{note}"


def setting(row: dict[str, str], dense: str) -> str:
    """Return the setting with which a table of perplexities was measured."""
    return (
        f"SmolLM2-135M-Instruct ({row['dtype']}, dense {dense}), {row['samples']} x {row['seq_len']} calibration tokens, one "
        f"{row['hardware']}, torch {row['torch']}, transformers {row['transformers']}, lightning {row['lightning']}"
    )


def rules(column: str = "test_perplexity") -> str:
    """Mean and standard deviation over seeds by rule and target, a table for each calibration text.

    The perplexity rule's row is found in those of q, k and v held: its result is, bit for bit, the one of them with the lowest
    held-out perplexity.
    """
    rows = read("update_rules.csv")
    found = {(r["rule"], r["target"], r["calibration"], r["seed"]): r for r in rows}
    seeds = sorted({r["seed"] for r in rows})
    tables = []
    for text, name in TEXTS.items():
        targets = sorted({r["target"] for r in rows if r["calibration"] == text})
        for target, seed in itertools.product(targets, seeds):
            runs = [found[f"{held} held", target, text, seed] for held in "qkv"]
            found["perplexity", target, text, seed] = min(runs, key=lambda row: float(row["heldout_perplexity"]))
        lines = [
            [rule, *(spread([found[rule, target, text, seed][column] for seed in seeds]) for target in targets)]
            for rule in RULES
        ]
        tables.append(table([f"calibrated on {name}", *targets], lines))
    note = f"{setting(rows[0], '21.97')}; mean ± standard deviation of seeds {', '.join(seeds)}."
    return "\n\n".join([*tables, note])


DEIT = (
    "magnitude", "wanda", "sparsegpt", "d2_sparsegpt", "d2prune, q held", "d2prune, k held", "d2prune, v held",
    "d2prune, outlier", "d2prune, attention", "d2prune, perplexity",
)  # fmt: skip


def deit_rows(column: str = "val_top1") -> dict[tuple[str, str, str], list[float]]:
    """(row, target, calibration images) -> one value a seed; the perplexity rule's found as in `rules`."""
    rows = read("deit_tiny_imagenet.csv")
    found = {(r["row"], r["target"], r["images"], r["seed"]): r for r in rows}
    for target, images, seed in sorted({key[1:] for key in found}):
        runs = [found[f"d2prune, {held} held", target, images, seed] for held in "qkv"]
        found["d2prune, perplexity", target, images, seed] = min(runs, key=lambda row: float(row["heldout_loss"]))
    values: dict[tuple[str, str, str], list[float]] = {}
    for key, row in sorted(found.items()):
        values.setdefault(key[:3], []).append(float(row[column]))
    return values


def deit() -> str:
    """Top-1 in per cent, mean ± standard deviation over seeds, by method and target, a table for 128 and 1024 images."""
    rows, values, tables = read("deit_tiny_imagenet.csv"), deit_rows(), []
    targets = sorted({target for _, target, _ in values})
    for images in ("128", "1024"):
        lines = [[name, *(spread([str(100 * x) for x in values[name, target, images]]) for target in targets)] for name in DEIT]
        tables.append(table([f"{images} calibration images", *targets], lines))
    first = rows[0]
    note = (
        f"DeiT-Tiny of 64 x 64 images ({first['seq_len']} tokens, float32, dense 47.7 %), one {first['hardware']}, torch "
        f"{first['torch']}, lightning {first['lightning']}; mean ± standard deviation of seeds 0, 1, 2."
    )
    return "\n\n".join([*tables, note])


def defaults() -> str:
    """Held-out perplexity by norms and λ, one column a study."""
    rows = read("smollm2_defaults.csv")
    studies = sorted({(r["calibration"], r["target"], r["samples"], r["seq_len"]) for r in rows}, reverse=True)
    settings = list(dict.fromkeys((r["activation_norm"], r["lambda1"], r["lambda2"]) for r in rows))
    value = {
        (r["activation_norm"], r["lambda1"], r["lambda2"], r["calibration"], r["target"], r["samples"], r["seq_len"]): r
        for r in rows
    }
    lines = []
    for setting in sorted(settings, key=lambda s: (s[0] != "rms", float(s[2]), float(s[1]))):
        cells = [value.get((*setting, *study)) for study in studies]
        lines.append(
            [f"{setting[0]} ({setting[1]}, {setting[2]})", *(shown(c["heldout_perplexity"]) if c else "" for c in cells)]
        )
    header = ["norm (λ1, λ2)", *(f"{text}, {target}, {samples} x {length}" for text, target, samples, length in studies)]
    return table(header, lines)


def activation() -> str:
    """Held-out perplexity with and without the activation term, and the geometric mean.

    WikiText-2 only: what the rows of pydoc held out was in part contained in what they calibrated on
    (docs/notes/language-models.md).
    """
    rows = [row for row in read("smollm2_quality.csv") if row["calibration"] == "wikitext2-valid"]
    lines, header = [], []
    for method, name in {"sparsegpt": "λ1 = 0 (SparseGPT)", "d2_sparsegpt": "λ1 = 1"}.items():
        chosen = [row for row in rows if row["method"] == method]
        header = ["none held", *(f"{row['calibration']}, {row['target']}" for row in chosen), "geometric mean"]
        values = [float(row["heldout_perplexity"]) for row in chosen]
        mean = math.exp(sum(map(math.log, values)) / len(values))
        lines.append([name, *map(shown, map(str, values)), shown(str(mean))])
    return table(header, lines)


def families() -> str:
    """Families that have an entry: linears of a block, and how q, k and v lie in them."""
    lines = []
    for name, entry in sorted(ARCHITECTURES.items()):
        q = entry.projections["q"]
        fused = next((path for path in entry.fused if q.startswith(f"{path}.")), None)
        lines.append([name, ", ".join(entry.linears), "separate" if fused is None else f"rows of {fused}"])
    header = "| family | linears of a block | q, k and v |\n| --- | --- | --- |"
    return "\n".join([header, *(f"| {' | '.join(line)} |" for line in lines)])


TABLES = {
    "families": families,
    "headline": headline,
    "quality": quality,
    "rules": rules,
    "activation": activation,
    "deit": deit,
    "defaults": defaults,
}
TABLES |= graph_tables.TABLES | graph_few_tables.TABLES | graph_claims.TABLES | graph_attack_tables.TABLES
TABLES |= speed_tables.TABLES | {"recovery": recovery.table, "allocation": allocation.table}
TABLES |= {"joint": joint.table, "joint-choice": joint.choice_table, "joint-deit": joint.deit_table}
TABLES |= {"joint-ablation": joint.ablation_table, "joint-rivals": joint.rivals_table}
TEXTS_WITH_TABLES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


def filled(text: str) -> str:
    """The text with every marked table written anew."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda m, make=make: f"{m[1]}\n{make()}\n\n{m[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    for path in TEXTS_WITH_TABLES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")

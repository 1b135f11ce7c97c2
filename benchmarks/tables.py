"""Write the tables of README.md from the files in results/, between their <!-- name --> and <!-- /name --> marks.

python benchmarks/tables.py
"""

import csv
import math
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
METHODS = [
    ("magnitude", "none"), ("wanda", "none"), ("d2_wanda", "none"), ("sparsegpt", "none"), ("d2_sparsegpt", "none"),
    ("d2prune", "q"), ("d2prune", "k"), ("d2prune", "v"),
]  # fmt: skip


def read(name: str) -> list[dict[str, str]]:
    """Rows of a file in results/."""
    with (ROOT / "results" / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown, numbers to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: str) -> str:
    """Four digits, or fewer where a perplexity is in the thousands."""
    number = float(value)
    return f"{number:,.0f}" if number >= 1000 else f"{number:.2f}"


def quality() -> str:
    """Perplexity on WikiText-2 test by method and target, one half of the columns for each calibration text."""
    rows = read("smollm2_quality.csv")
    targets = ["0.5", "0.6", "0.7", "2:4"]
    texts = ["wikitext2-valid", "pydoc"]
    value = {(r["method"], r["non_updated"], r["target"], r["calibration"]): r["test_perplexity"] for r in rows}
    lines = []
    for method, held in METHODS:
        name = method if method != "d2prune" else f"d2prune, {held} held"
        lines.append([name, *(shown(value[method, held, target, text]) for text in texts for target in targets)])
    first, dense = rows[0], value["dense", "none", "0.0", "pydoc"]
    note = (
        f"SmolLM2-135M-Instruct ({first['dtype']}, dense {shown(dense)}), {first['samples']} x {first['seq_len']} calibration "
        f"tokens, seed {first['seed']}, one {first['hardware']}, torch {first['torch']}, transformers {first['transformers']}, "
        "lightning " + first["lightning"] + "."
    )
    header = ["calibrated on", *(f"{name}, {target}" for name in ("WikiText-2 valid", "Python docs") for target in targets)]
    return f"{table(header, lines)}\n\n{note}"


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


def held() -> str:
    """Held-out perplexity with and without the activation term, and with each projection held; and the geometric mean.

    WikiText-2 only: what the rows of pydoc held out was in part contained in what they calibrated on (results/README.md).
    """
    rows = [row for row in read("smollm2_quality.csv") if row["calibration"] == "wikitext2-valid"]
    names = {
        ("sparsegpt", "none"): "λ1 = 0, none held (SparseGPT)",
        ("d2_sparsegpt", "none"): "λ1 = 1, none held",
        ("d2prune", "q"): "λ1 = 1, q held",
        ("d2prune", "k"): "λ1 = 1, k held",
        ("d2prune", "v"): "λ1 = 1, v held",
    }
    lines, header = [], []
    for (method, role), name in names.items():
        chosen = [row for row in rows if (row["method"], row["non_updated"]) == (method, role)]
        header = ["", *(f"{row['calibration']}, {row['target']}" for row in chosen), "geometric mean"]
        values = [float(row["heldout_perplexity"]) for row in chosen]
        mean = math.exp(sum(map(math.log, values)) / len(values))
        lines.append([name, *map(shown, map(str, values)), shown(str(mean))])
    return table(header, lines)


TABLES = {"quality": quality, "held": held, "defaults": defaults}


def filled(text: str) -> str:
    """The text with every marked table written anew."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda m, make=make: f"{m[1]}\n{make()}\n\n{m[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")

"""Draw README's figure: perplexity by share of zeros, a line for each method -> results/headline.png.

python -m benchmarks.headline
"""

from matplotlib.figure import Figure

from benchmarks.markdown import ROOT, read

LABELS = {
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "d2prune": "D²Prune as published",
    "L-ADMM": "L-ADMM",
    "ALPS": "ALPS",
    "joint": "ours, solver: joint",
    "joint, error": "ours, with allocation: error",
}
"""Method -> label, in the order of the legend."""
TARGETS = ("0.5", "0.6", "0.7", "0.8")
HIGHEST = 400
"""Perplexities above are of no use to anybody, and are left out."""


def lines() -> dict[str, dict[float, float]]:
    """Return method -> share of zeros -> perplexity on WikiText-2 test, seed 0, calibrated on WikiText-2 valid."""
    rows = [(row["method"], row) for row in read("smollm2_quality.csv") if row["non_updated"] == "none"]
    rows += [("d2prune", row) for row in read("update_rules.csv") if row["rule"] == "attention"]
    rows += [(row["variant"], row) for row in read("joint.csv") if row["study"] in ("quality", "rivals")]
    found: dict[str, dict[float, float]] = {name: {} for name in LABELS}
    for name, row in rows:
        alike = (row["calibration"], row["seed"]) == ("wikitext2-valid", "0")
        if name in found and alike and row["target"] in TARGETS and float(row["test_perplexity"]) <= HIGHEST:
            found[name][float(row["target"])] = float(row["test_perplexity"])
    return found


def draw() -> Figure:
    """Draw the figure."""
    figure = Figure(figsize=(8, 3.6), layout="constrained", dpi=110)
    axis = figure.subplots()
    for name, points in lines().items():
        ours = name.startswith("joint")
        style = (
            {"linewidth": 2.2, "marker": "o", "markersize": 5} if ours else {"linewidth": 1.2, "marker": ".", "linestyle": "--"}
        )
        axis.plot(*zip(*sorted(points.items()), strict=True), label=LABELS[name], **style)
    dense = next(row for row in read("smollm2_quality.csv") if row["method"] == "dense")
    axis.axhline(float(dense["test_perplexity"]), color="grey", linewidth=1, label="dense model")
    axis.set_yscale("log")
    axis.set_yticks([25, 50, 100, 200, 400], labels=["25", "50", "100", "200", "400"])
    axis.minorticks_off()
    axis.set_xticks([float(target) for target in TARGETS], labels=[f"{100 * float(target):.0f} %" for target in TARGETS])
    axis.set_xlabel("share of zeros")
    axis.set_ylabel("perplexity, lower is better")
    axis.set_title("SmolLM2-135M, WikiText-2 test", fontsize=10)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    return figure


if __name__ == "__main__":
    draw().savefig(ROOT / "results" / "headline.png")

"""Draw the figures of README.md and docs/ from the files in results/.

python -m benchmarks.figures
"""

import statistics

from matplotlib.figure import Figure

from benchmarks.tables import ROOT, deit_rows

DENSE = 47.7
SHOWN = {
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "d2prune, attention": "D²Prune, attention rule",
    "d2prune, perplexity": "D²Prune, perplexity rule",
}


def deit() -> Figure:
    """Drop in top-1 against sparsity, a panel for 128 and 1024 calibration images; bars are ± one standard deviation."""
    values = deit_rows()
    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=110)
    for axis, images in zip(figure.subplots(1, 2, sharey=True), ("128", "1024"), strict=True):
        for name, label in SHOWN.items():
            targets = sorted({target for row, target, count in values if (row, count) == (name, images) and ":" not in target})
            drops = [[100 * x - DENSE for x in values[name, target, images]] for target in targets]
            means, deviations = [statistics.mean(x) for x in drops], [statistics.stdev(x) for x in drops]
            axis.errorbar(list(map(float, targets)), means, deviations, label=label, marker="o", markersize=3, capsize=2)
        axis.set_xticks([0.5, 0.6, 0.7, 0.8], ["50 %", "60 %", "70 %", "80 %"])
        axis.set_xlabel("zeros")
        axis.set_title(f"{images} calibration images", fontsize=10)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"top-1, points below dense ({DENSE} %)")
    figure.axes[0].legend(fontsize=8)
    return figure


if __name__ == "__main__":
    deit().savefig(ROOT / "results" / "deit_accuracy.png")

"""Draw the figure of docs/graphs.md: gains with few labels, a panel for each data set -> results/csg2l_gains.png.

python -m benchmarks.graph_gains
"""

from matplotlib.figure import Figure

from benchmarks.graph_tables import COMPARED, DATASETS, DEFAULT, NAMES, cells_of, interval, robust_accuracies, seed_means
from benchmarks.markdown import ROOT

SHOWN = {
    "≤ 5 labels, clean": ("no added edges", "tab:blue", -0.16),
    "≤ 5 labels, noisy": ("20 and 50 % added edges", "tab:orange", 0.16),
}
"""Column of the table -> label, colour, and how far below the middle of its row it stands."""
PAIRS = [(one, other) for one, others in COMPARED.items() for other in others]
"""From the top to the bottom of a panel."""


def points(found: dict, dataset: str, setting: str) -> list[tuple[float, float]]:
    """Mean and half a 95 % interval of the gain, for each of PAIRS."""
    cells = cells_of([dataset], setting)
    return [interval(seed_means(found, one, other, cells)) for one, other in PAIRS]


def draw() -> Figure:
    """Draw the figure."""
    figure, found = Figure(figsize=(9, 4.6), layout="constrained", dpi=110), robust_accuracies()
    first = len(COMPARED[DEFAULT])
    places = [row + 0.6 * (row >= first) for row in range(len(PAIRS))]
    for axis, dataset in zip(figure.subplots(1, len(DATASETS), sharex=True, sharey=True), DATASETS, strict=True):
        for setting, (label, colour, shift) in SHOWN.items():
            means, halves = zip(*points(found, dataset, setting), strict=True)
            heights = [place + shift for place in places]
            style = {"fmt": "o", "markersize": 4, "capsize": 2, "linewidth": 1.2, "color": colour}
            axis.errorbar(means, heights, xerr=halves, label=label, **style)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.axhline(first - 0.2, color="grey", linewidth=0.8, linestyle=":")
        axis.set_title(NAMES[dataset], fontsize=10)
        axis.set_xlabel("points of test accuracy", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    figure.axes[0].set_yticks(places, [f"{one} − {other}" for one, other in PAIRS], fontsize=8)
    figure.axes[0].invert_yaxis()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    return figure


if __name__ == "__main__":
    draw().savefig(ROOT / "results" / "csg2l_gains.png")

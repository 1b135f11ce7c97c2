"""A figure of attention maps side by side: dense, all projections updated, chosen (the paper's Figure 3)."""

from torch import Tensor, nn

LARGEST = 96
"""Largest number of queries and of keys that are drawn; longer maps are averaged down to it."""


def attention_figure(maps: dict[str, Tensor], title: str):
    """Draw attention maps on one logarithmic scale.

    Args:
        maps: Title of each panel -> (queries, keys), probabilities.
        title: Title above all panels.

    Returns:
        A matplotlib figure, not registered with pyplot.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    small = {name: _smaller(values) for name, values in maps.items()}
    largest = max(float(values.max()) for values in small.values())
    figure = Figure(figsize=(3.4 * len(maps) + 0.8, 3.6), layout="constrained", dpi=110)
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for axis, (name, values) in zip(axes, small.items(), strict=True):
        shown = values.masked_fill(values == 0, float("nan")).numpy()  # keys that no query of the cell sees stay white
        image = axis.imshow(shown, norm=LogNorm(largest * 1e-4, largest), cmap="viridis", interpolation="nearest")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("key")
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0].set_ylabel("query")
    figure.colorbar(image, ax=axes, label="attention, mean over heads", shrink=0.9)
    figure.suptitle(title, fontsize=11)
    return figure


def _smaller(values: Tensor) -> Tensor:
    values = values.detach().float().cpu()
    size = [min(length, LARGEST) for length in values.shape]
    return nn.functional.adaptive_avg_pool2d(values[None], size)[0]

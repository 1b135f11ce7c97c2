"""Curves and pictures of a graph module in training: similarities and weights of pairs, spectrum, embeddings in the plane."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from lightning_modules.base.node import NodeModule

NODES = 400
"""Nodes among whose pairs the distributions are taken."""
DRAWN = 2000
"""Nodes in the picture; t-SNE takes seconds for so many."""
NAMED = 20
"""Most classes that a legend names; of more, colours could not be told apart."""


class GraphMonitor(Callback):
    """Write distributions of S and R, the spectrum, and embeddings before and after training to TensorBoard.

    Args:
        every_n_epochs: Number of epochs between two histograms.
        picture: Whether to draw t-SNE of the embeddings and to write them for the embedding projector.

    Raises:
        ValueError: If `every_n_epochs` is below 1.
    """

    def __init__(self, every_n_epochs: int = 20, picture: bool = True) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"Argument `every_n_epochs` expected to be at least 1 but got {every_n_epochs}; 20 is usual.")
        self.every_n_epochs, self.picture = every_n_epochs, picture
        self._before: Tensor | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, NodeModule):
            raise TypeError(f"GraphMonitor needs a NodeModule such as CSG2L but got {type(pl_module).__name__}.")

    @override
    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: NodeModule) -> None:
        writer = _writer(trainer)
        if writer is None:
            return
        if (values := pl_module.spectrum()) is not None:
            writer.add_figure("spectrum", spectrum_figure(values), 0)
        if self.picture:
            with isolate_rng():
                self._before = pl_module.embed_all()[0]

    @override
    @rank_zero_only
    def on_train_batch_end(self, trainer: Trainer, pl_module: NodeModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        writer = _writer(trainer)
        if writer is None or batch_idx or trainer.current_epoch % self.every_n_epochs:
            return
        with isolate_rng():
            nodes = torch.randperm(batch.num_nodes, device=batch.x.device)[:NODES]
            pl_module.eval()
            found = pl_module.pairs(batch, nodes)
            pl_module.train()
        if found is None:  # no pseudo-labels, or not yet
            return
        similarity, weights, positive = found
        own = torch.eye(len(nodes), dtype=torch.bool, device=nodes.device)
        for name, pairs in (("positives", positive & ~own), ("negatives", ~positive & ~own), ("own", own)):
            if pairs.any():
                writer.add_histogram(f"similarity/{name}", similarity[pairs], trainer.global_step)
                writer.add_histogram(f"R/{name}", weights[pairs], trainer.global_step)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: NodeModule) -> None:
        folder, checkpoint = trainer.log_dir, trainer.checkpoint_callback  # of which all processes are asked
        if not trainer.is_global_zero:
            return
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_path and checkpoint.best_model_score is not None:
            score = float(checkpoint.best_model_score)
            rank_zero_info(
                f"Best {checkpoint.monitor} {score:.4f}: {checkpoint.best_model_path}; measure it on test nodes with"
            )
            rank_zero_info(f"  python train.py test --config {folder}/config.yaml --ckpt_path {checkpoint.best_model_path}")
        writer = _writer(trainer)
        if writer is None or self._before is None:
            return
        facts = pl_module.graph_facts
        with isolate_rng():
            after, labels = pl_module.embed_all()[0], facts.graph.y.cpu()
        shown = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:DRAWN]
        panels = {"before training": self._before[shown], "after training": after[shown]}
        figure = embedding_figure(panels, labels[shown], facts.class_names, len(labels))
        writer.add_figure("embeddings", figure, trainer.global_step)
        metadata = [_class_name(label, facts.class_names) for label in labels[shown].tolist()]
        writer.add_embedding(after[shown], metadata, global_step=trainer.global_step, tag="nodes")
        writer.flush()


def _writer(trainer: Trainer) -> Any | None:
    """Return TensorBoard's SummaryWriter, if the trainer logs to one."""
    return trainer.logger.experiment if isinstance(trainer.logger, TensorBoardLogger) else None


def _class_name(label: int, names: Sequence[str]) -> str:
    return names[label] if names else str(label)


def spectrum_figure(values: Tensor):
    """Draw the singular values of the base matrix, (q,), in falling order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained", dpi=110)
    axis = figure.subplots()
    axis.plot(range(1, len(values) + 1), values.cpu().numpy(), marker=".", linewidth=1)
    axis.set_xlabel("index")
    axis.set_ylabel("singular value")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    return figure


def embedding_figure(panels: dict[str, Tensor], labels: Tensor, names: Sequence[str] = (), total: int | None = None):
    """Draw t-SNE of some embeddings side by side, coloured by class.

    Args:
        panels: Title -> (n, D).
        labels: (n,).
        names: Names of all classes; numbers stand in the legend when empty.
        total: Number of nodes of the graph; n when None.
    """
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    classes = labels.unique().tolist()
    legend, size = len(classes) <= NAMED, 8 if len(labels) > 200 else 24
    figure = Figure(figsize=(4.6 * len(panels) + 1.6, 4.6), layout="constrained", dpi=110)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        perplexity = min(30.0, (len(values) - 1) / 3)
        points = TSNE(perplexity=perplexity, random_state=0, init="pca").fit_transform(values.numpy())
        if legend:
            for label, colour in zip(classes, _colours(len(classes)), strict=True):
                axis.scatter(*points[labels.numpy() == label].T, s=size, color=colour, linewidths=0)
        else:
            drawn = axis.scatter(*points.T, c=labels.numpy(), s=size, cmap="turbo", linewidths=0)
        axis.set_title(title, fontsize=11)
        axis.set_xticks([])
        axis.set_yticks([])
    if legend:
        shown = [_class_name(label, names) for label in classes]
        handles, style = axes[0].collections, {"markerscale": (48 / size) ** 0.5, "fontsize": 9, "frameon": False}
        figure.legend(handles, shown, title="class", loc="outside right center", **style)
    else:
        figure.colorbar(drawn, ax=axes, label=f"class ({len(classes)} in all)")
    part = f"{len(labels):,} of {total:,}" if total is not None and total > len(labels) else f"all {len(labels):,}"
    figure.suptitle(f"t-SNE of {part} nodes", fontsize=12)
    return figure


def _colours(number: int) -> list[Any]:
    from matplotlib import colormaps

    return list(colormaps["tab10" if number <= 10 else "tab20"].colors[:number])

"""What to look at while a graph module trains: similarities and weights of pairs, spectrum, embeddings in the plane."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

NODES = 400
"""Nodes among whose pairs the distributions are taken."""
DRAWN = 2000
"""Nodes in the picture; t-SNE takes seconds for so many."""


class GraphMonitor(Callback):
    """Write distributions of S and R, the spectrum, and embeddings before and after training to TensorBoard.

    Args:
        every_n_epochs: Epochs between two histograms.
        picture: Whether to draw t-SNE of the embeddings and to write them for the embedding projector.
    """

    def __init__(self, every_n_epochs: int = 20, picture: bool = True) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"Argument `every_n_epochs` expected to be at least 1 but got {every_n_epochs}.")
        self.every_n_epochs, self.picture = every_n_epochs, picture
        self._before: Tensor | None = None

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        writer = _writer(trainer)
        if writer is None:
            return
        if hasattr(pl_module, "factor_s"):
            writer.add_figure("spectrum", spectrum_figure(pl_module.factor_s), 0)
        if self.picture:
            with isolate_rng():
                self._before = pl_module.embed_all()[0]

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        writer = _writer(trainer)
        if writer is None or batch_idx or trainer.current_epoch % self.every_n_epochs or not hasattr(pl_module, "pairs"):
            return
        with isolate_rng():
            nodes = torch.randperm(batch.num_nodes, device=batch.x.device)[:NODES]
            pl_module.eval()
            found = pl_module.pairs(batch, nodes)
            pl_module.train()
        if found is None:  # no pseudo-labels yet
            return
        similarity, weights, positive = found
        own = torch.eye(len(nodes), dtype=torch.bool, device=nodes.device)
        for name, pairs in (("positives", positive & ~own), ("negatives", ~positive & ~own), ("own", own)):
            if pairs.any():
                writer.add_histogram(f"similarity/{name}", similarity[pairs], trainer.global_step)
                writer.add_histogram(f"R/{name}", weights[pairs], trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder, checkpoint = trainer.log_dir, trainer.checkpoint_callback  # of which all processes are asked
        if not trainer.is_global_zero:
            return
        if checkpoint is not None and getattr(checkpoint, "best_model_path", ""):
            score = float(checkpoint.best_model_score)
            rank_zero_info(
                f"Best {checkpoint.monitor} {score:.4f}: {checkpoint.best_model_path}; measure it on test nodes with"
            )
            rank_zero_info(f"  python train.py test --config {folder}/config.yaml --ckpt_path {checkpoint.best_model_path}")
        writer = _writer(trainer)
        if writer is None or self._before is None:
            return
        with isolate_rng():
            after, labels = pl_module.embed_all()[0], pl_module.graph.y.cpu()
        shown = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:DRAWN]
        panels = {"before training": self._before[shown], "after training": after[shown]}
        writer.add_figure("embeddings", embedding_figure(panels, labels[shown]), trainer.global_step)
        names = getattr(trainer.datamodule, "classes", None)
        metadata = [names[label] if names else str(label) for label in labels[shown].tolist()]
        writer.add_embedding(after[shown], metadata, global_step=trainer.global_step, tag="nodes")
        writer.flush()


def _writer(trainer: Trainer) -> Any | None:
    """TensorBoard's SummaryWriter, if the trainer logs to one."""
    experiment = getattr(trainer.logger, "experiment", None)
    return experiment if hasattr(experiment, "add_histogram") else None


def spectrum_figure(values: Tensor):
    """Singular values of the base matrix, (q,), in falling order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained", dpi=110)
    axis = figure.subplots()
    axis.plot(range(1, len(values) + 1), values.cpu().numpy(), marker=".", linewidth=1)
    axis.set_xlabel("index")
    axis.set_ylabel("singular value")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    return figure


def embedding_figure(panels: dict[str, Tensor], labels: Tensor):
    """t-SNE of some embeddings side by side, coloured by class.

    Args:
        panels: Title -> (n, D).
        labels: (n,).
    """
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    figure = Figure(figsize=(4.6 * len(panels), 4.4), layout="constrained", dpi=110)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        perplexity = min(30.0, (len(values) - 1) / 3)
        points = TSNE(perplexity=perplexity, random_state=0, init="pca").fit_transform(values.numpy())
        axis.scatter(*points.T, c=labels.numpy(), s=6, cmap="tab10" if int(labels.max()) < 10 else "tab20", linewidths=0)
        axis.set_title(title, fontsize=11)
        axis.set_xticks([])
        axis.set_yticks([])
    return figure

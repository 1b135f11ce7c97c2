"""CSG2L: contrast of a graph's local view with a low-rank global one, pairs reweighted by pseudo-labels (arXiv 2504.18148).

Loss = cross-entropy of the fused logits on labelled nodes + λ · reweighted InfoNCE between the hidden layers of the two views
+ cross-entropy of both views on the fused, class-balanced pseudo-labels. Where the paper's abstract is silent the definitions
are ours: functional/graph has them.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from functional.graph import (
    Factors,
    alignment_share,
    cluster,
    confident_share,
    pair_weights,
    pseudo_labels,
    reweighted_info_nce,
)
from lightning_modules.base.node import NodeModule
from lightning_modules.parts.csg2l_settings import (
    ClusteredLabels,
    Contrast,
    DropView,
    PredictedLabels,
    PseudoLabels,
    PseudoLabelsName,
    SvdView,
    View,
    ViewName,
)
from lightning_modules.parts.graph_encoders import GlobalOperator, GraphEncoder
from utilities.checks import check_integer, check_one_of, check_share
from utilities.choice import chosen

Fusion = Literal["mean", "local", "concat", "attention"]

MOVED = {
    "base": "view.base (SvdView)",
    "rank": "view.rank (SvdView)",
    "mix": "view.mix (SvdView)",
    "diffusion_steps": "view.diffusion_steps (SvdView)",
    "seed": "view.seed (SvdView)",
    "drop_edges": "view.edges (DropView)",
    "drop_features": "view.features (DropView)",
    "contrast_weight": "contrast.weight",
    "form": "contrast.form",
    "beta": "contrast.beta",
    "reweight": "contrast.reweight",
    "temperature": "contrast.temperature",
    "intra_view": "contrast.intra_view",
    "head_channels": "contrast.head_channels",
    "anchors": "contrast.anchors",
    "pseudo_weight": "pseudo_labels.weight (PredictedLabels)",
    "alignment": "pseudo_labels.alignment (PredictedLabels)",
    "confident": "pseudo_labels.confident (PredictedLabels)",
    "warmup_epochs": "pseudo_labels.warmup_epochs (PredictedLabels)",
    "cluster_every": "pseudo_labels.every (ClusteredLabels)",
}
"""Earlier settings of `CSG2L` and where they are now, for the command line's error."""


class CSG2L(NodeModule):
    """Semi-supervised or self-supervised graph contrastive learning, on any encoder.

    Args:
        encoder: gcn, gat, graphsage, gin, appnp, sgc, pna, edgecnn, or the path of a class.
        hidden_channels: Width of the hidden layer, where the views are contrasted.
        num_layers: Number of layers of the encoder.
        dropout: Share of the features and of the hidden layer that is dropped.
        encoder_args: Further arguments of the encoder.
        view: What the local view is contrasted with: svd (the default) or drop, or a class with settings: SvdView, DropView.
        fusion: How the logits of both views become one: mean, local, concat, attention (a gate a node). With logits only.
        contrast: Settings of the contrast of both views.
        pseudo_labels: Where labels of unlabelled nodes come from: predicted (the default) or, without supervision, clustered;
            or a class with settings: PredictedLabels, ClusteredLabels.
        supervised: Whether there are logits and a cross-entropy; False for the contrast alone.
        learning_rate: Learning rate of Adam.
        weight_decay: Weight decay of Adam.

    Raises:
        ValueError: If a setting is out of range, or does not apply beside the others.
    """

    def __init__(
        self,
        encoder: str = "gcn",
        hidden_channels: int = 64,
        num_layers: int = 2,
        dropout: float = 0.5,
        encoder_args: dict[str, Any] | None = None,
        view: ViewName | View = "svd",
        fusion: Fusion = "mean",
        contrast: Contrast | None = None,
        pseudo_labels: PseudoLabelsName | PseudoLabels | None = None,
        supervised: bool = True,
        learning_rate: float = 0.01,
        weight_decay: float = 5e-4,
    ) -> None:
        super().__init__(learning_rate, weight_decay)
        check_integer("hidden_channels", hidden_channels, 1)
        check_integer("num_layers", num_layers, 2)
        check_share("dropout", dropout)
        check_one_of("fusion", fusion, get_args(Fusion))
        self.supervised, self.view, self.contrast = supervised, chosen("view", view, View), contrast or Contrast()
        self.pseudo_labels = _pseudo_labels_of(pseudo_labels, supervised)
        if not supervised and fusion != "mean":
            raise ValueError(
                f"Argument `fusion` = {fusion!r} joins the logits of both views, but with `supervised` = False there are none. "
                "Leave it out."
            )
        if not supervised and not self.contrast.weight:
            raise ValueError(
                "Argument `contrast.weight` expected to be above 0 with `supervised` = False but got 0: nothing is left to "
                "learn from. Raise it."
            )
        groups = {"view": self.view, "contrast": self.contrast, "pseudo_labels": self.pseudo_labels}
        self.draws_edges, self.warmup_epochs = self.view.draws_edges, self.pseudo_labels.warmup_epochs
        self.save_hyperparameters(ignore=list(groups))
        self.save_hyperparameters({name: group.as_dict() for name, group in groups.items()})  # a checkpoint holds plain values
        self.alignment_share = 0.0
        self._operator: tuple[Tensor, GlobalOperator] | None = None

    def build(self, data: Data, num_classes: int) -> None:
        """Make encoder, heads, and the factors of the whole graph as buffers: moved, saved and resumed with the module."""
        options = self.hparams
        classes = num_classes if options.supervised else 0
        self.encoder = GraphEncoder(
            options.encoder,
            data.x.shape[1],
            options.hidden_channels,
            classes,
            options.num_layers,
            options.dropout,
            options.encoder_args,
        )
        width = options.hidden_channels
        if options.fusion == "concat" and classes:
            self.fuse = nn.Linear(2 * classes, classes)
        elif options.fusion == "attention" and classes:
            self.fuse = nn.Linear(2 * width, 1)
        self.head: nn.Module = nn.Identity()
        if projected := self.contrast.head_channels:
            self.head = nn.Sequential(nn.Linear(width, projected), nn.ELU(), nn.Linear(projected, projected))
        if not self.contrast.weight:
            self.head.requires_grad_(False)  # several processes would wait for its gradients
        if isinstance(self.view, SvdView):
            for name, value in self.view.factors(data)._asdict().items():
                self.register_buffer(f"factor_{name}", value)
        if isinstance(self.pseudo_labels, PredictedLabels):
            self.alignment_share = alignment_share(self.pseudo_labels.alignment, int(data.train_mask.sum()), num_classes)
        self.register_buffer("clusters", torch.full((data.num_nodes,), -1, dtype=torch.long))
        self.register_buffer("closeness", torch.zeros(data.num_nodes))

    def operator(self, batch: Data) -> GlobalOperator:
        """Return the global view's propagation on a batch; kept for the next step on the same graph."""
        if self._operator is None or self._operator[0] is not batch.edge_index:
            with torch.inference_mode(False):  # training uses what validation may have made
                u, s, v = self.factor_u, self.factor_s, self.factor_v
                factors = Factors(u[batch.node_ids], s, v[batch.node_ids])
                operator = GlobalOperator(batch.edge_index, batch.num_nodes, factors, self.view.mix)
            self._operator = batch.edge_index, operator
        return self._operator[1]

    def views(self, batch: Data) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Compute hidden layer (N, H) and logits (N, C) of the local and of the other view."""
        x = self.features(batch)
        local = self.encoder(x, batch.edge_index, self.local_operator(batch))
        if not isinstance(self.view, DropView):
            return local, self.encoder(x, batch.edge_index, self.operator(batch))
        return local, self.encoder(*self.view.draw(x, batch.edge_index)) if self.training else local

    def fused(self, local: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None]) -> Tensor | None:
        """Join the logits (N, C) of both views."""
        if local[1] is None:
            return None
        if self.hparams.fusion == "local":
            return local[1]
        if self.hparams.fusion == "mean":
            return (local[1] + other[1]) / 2
        if self.hparams.fusion == "concat":
            return self.fuse(torch.cat([local[1], other[1]], dim=1))
        gate = self.fuse(torch.cat([local[0], other[0]], dim=1)).sigmoid()
        return gate * local[1] + (1 - gate) * other[1]

    def encode(self, batch: Data) -> tuple[Tensor, Tensor | None]:
        """Return embeddings, the mean of the hidden layers of both views, and logits."""
        local, other = self.views(batch)
        return (local[0] + other[0]) / 2, self.fused(local, other)

    @property
    def needs_labels(self) -> bool:
        """Whether a batch without labelled nodes teaches nothing, as is so without the contrast."""
        return not self.contrast.weight

    def losses(self, batch: Data, epoch: int) -> dict[str, Tensor]:
        """Compute the cross-entropy on labelled nodes, the contrast, and the cross-entropy on pseudo-labels."""
        found: dict[str, Tensor] = {}
        local, other = self.views(batch)
        logits, loss = self.fused(local, other), 0.0
        labels, confident = self.trusted(batch, logits, epoch)
        if logits is not None:
            found["cross_entropy"] = loss = self.cross_entropy(batch, logits, batch.y, batch.train_mask)
        if self.contrast.weight:
            found["contrast"] = self.contrastive_loss(local[0], other[0], labels, confident)
            loss = loss + self.contrast.weight * found["contrast"]
        if isinstance(self.pseudo_labels, PredictedLabels) and self.pseudo_labels.weight and labels is not None:
            taught = confident & ~batch.train_mask
            pseudo = sum(self.cross_entropy(batch, view[1], labels, taught) for view in (local, other)) / 2
            found["pseudo_cross_entropy"] = pseudo
            loss = loss + self.pseudo_labels.weight * pseudo
        if confident is not None:
            found["confident_share"] = confident.float().mean()
        return found | {"loss": loss}

    def contrastive_loss(self, local: Tensor, other: Tensor, labels: Tensor | None, confident: Tensor | None) -> Tensor:
        """Compute the reweighted InfoNCE between the projected hidden layers."""
        options = self.contrast
        z_a, z_b = (nn.functional.normalize(self.head(hidden)) for hidden in (local, other))
        anchors = None
        if 0 < options.anchors < len(z_a):
            anchors = torch.randperm(len(z_a), device=z_a.device)[: options.anchors]
        return reweighted_info_nce(
            z_a,
            z_b,
            labels,
            confident,
            options.form,
            options.beta,
            options.temperature,
            options.reweight,
            options.intra_view,
            anchors,
        )

    def spectrum(self) -> Tensor | None:
        """Return the singular values (q,) of the base matrix; None for views that have none."""
        return self.factor_s if isinstance(self.view, SvdView) else None

    @torch.no_grad()
    def pairs(self, batch: Data, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return similarities, weights and positives of all pairs of some nodes, (n, n) each; None without pseudo-labels."""
        local, other = self.views(batch)
        labels, confident = self.trusted(batch, self.fused(local, other), self.current_epoch)
        if labels is None:
            return None
        z_a, z_b = (nn.functional.normalize(self.head(hidden)) for hidden in (local[0], other[0]))
        return pair_weights(z_a[nodes], z_b[nodes], labels[nodes], confident[nodes], self.contrast.beta)

    def trusted(self, batch: Data, logits: Tensor | None, epoch: int) -> tuple[Tensor | None, Tensor | None]:
        """Return pseudo-labels (N,) and the confident set (N,), or None for both while warming up."""
        if epoch < self.warmup_epochs:
            return None, None
        if logits is not None:
            labels, confidence = pseudo_labels(logits, batch.y, batch.train_mask, self.alignment_share)
            classes = logits.shape[1]
        else:
            labels, confidence = self.clusters[batch.node_ids], self.closeness[batch.node_ids]
            classes = self.num_classes
        return labels, confident_share(confidence, labels, self.pseudo_labels.confident, classes)

    def on_train_epoch_start(self) -> None:
        """Cluster the embeddings now and then, where there are no labels."""
        super().on_train_epoch_start()
        since = self.current_epoch - self.warmup_epochs
        if not isinstance(self.pseudo_labels, ClusteredLabels) or since < 0:
            return
        if since % self.pseudo_labels.every and int(self.clusters[0]) >= 0:
            return
        found = None
        if self.trainer.is_global_zero:
            found = cluster(self.embed_all()[0], self.num_classes, self.pseudo_labels.seed)
        labels, closeness = self.trainer.strategy.broadcast(found)
        self.clusters.copy_(labels)
        self.closeness.copy_(closeness)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Forget the operator, since other factors are loaded next."""
        super().on_load_checkpoint(checkpoint)
        self._operator = None


def _pseudo_labels_of(given: PseudoLabelsName | PseudoLabels | None, supervised: bool) -> PseudoLabels:
    """Choose the pseudo-labels, by default those that supervision allows; refuse those that it does not."""
    if given is None:
        return PredictedLabels() if supervised else ClusteredLabels()
    found = chosen("pseudo_labels", given, PseudoLabels)
    if isinstance(found, PredictedLabels) != supervised:
        name, other = ("predicted", "True") if supervised else ("clustered", "False")
        raise ValueError(
            f"Argument `pseudo_labels` expected {name} with `supervised` = {other} but got {found.short}. Leave it out, or set "
            f"supervised to {not supervised}."
        )
    return found

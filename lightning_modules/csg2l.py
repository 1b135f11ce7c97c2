"""CSG2L: contrast of a graph's local view with a low-rank global one, pairs reweighted by pseudo-labels (arXiv 2504.18148).

Loss = cross-entropy of the fused logits on labelled nodes + λ · reweighted InfoNCE between the hidden layers of the two views
+ cross-entropy of both views on the fused, class-balanced pseudo-labels. Where the paper's abstract is silent the definitions
are ours: functional/graph has them.
"""

from typing import Any, Literal, get_args

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch_geometric.data import Data

from functional.graph import (
    alignment_share,
    balanced_logits,
    cluster,
    confident_above_mean,
    confident_share,
    node_weights,
    pair_weights,
    pseudo_labels,
    reweighted_info_nce,
)
from lightning_modules.base.viewed import ViewedModule
from lightning_modules.parts.csg2l_settings import (
    ClusteredLabels,
    Contrast,
    PredictedLabels,
    PseudoLabels,
    PseudoLabelsName,
    pseudo_labels_of,
)
from lightning_modules.parts.csg2l_views import DropView, LocalView, LocalViewName, SvdView, View, ViewName
from lightning_modules.parts.graph_encoders import GraphEncoder
from lightning_modules.parts.graph_operators import GlobalOperator
from utilities.checks import check_integer, check_one_of, check_share
from utilities.choice import chosen

DRAWS = 8
"""Graphs without some edges that are drawn beforehand for an encoder that propagates once; each step takes one of them."""

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


class CSG2L(ViewedModule):
    """Semi-supervised or self-supervised graph contrastive learning, on any encoder.

    Args:
        encoder: gcn, gat, graphsage, gin, appnp, sgc, pna, edgecnn, decoupled (features propagated once, then an MLP), or the
            path of a class.
        hidden_channels: Width of the hidden layer, where the views are contrasted.
        num_layers: Number of layers of the encoder.
        dropout: Share of the features and of the hidden layer that is dropped.
        encoder_args: Further arguments of the encoder.
        view: What the local view is contrasted with: svd (the default), knn or drop, or a class with settings: SvdView,
            KnnView, DropView.
        local_view: What the local view propagates by: edges (the default), purified or mlp (no edges), or a class with
            settings: EdgesView, PurifiedView, MlpView.
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
        local_view: LocalViewName | LocalView = "edges",
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
        self.local_view = chosen("local_view", local_view, LocalView)
        self.pseudo_labels = pseudo_labels_of(pseudo_labels, supervised)
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
        groups = {name: getattr(self, name) for name in ("view", "local_view", "contrast", "pseudo_labels")}
        self.draws_edges, self.warmup_epochs = self.view.draws_edges, self.pseudo_labels.warmup_epochs
        self.save_hyperparameters(ignore=list(groups))
        self.save_hyperparameters({name: group.as_dict() for name, group in groups.items()})  # a checkpoint holds plain values
        self.alignment_share = 0.0
        self._clean: tuple[Tensor, tuple[int, ...], Tensor] | None = None
        self._keeps = True

    def setup(self, stage: str) -> None:
        """Keep no pass of validation where it is that of averaged weights, which come and go without a trace."""
        super().setup(stage)
        self._keeps = not any(isinstance(callback, WeightAveraging) for callback in self.trainer.callbacks)

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
        self.register_views(data)
        if self.encoder.decoupled:
            local = self.operator(data, "local_") or GlobalOperator(data.edge_index, data.num_nodes)
            self.prepare([(data.x, local), *self._other_views(data)])
            self._operators.clear()
        if isinstance(self.pseudo_labels, PredictedLabels):
            self.alignment_share = alignment_share(self.pseudo_labels.alignment, int(data.train_mask.sum()), num_classes)
        self.register_buffer("clusters", torch.full((data.num_nodes,), -1, dtype=torch.long))
        self.register_buffer("closeness", torch.zeros(data.num_nodes))

    @property
    def _views(self) -> dict[str, View | LocalView]:
        """Both views, by the prefix of their buffers."""
        return {"": self.view, "local_": self.local_view}

    def _other_views(self, data: Data) -> list[tuple[Tensor, GlobalOperator]]:
        """Return features and operator of the other view of a whole graph; of a view that draws edges, those of some draws."""
        if not isinstance(self.view, DropView):
            return [(data.x, self.operator(data))]
        draws = [self.view.draw(data.x, data.edge_index) for _ in range(DRAWS)]
        return [(x, GlobalOperator(edges, data.num_nodes)) for x, edges in draws]

    def views(
        self, batch: Data, rows: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Compute hidden layer (N, H) and logits (N, C) of the local and of the other view; decoupled, of some rows alone."""
        if self.encoder.decoupled:  # both in one pass
            number = 1
            if isinstance(self.view, DropView):
                number = int(torch.randint(1, 1 + DRAWS, ())) if self.training else 0
            inputs = [self.prepared(batch, 0), self.prepared(batch, number)]
            if rows is not None:
                inputs = [x[rows] for x in inputs]
            hidden, logits = self.encoder(torch.cat(inputs), batch.edge_index)
            first, second = (hidden.chunk(2), (None, None) if logits is None else logits.chunk(2))
            return (first[0], second[0]), (first[1], second[1])
        x = self.features(batch)
        local = self.encoder(x, batch.edge_index, self.operator(batch, "local_"))
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
        logits = self.fused(local, other)
        if not self.training and logits is not None and self._keeps:
            # Validation's pass is the next step's teacher. The edges are held, so that no later batch has their identity.
            self._clean = batch.edge_index, self._versions(), logits.detach()
        return (local[0] + other[0]) / 2, logits

    @property
    def needs_labels(self) -> bool:
        """Whether a batch without labelled nodes teaches nothing, as is so without the contrast."""
        return not self.contrast.weight

    def losses(self, batch: Data, epoch: int) -> dict[str, Tensor]:
        """Compute the cross-entropy on labelled nodes, the contrast, and the cross-entropy on pseudo-labels."""
        found: dict[str, Tensor] = {}
        rows, y, known = None, batch.y, batch.train_mask
        if self._labels_first(batch, epoch):
            labels, confident = self.trusted(batch, self.clean_logits(batch) if epoch >= self.warmup_epochs else None, epoch)
            rows = (known if confident is None else known | confident).nonzero()[:, 0]
        local, other = self.views(batch, rows)
        logits, loss = self.fused(local, other), 0.0
        if rows is None:
            labels, confident = self.trusted(batch, self.taught_by(batch, logits, epoch), epoch)
        if confident is not None:
            found["confident_share"] = confident.float().mean()
        if rows is not None:
            y, known, labels, confident = (x if x is None else x[rows] for x in (y, known, labels, confident))
        if logits is not None:
            found["cross_entropy"] = loss = self.cross_entropy(batch, logits, y, known)
        if self.contrast.weight:
            found["contrast"] = self.contrastive_loss(local[0], other[0], labels, confident)
            loss = loss + self.contrast.weight * found["contrast"]
        if isinstance(self.pseudo_labels, PredictedLabels) and self.pseudo_labels.weight and labels is not None:
            taught = confident & ~known
            given = [view[1] for view in (local, other)]
            if self.pseudo_labels.balanced:
                given = [balanced_logits(values, labels, taught) for values in given]
            weights = None
            if self.pseudo_labels.beta:
                z_a, z_b = (nn.functional.normalize(view[0].float()) for view in (local, other))
                weights = node_weights(z_a, z_b, labels, confident, taught, given[0].shape[1], self.pseudo_labels.beta)
            pseudo = sum(self.cross_entropy(batch, values, labels, taught, weights) for values in given) / 2
            found["pseudo_cross_entropy"] = pseudo
            loss = loss + self.pseudo_labels.weight * pseudo
        return found | {"loss": loss}

    def _labels_first(self, batch: Data, epoch: int) -> bool:
        """Tell whether a step can leave out nodes that teach nothing: each is encoded alone, and labels need no other pass.

        On a CPU, since a GPU would wait for the number of rows. With weights of nodes all that are trusted count.
        """
        options = self.pseudo_labels
        alone = self.encoder.decoupled and self.training and not self.contrast.weight and batch.x.device.type == "cpu"
        first = isinstance(options, PredictedLabels) and options.clean and not options.beta
        return alone and (epoch < self.warmup_epochs or first)

    def taught_by(self, batch: Data, logits: Tensor | None, epoch: int) -> Tensor | None:
        """Return the logits (N, C) that pseudo-labels are made of: the fused ones, or those of a pass without dropout."""
        if logits is None or epoch < self.warmup_epochs or not self.pseudo_labels.clean or not self.training:
            return logits
        return self.clean_logits(batch)

    def clean_logits(self, batch: Data) -> Tensor:
        """Return the fused logits (N, C) of a pass without dropout: validation's, where nothing has moved since."""
        captured = batch.x.is_cuda and torch.cuda.is_current_stream_capturing()  # a CUDA graph needs the pass within itself
        if self._clean is not None and not captured:
            edges, versions, logits = self._clean
            if edges is batch.edge_index and versions == self._versions():
                return logits
        self.eval()
        with torch.no_grad():
            logits = self.encode(batch)[1]
        self.train()
        return logits

    def _versions(self) -> tuple[int, ...]:
        """Count the updates of each parameter."""
        return tuple(parameter._version for parameter in self.parameters())

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
        if self.pseudo_labels.confident == "mean":
            return labels, confident_above_mean(confidence, batch.train_mask)
        return labels, confident_share(confidence, labels, self.pseudo_labels.confident, classes)

    def on_train_epoch_start(self) -> None:
        """Cluster the embeddings now and then, where there are no labels."""
        super().on_train_epoch_start()
        if self.clusters_due(self.current_epoch):
            found = self.clustered(self.embed_all()[0]) if self.trainer.is_global_zero else None
            self.take_clusters(*self.trainer.strategy.broadcast(found))

    def clusters_due(self, epoch: int) -> bool:
        """Tell whether an epoch begins with new clusters."""
        since = epoch - self.warmup_epochs
        if not isinstance(self.pseudo_labels, ClusteredLabels) or since < 0:
            return False
        return since % self.pseudo_labels.every == 0 or int(self.clusters[0]) < 0

    def clustered(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Return clusters (N,) of embeddings (N, H) and the closeness (N,) of nodes to their centroid."""
        return cluster(embeddings, self.num_classes, self.pseudo_labels.seed)

    def take_clusters(self, labels: Tensor, closeness: Tensor) -> None:
        """Let these clusters (N,) and their closeness (N,) be the pseudo-labels."""
        self.clusters.copy_(labels)
        self.closeness.copy_(closeness)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Forget the pass without dropout, since other weights are loaded next."""
        super().on_load_checkpoint(checkpoint)
        self._clean = None

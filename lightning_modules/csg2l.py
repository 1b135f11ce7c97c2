"""CSG2L: contrast of a graph's local view with a low-rank global one, pairs reweighted by pseudo-labels (arXiv 2504.18148).

Loss = cross-entropy of the fused logits on labelled nodes + λ · reweighted InfoNCE between the hidden layers of the two views
+ cross-entropy of both views on the fused, class-balanced pseudo-labels. Where the paper's abstract is silent the definitions
are ours: functional/graph has them.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.utils import dropout_edge

from functional.graph import (
    Factors,
    alignment_share,
    cluster,
    confident_share,
    low_rank_factors,
    pair_weights,
    pseudo_labels,
    reweighted_info_nce,
)
from functional.graph.contrast import FORMS, Form
from functional.graph.low_rank import BASES, Base
from lightning_modules.base.node import NodeModule
from lightning_modules.parts.graph_encoders import GlobalOperator, GraphEncoder, drop_columns

Fusion = Literal["mean", "local", "concat", "attention"]


class CSG2L(NodeModule):
    """Semi-supervised or self-supervised graph contrastive learning, on any encoder.

    Args:
        encoder: gcn, gat, graphsage, gin, appnp, sgc, pna, edgecnn, or the path of a class.
        hidden_channels: Width of the hidden layer, where the views are contrasted.
        num_layers: Of the encoder.
        dropout: Of features and hidden layer.
        encoder_args: Further arguments of the encoder.
        view: What the local view is contrasted with: `svd`, or `drop`, randomly dropped edges and features.
        base: Matrix of which the factors are: normalized, regularized, diffused.
        rank: q, at most the number of nodes.
        mix: μ, share of the low-rank part in the global operator; the rest is Ã.
        diffusion_steps: k of `diffused`.
        drop_edges: Share of edges that `drop` leaves out.
        drop_features: Share of features that `drop` sets to zero.
        fusion: How logits of both views become one: mean, local, concat, attention (a gate a node).
        head_channels: Width of the projection head between hidden layer and contrast; 0 for none.
        contrast_weight: λ; 0 trains the fused encoder alone.
        form: Where the weights R enter: hsan, negatives, multi_positive.
        beta: Exponent of R.
        reweight: Pairs that R weighs: both, positives, negatives.
        temperature: τ.
        intra_view: Whether pairs within a view are negatives too.
        pseudo_weight: Weight of the cross-entropy of each view's logits on the pseudo-labels of confident nodes: the fused
            prediction teaches both views. 0 for none.
        alignment: a, how much a prior of equally frequent classes corrects the pseudo-labels: it counts as so many labels of
            each class, so its share a / (a + labels a class) is large only while labels are few. 0 for none.
        confident: Share of the nodes that is trusted, as many of each pseudo-class: the set C.
        warmup_epochs: Epochs of plain InfoNCE and cross-entropy, before pseudo-labels are worth something.
        anchors: Nodes drawn in each step whose rows of S count; 0 for all.
        cluster_every: Without labels: epochs between two runs of k-means.
        supervised: Whether there are logits and a cross-entropy; False for the contrast alone.
        learning_rate: Of Adam.
        weight_decay: Of Adam.
        seed: Of the factors and of k-means.
    """

    def __init__(
        self,
        encoder: str = "gcn",
        hidden_channels: int = 64,
        num_layers: int = 2,
        dropout: float = 0.5,
        encoder_args: dict[str, Any] | None = None,
        view: Literal["svd", "drop"] = "svd",
        base: Base = "regularized",
        rank: int = 100,
        mix: float = 0.2,
        diffusion_steps: int = 2,
        drop_edges: float = 0.3,
        drop_features: float = 0.3,
        fusion: Fusion = "mean",
        head_channels: int = 64,
        contrast_weight: float = 0.3,
        form: Form = "multi_positive",
        beta: float = 1.0,
        reweight: Literal["both", "positives", "negatives"] = "both",
        temperature: float = 0.5,
        intra_view: bool = False,
        pseudo_weight: float = 1.0,
        alignment: float = 2.0,
        confident: float = 0.8,
        warmup_epochs: int = 60,
        anchors: int = 256,
        cluster_every: int = 20,
        supervised: bool = True,
        learning_rate: float = 0.01,
        weight_decay: float = 5e-4,
        seed: int = 0,
    ) -> None:
        super().__init__(learning_rate, weight_decay)
        choices = {"view": (view, ("svd", "drop")), "base": (base, BASES), "form": (form, FORMS)}
        choices["fusion"] = (fusion, ("mean", "local", "concat", "attention"))
        for name, (value, accepted) in choices.items():
            if value not in accepted:
                raise ValueError(f"Argument `{name}` expected to be one of {', '.join(accepted)} but got {value!r}.")
        for name, value in (
            ("mix", mix),
            ("confident", confident),
            ("drop_edges", drop_edges),
            ("drop_features", drop_features),
            ("dropout", dropout),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"Argument `{name}` expected to be in [0, 1] but got {value}.")
        least = {"rank": 1, "hidden_channels": 1, "head_channels": 0, "anchors": 0, "warmup_epochs": 0, "cluster_every": 1}
        least |= {"pseudo_weight": 0, "contrast_weight": 0, "alignment": 0, "beta": 0, "diffusion_steps": 1, "num_layers": 2}
        if not temperature > 0:
            raise ValueError(f"Argument `temperature` expected to be above 0 but got {temperature}; 0.5 is usual.")
        for name, limit in least.items():
            if not (value := locals()[name]) >= limit:
                raise ValueError(f"Argument `{name}` expected to be at least {limit} but got {value}.")
        if not supervised and contrast_weight == 0:
            raise ValueError("With `supervised` = False and `contrast_weight` = 0 nothing is left to learn from.")
        self.save_hyperparameters()
        self.supervised = supervised

    def build(self, data: Data, num_classes: int) -> None:
        """Encoder, heads, and the factors of the whole graph as buffers: moved, saved and resumed with the module."""
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
        if options.head_channels:
            self.head = nn.Sequential(
                nn.Linear(width, options.head_channels), nn.ELU(), nn.Linear(options.head_channels, options.head_channels)
            )
        if not options.contrast_weight:
            self.head.requires_grad_(False)  # several processes would wait for its gradients
        if options.view == "svd":
            factors = low_rank_factors(
                data.edge_index,
                data.num_nodes,
                options.rank,
                options.base,
                steps=options.diffusion_steps,
                seed=options.seed,
            )
            for name, value in factors._asdict().items():
                self.register_buffer(f"factor_{name}", value)
        self.alignment_share = alignment_share(options.alignment, int(data.train_mask.sum()), num_classes)
        self.register_buffer("clusters", torch.full((data.num_nodes,), -1, dtype=torch.long))
        self.register_buffer("closeness", torch.zeros(data.num_nodes))
        self._operator: tuple[Tensor, GlobalOperator] | None = None

    def operator(self, batch: Data) -> GlobalOperator:
        """The global view's propagation on a batch; kept for the next step on the same graph."""
        if self._operator is None or self._operator[0] is not batch.edge_index:
            with torch.inference_mode(False):  # training uses what validation may have made
                u, s, v = self.factor_u, self.factor_s, self.factor_v
                factors = Factors(u[batch.node_ids], s, v[batch.node_ids])
                operator = GlobalOperator(batch.edge_index, batch.num_nodes, factors, self.hparams.mix)
            self._operator = batch.edge_index, operator
        return self._operator[1]

    def views(self, batch: Data) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Hidden (N, H) and logits (N, C) of the local and of the other view."""
        x = self.features(batch)
        local = self.encoder(x, batch.edge_index, self.local_operator(batch))
        if self.hparams.view == "svd":
            return local, self.encoder(x, batch.edge_index, self.operator(batch))
        if not self.training:
            return local, local
        edges = dropout_edge(batch.edge_index, self.hparams.drop_edges, force_undirected=True)[0]
        return local, self.encoder(drop_columns(x, self.hparams.drop_features), edges)

    def fused(self, local: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None]) -> Tensor | None:
        """Logits (N, C) of both views as one."""
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
        """Embeddings are the mean of the hidden layers of both views."""
        local, other = self.views(batch)
        return (local[0] + other[0]) / 2, self.fused(local, other)

    @property
    def needs_labels(self) -> bool:
        """Only without the contrast."""
        return not self.hparams.contrast_weight

    def losses(self, batch: Data, epoch: int) -> dict[str, Tensor]:
        """Cross-entropy on labelled nodes, contrast, cross-entropy on pseudo-labels."""
        options, found = self.hparams, {}
        local, other = self.views(batch)
        logits, loss = self.fused(local, other), 0.0
        labels, confident = self.trusted(batch, logits, epoch)
        if logits is not None:
            found["cross_entropy"] = loss = self.cross_entropy(batch, logits, batch.y, batch.train_mask)
        if options.contrast_weight:
            found["contrast"] = self.contrast(local[0], other[0], labels, confident)
            loss = loss + options.contrast_weight * found["contrast"]
        if options.pseudo_weight and logits is not None and labels is not None:
            taught = confident & ~batch.train_mask
            pseudo = sum(self.cross_entropy(batch, view[1], labels, taught) for view in (local, other)) / 2
            found["pseudo_cross_entropy"] = pseudo
            loss = loss + options.pseudo_weight * pseudo
        if confident is not None:
            found["confident_share"] = confident.float().mean()
        return found | {"loss": loss}

    def contrast(self, local: Tensor, other: Tensor, labels: Tensor | None, confident: Tensor | None) -> Tensor:
        """Reweighted InfoNCE between the projected hidden layers."""
        options = self.hparams
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

    @torch.no_grad()
    def pairs(self, batch: Data, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Similarities, weights and positives of all pairs of some nodes, (n, n) each; None without pseudo-labels."""
        local, other = self.views(batch)
        labels, confident = self.trusted(batch, self.fused(local, other), self.current_epoch)
        if labels is None:
            return None
        z_a, z_b = (nn.functional.normalize(self.head(hidden)) for hidden in (local[0], other[0]))
        return pair_weights(z_a[nodes], z_b[nodes], labels[nodes], confident[nodes], self.hparams.beta)

    def trusted(self, batch: Data, logits: Tensor | None, epoch: int) -> tuple[Tensor | None, Tensor | None]:
        """Pseudo-labels (N,) and the confident set (N,), or None for both while warming up."""
        if epoch < self.hparams.warmup_epochs:
            return None, None
        if logits is not None:
            labels, confidence = pseudo_labels(logits, batch.y, batch.train_mask, self.alignment_share)
            classes = logits.shape[1]
        else:
            labels, confidence = self.clusters[batch.node_ids], self.closeness[batch.node_ids]
            classes = self.num_classes
        return labels, confident_share(confidence, labels, self.hparams.confident, classes)

    def on_train_epoch_start(self) -> None:
        """Without labels, cluster the embeddings now and then."""
        super().on_train_epoch_start()
        since = self.current_epoch - self.hparams.warmup_epochs
        if self.supervised or since < 0 or (since % self.hparams.cluster_every and int(self.clusters[0]) >= 0):
            return
        found = None
        if self.trainer.is_global_zero:
            found = cluster(self.embed_all()[0], self.num_classes, self.hparams.seed)
        labels, closeness = self.trainer.strategy.broadcast(found)
        self.clusters.copy_(labels)
        self.closeness.copy_(closeness)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Its factors are loaded next."""
        super().on_load_checkpoint(checkpoint)
        self._operator = None

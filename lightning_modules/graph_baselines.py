"""Baselines of CSG2L on the same data, encoders and measures: supervised GNN, pseudo-labels, DGI, GRACE."""

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import DeepGraphInfomax
from torch_geometric.utils import dropout_edge

from functional.graph import alignment_share, confident_share, pseudo_labels, reweighted_info_nce
from lightning_modules.base.viewed import ViewedModule
from lightning_modules.parts.csg2l_views import EdgesView, LocalView, LocalViewName
from lightning_modules.parts.graph_encoders import GraphEncoder, drop_columns
from lightning_modules.parts.graph_operators import GlobalOperator
from utilities.choice import chosen


class _Encoded(ViewedModule):
    """One encoder and one view."""

    local_view: LocalView = EdgesView()

    @property
    def _views(self) -> dict[str, LocalView]:
        return {"local_": self.local_view}

    def build(self, data: Data, num_classes: int) -> None:
        """Make the encoder; with logits where supervised."""
        options, classes = self.hparams, num_classes if self.supervised else 0
        self.encoder = GraphEncoder(
            options.encoder,
            data.x.shape[1],
            options.hidden_channels,
            classes,
            options.num_layers,
            options.dropout,
            options.encoder_args,
        )
        self.register_views(data)
        if self.encoder.decoupled:
            if not self.supervised:
                raise ValueError(
                    f"Argument `encoder` of {type(self).__name__} expected one that propagates in each step but got "
                    "'decoupled'. Use gcn."
                )
            local = self.operator(data, "local_") or GlobalOperator(data.edge_index, data.num_nodes)
            self.prepare([(data.x, local)])
            self._operators.clear()

    def encode(self, batch: Data) -> tuple[Tensor, Tensor | None]:
        """Return hidden layer and logits."""
        return self.encoder(self.features(batch), batch.edge_index, self.operator(batch, "local_"))


class NodeClassifier(_Encoded):
    """A GNN trained on the labelled nodes; optionally with cross-entropy on its own confident predictions (Lee, 2013).

    Args:
        encoder: Name of an encoder, or path of a class, as for CSG2L.
        hidden_channels: Width of the hidden layer.
        num_layers: Number of layers of the encoder.
        dropout: Share of the features and of the hidden layer that is dropped.
        encoder_args: Further arguments of the encoder.
        local_view: What it propagates by: edges (the default), purified (a GCN is GCN-SVD then, Entezari et al., WSDM 2020) or
            mlp, as for CSG2L, or a class with settings: EdgesView, PurifiedView, MlpView.
        pseudo_weight: Weight of the cross-entropy on pseudo-labels; 0 for none.
        alignment: Correction of pseudo-labels towards equally frequent classes, as for CSG2L's PredictedLabels.
        confident: Share of the nodes that is trusted, as many of each class.
        warmup_epochs: Number of epochs without pseudo-labels.
        learning_rate: Learning rate of Adam.
        weight_decay: Weight decay of Adam.
    """

    needs_labels = True

    def __init__(
        self,
        encoder: str = "gcn",
        hidden_channels: int = 64,
        num_layers: int = 2,
        dropout: float = 0.5,
        encoder_args: dict[str, Any] | None = None,
        local_view: LocalViewName | LocalView = "edges",
        pseudo_weight: float = 0.0,
        alignment: float = 2.0,
        confident: float = 0.8,
        warmup_epochs: int = 50,
        learning_rate: float = 0.01,
        weight_decay: float = 5e-4,
    ) -> None:
        super().__init__(learning_rate, weight_decay)
        self.local_view = chosen("local_view", local_view, LocalView)
        self.save_hyperparameters(ignore=["local_view"])
        self.save_hyperparameters({"local_view": self.local_view.as_dict()})  # a checkpoint holds plain values
        self.warmup_epochs = warmup_epochs if pseudo_weight else 0
        self.alignment_share = 0.0

    def build(self, data: Data, num_classes: int) -> None:
        """Make the encoder, and compute how far pseudo-labels are corrected."""
        super().build(data, num_classes)
        self.alignment_share = alignment_share(self.hparams.alignment, int(data.train_mask.sum()), num_classes)

    def losses(self, batch: Data, epoch: int) -> dict[str, Tensor]:
        """Compute the cross-entropy on labelled and, after the warm-up, on confident nodes."""
        logits = self.encode(batch)[1]
        loss = self.cross_entropy(batch, logits, batch.y, batch.train_mask)
        found = {"cross_entropy": loss}
        if self.hparams.pseudo_weight and epoch >= self.warmup_epochs:
            labels, confidence = pseudo_labels(logits, batch.y, batch.train_mask, self.alignment_share)
            trusted = confident_share(confidence, labels, self.hparams.confident, logits.shape[1]) & ~batch.train_mask
            found["pseudo_cross_entropy"] = self.cross_entropy(batch, logits, labels, trusted)
            loss = loss + self.hparams.pseudo_weight * found["pseudo_cross_entropy"]
        return found | {"loss": loss}


class DGI(_Encoded):
    """Deep Graph Infomax (ICLR 2019) with torch-geometric's objective: nodes against shuffled features, by their mean.

    Args:
        encoder: Name of an encoder, or path of a class, as for CSG2L.
        hidden_channels: Width of the hidden layer.
        num_layers: Number of layers of the encoder.
        dropout: Share of the features and of the hidden layer that is dropped.
        encoder_args: Further arguments of the encoder.
        learning_rate: Learning rate of Adam.
        weight_decay: Weight decay of Adam.
    """

    supervised = False

    def __init__(
        self,
        encoder: str = "gcn",
        hidden_channels: int = 512,
        num_layers: int = 2,
        dropout: float = 0.0,
        encoder_args: dict[str, Any] | None = None,
        learning_rate: float = 0.001,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(learning_rate, weight_decay)
        self.save_hyperparameters()

    def build(self, data: Data, num_classes: int) -> None:
        """Make the encoder and the objective around it."""
        super().build(data, num_classes)
        self.infomax = DeepGraphInfomax(
            self.hparams.hidden_channels,
            _Hidden(self.encoder),
            summary=lambda z, *args: z.mean(dim=0).sigmoid(),
            corruption=lambda x, edge_index: (x[torch.randperm(len(x), device=x.device)], edge_index),
        )

    def losses(self, batch: Data, epoch: int) -> dict[str, Tensor]:
        """Compute the binary cross-entropy of nodes and of corrupted nodes."""
        return {"loss": self.infomax.loss(*self.infomax(batch.x, batch.edge_index))}


class GRACE(_Encoded):
    """Deep Graph Contrastive Representation Learning (2020): two views with dropped edges and features, InfoNCE between all.

    Args:
        encoder: Name of an encoder, or path of a class, as for CSG2L.
        hidden_channels: Width of the hidden layer.
        num_layers: Number of layers of the encoder.
        dropout: Share of the features and of the hidden layer that is dropped.
        encoder_args: Further arguments of the encoder.
        drop_edges: Shares of edges left out of the two views.
        drop_features: Shares of features set to zero in the two views.
        temperature: τ of InfoNCE.
        head_channels: Width of the projection head.
        learning_rate: Learning rate of Adam.
        weight_decay: Weight decay of Adam.
    """

    supervised = False

    def __init__(
        self,
        encoder: str = "gcn",
        hidden_channels: int = 256,
        num_layers: int = 3,
        dropout: float = 0.0,
        encoder_args: dict[str, Any] | None = None,
        drop_edges: tuple[float, float] = (0.2, 0.4),
        drop_features: tuple[float, float] = (0.3, 0.4),
        temperature: float = 0.4,
        head_channels: int = 256,
        learning_rate: float = 5e-4,
        weight_decay: float = 1e-5,
    ) -> None:
        super().__init__(learning_rate, weight_decay)
        self.save_hyperparameters()

    def build(self, data: Data, num_classes: int) -> None:
        """Make the encoder and the projection head."""
        super().build(data, num_classes)
        width = self.hparams.head_channels
        self.head = nn.Sequential(nn.Linear(self.hparams.hidden_channels, width), nn.ELU(), nn.Linear(width, width))

    def losses(self, batch: Data, epoch: int) -> dict[str, Tensor]:
        """Compute the InfoNCE with the pairs of both views as negatives."""
        projected = []
        for edges, features in zip(self.hparams.drop_edges, self.hparams.drop_features, strict=True):
            kept = dropout_edge(batch.edge_index, edges, force_undirected=True)[0]
            x = drop_columns(self.features(batch), features)
            projected.append(nn.functional.normalize(self.head(self.encoder(x, kept)[0])))
        return {"loss": reweighted_info_nce(*projected, temperature=self.hparams.temperature, intra_view=True)}


class _Hidden(nn.Module):
    """The hidden layer of an encoder alone, as torch-geometric's objectives want it."""

    def __init__(self, encoder: GraphEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.encoder(x, edge_index)[0]

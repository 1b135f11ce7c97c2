"""Graph encoders of torch-geometric, each with a global view: its own layers, with another propagation.

A layer that aggregates linearly (GCN, APPNP, SGC: normalised sum; GraphSAGE: mean; GIN: sum; GAT: weighted mean) has its
aggregation replaced, by torch-geometric's propagate hook, by P_g. The factors reconstruct the symmetric Ã, so that mean and sum
follow by rescaling: D̃^-½ P_g D̃^½ and D̃^½ P_g D̃^½. Other layers (PNA, EdgeCNN) run on the graph of P_g's strongest edges.
"""

import math
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import conv
from torch_geometric.nn.models import GAT, GCN, GIN, PNA, EdgeCNN, GraphSAGE
from torch_geometric.nn.models.basic_gnn import BasicGNN

from functional.graph import propagated_features, reduced_together, scaled_together
from lightning_modules.parts.graph_operators import GlobalOperator
from utilities.checks import check_integer, check_share

SYMMETRIC = (conv.GCNConv, conv.SGConv, conv.APPNP, conv.TAGConv, conv.SSGConv, conv.GCN2Conv, conv.ARMAConv)
MEAN = (conv.GATConv, conv.GATv2Conv, conv.TransformerConv)


class Diffusion(nn.Module):
    """Two layers around one propagation: APPNP (ReLU before it) and SGC (linear)."""

    def __init__(self, in_channels: int, hidden_channels: int, dropout: float, propagation: nn.Module, nonlinear: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, hidden_channels)
        self.propagation, self.nonlinear = propagation, nonlinear
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Compute the propagated hidden layer (N, H)."""
        hidden = self.linear(x)
        return self.propagation(self.dropout(hidden.relu()) if self.nonlinear else hidden, edge_index)


class CheapDropout(nn.Module):
    """Dropout by random bytes, which a CPU draws thirty times as fast as nn.Dropout's Bernoulli variables.

    Args:
        p: Share that is dropped; on a CPU rounded to a multiple of 2⁻¹⁶ where it is none of 2⁻⁸.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Set a share of the values to zero and scale the others; while training only."""
        if not self.training or not self.p:
            return x
        if x.device.type != "cpu":
            return nn.functional.dropout(x, self.p)
        kind = torch.uint8 if float(256 * self.p).is_integer() else torch.int16
        bits = torch.iinfo(kind)
        drawn = torch.empty(-(-x.numel() * bits.bits // 64), dtype=torch.int64).random_(-(2**63), None)
        drawn = drawn.view(kind)[: x.numel()].view(x.shape)
        values, dropped = 2**bits.bits, round(self.p * 2**bits.bits)
        kept = torch.zeros_like(drawn) if dropped == values else drawn.ge_(dropped + bits.min)
        return x * kept.to(x.dtype).mul_(values / max(values - dropped, 1))  # by the rounded share, so that the mean stays


class Decoupled(nn.Module):
    """An MLP on features that were propagated once (functional/graph/propagation.py): it sees rows, and no edges.

    Args:
        in_channels: F, the number of features before propagation.
        hidden_channels: Width of all layers.
        num_layers: Number of linear layers.
        dropout: Share that is dropped between layers.
        K: Number of propagation steps.
        alpha: Share of the node's own features in each step.
        dimensions: d, to which the propagated features are reduced; None keeps all: N · F values a view, in checkpoints too.
        length: Root of the mean square length of their rows; None for √d, with which values have mean square 1.
        seed: Seed of the reduction.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_layers: int,
        dropout: float,
        K: int = 5,
        alpha: float = 0.1,
        dimensions: int | None = 64,
        length: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_integer("encoder_args.K", K, 0)
        check_share("encoder_args.alpha", alpha)
        if dimensions is not None:
            check_integer("encoder_args.dimensions", dimensions, 1, "null keeps all")
        number = isinstance(length, int | float) and not isinstance(length, bool)
        if length is not None and not (number and 0 < length < math.inf):
            raise ValueError(
                f"Argument `encoder_args.length` expected to be a finite number above 0 but got {length!r}. Leave it out for "
                "values of mean square 1."
            )
        self.steps, self.teleport, self.seed = K, alpha, seed
        self.dimensions, self.length = dimensions, length
        self.width = in_channels if dimensions is None else min(dimensions, in_channels)
        layers: list[nn.Module] = [nn.Linear(self.width, hidden_channels)]
        for _ in range(num_layers - 1):
            layers += [nn.ReLU(), CheapDropout(dropout), nn.Linear(hidden_channels, hidden_channels)]
        self.layers = nn.Sequential(*layers)

    def prepare(self, views: Sequence[tuple[Tensor, GlobalOperator]]) -> list[Tensor]:
        """Propagate the features (N, F) of each view by its operator, and reduce and scale all together, (N, d) each."""
        found = [propagated_features(x, operator, self.steps, self.teleport) for x, operator in views]
        if self.dimensions is not None:
            found = reduced_together(found, self.width, self.seed)
        found = scaled_together(found, self.length)
        return [nn.functional.pad(view, (0, self.width - view.shape[1])) for view in found]

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Compute the hidden layer (N, H) of prepared features (N, d)."""
        return self.layers(x)


BASIC = {"gcn": GCN, "gat": GAT, "graphsage": GraphSAGE, "sage": GraphSAGE, "gin": GIN, "pna": PNA, "edgecnn": EdgeCNN}
ENCODERS = (*BASIC, "appnp", "sgc", "decoupled")
DEFAULTS: dict[str, dict[str, Any]] = {
    "gat": {"heads": 8},
    # Sums grow with the degree. Not a batch norm: its running statistics would be those of no view.
    "gin": {"norm": "layer_norm", "norm_kwargs": {"mode": "node"}},
    "appnp": {"K": 10, "alpha": 0.1},
    "sgc": {"K": 2, "alpha": 0.0},
}


SPARSE = ("gcn", "gat", "appnp", "sgc")
"""Encoders whose first act is a linear map of the features, which may then be sparse."""
DENSE_ENOUGH = 0.1
"""Share of non-zero features above which a dense product is as fast."""


def sparse_features(x: Tensor) -> Tensor:
    """Convert bags of words to sparse CSR, where a linear map on a CPU takes a tenth of the time; leave other features."""
    if x.is_cuda or x.layout != torch.strided or x.requires_grad or torch.count_nonzero(x) > DENSE_ENOUGH * x.numel():
        return x
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return x.to_sparse_csr()


def drop_columns(x: Tensor, share: float) -> Tensor:
    """Set some columns of features (N, F), dense or CSR, to zero at random."""
    kept = (torch.rand(x.shape[1], device=x.device) >= share).to(x.dtype)
    if x.layout == torch.strided:
        return x * kept
    return _with_values(x, x.values() * kept[x.col_indices()])


def _with_values(x: Tensor, values: Tensor) -> Tensor:
    return torch.sparse_csr_tensor(x.crow_indices(), x.col_indices(), values, x.shape, device=x.device, check_invariants=False)


class GraphEncoder(nn.Module):
    """Hidden representations and logits of the nodes, from the local or from the global view.

    Args:
        name: One of ENCODERS, or the path of a class that takes (in_channels, hidden_channels, num_layers, dropout=…) and whose
            forward is (x, edge_index); its logits come from a linear layer on top.
        in_channels: Number of features.
        hidden_channels: Width of the hidden representation.
        out_channels: Number of classes; 0 for no logits.
        num_layers: Message passing layers in all; for APPNP and SGC, linear layers: always 2.
        dropout: Share that is dropped between the layers and of the input.
        arguments: Further arguments of the encoder, such as heads of GAT or K and alpha of APPNP.
    """

    def __init__(
        self,
        name: str,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int = 2,
        dropout: float = 0.5,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        arguments, kind = dict(arguments or {}), name.lower()
        if num_layers < 2:
            raise ValueError(
                f"Argument `num_layers` expected to be at least 2 (hidden layers and logits) but got {num_layers}."
            )
        check_share("dropout", dropout)
        given, arguments = arguments, {**DEFAULTS.get(kind, {}), **arguments}
        self.dropout: nn.Module = CheapDropout(dropout) if kind == "decoupled" else nn.Dropout(dropout)
        self.act: nn.Module = nn.ReLU()
        self.decoupled = kind == "decoupled"
        """Whether the input is what `body.prepare` made of the features; edges and operators have no effect then."""
        cls = None if kind in ("appnp", "sgc") else Decoupled if self.decoupled else BASIC.get(kind) or _imported(name)
        try:
            if cls is None:
                propagation = conv.APPNP(**arguments)
                self.body = Diffusion(in_channels, hidden_channels, dropout, propagation, nonlinear=kind == "appnp")
                self.act = nn.Identity()  # APPNP's ReLU stands before its propagation, SGC has none
            else:
                self.body = cls(in_channels, hidden_channels, num_layers - 1, dropout=dropout, **arguments)
        except TypeError as error:
            raise ValueError(
                f"Argument `encoder_args` expected further arguments of {name!r} but got {given} ({error}). Leave out what it "
                "does not take."
            ) from error
        if not out_channels:
            self.head: nn.Module | None = None
        elif cls is not None and issubclass(cls, BasicGNN):
            last = {**arguments, "heads": 1} if kind == "gat" else arguments
            self.head = cls(hidden_channels, out_channels, 1, dropout=dropout, **last)
        else:
            self.head = nn.Linear(hidden_channels, out_channels)
        self.takes_sparse = kind in SPARSE
        """Whether features may be sparse."""
        self._operator: GlobalOperator | None = None
        layers = [module for module in self.modules() if isinstance(module, conv.MessagePassing)]
        self.linear = all(_kind(layer) is not None for layer in layers)
        """Whether every layer has a low-rank view of its own aggregation."""
        self.symmetric = all(_aggregates_by_normalized_adjacency(layer) for layer in layers)
        """Whether the local view is products with Ã, which an operator with mix 0 does several times faster."""
        self._kinds = {layer: _kind(layer) for layer in layers}
        self._normalizing = [x for x in layers if isinstance(x, SYMMETRIC) and getattr(x, "normalize", False)]
        if self.linear:
            for layer in layers:
                layer.register_propagate_forward_hook(self._replace)

    def forward(self, x: Tensor, edge_index: Tensor, operator: GlobalOperator | None = None) -> tuple[Tensor, Tensor | None]:
        """Compute hidden layer (N, H) and logits (N, C) of the local view, or with an operator those of its view."""
        if operator is not None:
            edge_index = edge_index[:, :0] if self.linear else operator.edges
        self._operator = operator if self.linear else None
        for layer in self._normalizing:
            layer.normalize = self._operator is None  # nothing to normalise where edges were left out
        try:
            hidden = self.act(self.body(self._dropped(x), edge_index))
            if self.head is None:
                return hidden, None
            dropped = self.dropout(hidden)
            logits = self.head(dropped) if isinstance(self.head, nn.Linear) else self.head(dropped, edge_index)
            return hidden, logits
        finally:
            self._operator = None
            for layer in self._normalizing:
                layer.normalize = True

    def _dropped(self, x: Tensor) -> Tensor:
        """Drop features; of sparse ones among those stored, the others being zero anyway; of propagated ones none."""
        if self.decoupled:
            return x
        if x.layout != torch.sparse_csr:
            return self.dropout(x)
        return _with_values(x, self.dropout(x.values()))

    def _replace(self, layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        """Aggregate for a layer in the global view; its edges were left out, so that its own aggregation costs nothing."""
        if self._operator is None:
            return None
        x = inputs[2]["x"]
        return self._operator(x[0] if isinstance(x, tuple) else x, self._kinds[layer])


def _kind(layer: nn.Module) -> str | None:
    """Tell how a layer aggregates: symmetric, mean, sum; None if not linearly."""
    if isinstance(layer, SYMMETRIC):
        return "symmetric" if getattr(layer, "normalize", True) else "sum"
    if isinstance(layer, MEAN):
        return "mean"
    plain = type(layer).message in (conv.SAGEConv.message, conv.GINConv.message, conv.GraphConv.message)
    return {"mean": "mean", "add": "sum", "sum": "sum"}.get(layer.aggr) if plain and isinstance(layer.aggr, str) else None


def _aggregates_by_normalized_adjacency(layer: nn.Module) -> bool:
    """Tell whether a layer multiplies by Ã itself: loops added with weight 1, nothing dropped."""
    if not isinstance(layer, conv.GCNConv | conv.APPNP):
        return False
    return (
        layer.normalize and layer.add_self_loops and not getattr(layer, "improved", False) and not getattr(layer, "dropout", 0)
    )


def _imported(path: str) -> type[nn.Module]:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"Argument `encoder` expected to be one of {', '.join(ENCODERS)}, or a class's path, but got {path!r} ({error})."
        ) from error

"""Settings of CSG2L in groups: its views, its contrast, its pseudo-labels; those that do not apply are refused."""

from dataclasses import asdict, dataclass
from math import inf
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils import dropout_edge

from functional.graph import Factors, low_rank_factors
from functional.graph.contrast import FORMS, Form
from functional.graph.low_rank import BASES, Base
from lightning_modules.parts.graph_encoders import drop_columns
from utilities.checks import check_at_least_zero, check_integer, check_one_of, check_share
from utilities.choice import Choice

ViewName = Literal["svd", "drop"]
PseudoLabelsName = Literal["predicted", "clustered"]
Reweight = Literal["both", "positives", "negatives"]


class View(Choice):
    """The other view, with which the local one is contrasted."""

    draws_edges: ClassVar[bool]
    """Whether each step has other edges."""


class SvdView(View):
    """The graph's low-rank reconstruction: propagation by (1 − μ)·Ã + μ·U diag(s) Vᵀ.

    Args:
        base: Matrix that is factorised: normalized, regularized or diffused.
        rank: q, the number of singular values; at most the number of nodes.
        mix: μ, the share of the low-rank part in the propagation; the rest is Ã.
        diffusion_steps: k, the power of Ã that base `diffused` factorises; 2 when None. For that base only.
        seed: Seed of the factorisation.

    Raises:
        ValueError: If an argument is out of range, or does not apply to the base.
    """

    short = "svd"
    draws_edges = False

    def __init__(
        self, base: Base = "regularized", rank: int = 100, mix: float = 0.2, diffusion_steps: int | None = None, seed: int = 0
    ) -> None:
        check_one_of("view.base", base, BASES)
        check_integer("view.rank", rank, 1)
        check_share("view.mix", mix)
        check_integer("view.seed", seed, 0)
        if diffusion_steps is not None:
            check_integer("view.diffusion_steps", diffusion_steps, 1)
            if base != "diffused":
                raise ValueError(
                    f"Argument `view.diffusion_steps` belongs to base diffused, but `view.base` is {base!r}. Leave it out, or "
                    "use diffused."
                )
        self.base, self.rank, self.mix, self.diffusion_steps, self.seed = base, rank, mix, diffusion_steps, seed

    def factors(self, data: Data) -> Factors:
        """Factorise the base matrix of a graph."""
        steps = 2 if self.diffusion_steps is None else self.diffusion_steps
        return low_rank_factors(data.edge_index, data.num_nodes, self.rank, self.base, steps=steps, seed=self.seed)


class DropView(View):
    """The graph without some of its edges and features, drawn in each step.

    Args:
        edges: Share of the edges that is left out.
        features: Share of the features that is set to zero.

    Raises:
        ValueError: If a share is out of range.
    """

    short = "drop"
    draws_edges = True

    def __init__(self, edges: float = 0.3, features: float = 0.3) -> None:
        check_share("view.edges", edges)
        check_share("view.features", features)
        self.edges, self.features = edges, features

    def draw(self, x: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the features (N, F) and edges (2, E) that are left."""
        edges = dropout_edge(edge_index, self.edges, force_undirected=True)[0]
        return drop_columns(x, self.features), edges


@dataclass(frozen=True)
class Contrast:
    """Contrast of the hidden layers of both views: reweighted InfoNCE.

    Args:
        weight: λ, the weight of the contrast in the loss; 0 leaves it out, and then no other setting of it applies.
        form: Place of the weights R of pairs in the loss: hsan, negatives or multi_positive.
        beta: Exponent of R; 0 makes all pairs weigh the same.
        reweight: Pairs that R weighs: both, positives or negatives. Does not apply with a beta of 0.
        temperature: τ of InfoNCE.
        intra_view: Whether pairs within a view are negatives too.
        head_channels: Width of the projection head between hidden layer and contrast; 0 for none.
        anchors: Number of nodes drawn in each step whose rows of S count; 0 for all.

    Raises:
        ValueError: If an argument is out of range, or does not apply beside the others.
    """

    weight: float = 0.3
    form: Form = "multi_positive"
    beta: float = 1.0
    reweight: Reweight = "both"
    temperature: float = 0.5
    intra_view: bool = False
    head_channels: int = 64
    anchors: int = 256

    def __post_init__(self) -> None:
        check_at_least_zero("contrast.weight", self.weight)
        check_one_of("contrast.form", self.form, FORMS)
        check_at_least_zero("contrast.beta", self.beta)
        check_one_of("contrast.reweight", self.reweight, get_args(Reweight))
        if not 0 < self.temperature < inf:
            raise ValueError(
                f"Argument `contrast.temperature` expected to be above 0 but got {self.temperature}; 0.5 is usual."
            )
        check_integer("contrast.head_channels", self.head_channels, 0)
        check_integer("contrast.anchors", self.anchors, 0)
        if self.beta == 0 and self.reweight != "both":
            raise ValueError(
                f"Argument `contrast.reweight` = {self.reweight!r} expected a `contrast.beta` above 0, since with 0 all pairs "
                "weigh the same. Leave it out, or raise beta."
            )
        if self.weight == 0 and (given := [name for name, value in asdict(self).items() if value != _DEFAULTS[name]]):
            raise ValueError(
                f"Argument `contrast.{given[0]}` expected a `contrast.weight` above 0, since with 0 there is no contrast. "
                "Leave it out, or raise the weight."
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the settings by name, as a config has them."""
        return asdict(self)


_DEFAULTS: dict[str, Any] = {name: field.default for name, field in Contrast.__dataclass_fields__.items()} | {"weight": 0}
"""Settings of a contrast that is left out."""


class PseudoLabels(Choice):
    """Labels of nodes whose own is unknown: they weigh the pairs of the contrast."""

    confident: float
    """Share of the nodes that is trusted."""
    warmup_epochs: int
    """Epochs without pseudo-labels."""

    def _check(self) -> None:
        check_share("pseudo_labels.confident", self.confident)
        check_integer("pseudo_labels.warmup_epochs", self.warmup_epochs, 0)


class PredictedLabels(PseudoLabels):
    """Classes that the fused views predict, which teach each view too.

    Args:
        weight: Weight of the cross-entropy of each view's logits on the labels of trusted nodes; 0 for none.
        alignment: a, how much a prior of equally frequent classes corrects the labels: it counts as so many labels of each
            class, so its share a / (a + labels a class) is large only while labels are few. 0 for none.
        confident: Share of the nodes that is trusted, as many of each class: the set C.
        warmup_epochs: Number of epochs of plain InfoNCE and cross-entropy, before predictions are worth something.

    Raises:
        ValueError: If an argument is out of range.
    """

    short = "predicted"

    def __init__(self, weight: float = 1.0, alignment: float = 2.0, confident: float = 0.8, warmup_epochs: int = 60) -> None:
        check_at_least_zero("pseudo_labels.weight", weight)
        check_at_least_zero("pseudo_labels.alignment", alignment)
        self.weight, self.alignment, self.confident, self.warmup_epochs = weight, alignment, confident, warmup_epochs
        self._check()


class ClusteredLabels(PseudoLabels):
    """Clusters of the embeddings, for learning without labels.

    Args:
        confident: Share of the nodes that is trusted, as many of each cluster: the set C.
        warmup_epochs: Number of epochs of plain InfoNCE, before clusters are worth something.
        every: Number of epochs between two runs of k-means.
        seed: Seed of k-means.

    Raises:
        ValueError: If an argument is out of range.
    """

    short = "clustered"

    def __init__(self, confident: float = 0.8, warmup_epochs: int = 60, every: int = 20, seed: int = 0) -> None:
        check_integer("pseudo_labels.every", every, 1)
        check_integer("pseudo_labels.seed", seed, 0)
        self.confident, self.warmup_epochs, self.every, self.seed = confident, warmup_epochs, every, seed
        self._check()

"""Settings of CSG2L in groups: its contrast and its pseudo-labels; those that do not apply are refused.

csg2l_views.py has its views.
"""

from dataclasses import asdict, dataclass
from math import inf
from typing import Any, Literal, get_args

from functional.graph.contrast import FORMS, Form
from utilities.checks import check_at_least_zero, check_integer, check_one_of, check_share
from utilities.choice import Choice, chosen

PseudoLabelsName = Literal["predicted", "clustered"]
Reweight = Literal["both", "positives", "negatives"]


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

    confident: float | Literal["mean"]
    """Share of the nodes that is trusted, or mean: those of at least the mean confidence (PredictedLabels)."""
    warmup_epochs: int
    """Epochs without pseudo-labels."""

    def _check(self) -> None:
        if isinstance(self.confident, str):
            also = ", or mean," * isinstance(self, PredictedLabels)
            raise ValueError(
                f"Argument `pseudo_labels.confident` expected to be in [0, 1]{also} but got {self.confident!r}; 0.8 is usual."
            )
        check_share("pseudo_labels.confident", self.confident)
        check_integer("pseudo_labels.warmup_epochs", self.warmup_epochs, 0)


class PredictedLabels(PseudoLabels):
    """Classes that the fused views predict, which teach each view too.

    Args:
        weight: Weight of the cross-entropy of each view's logits on the labels of trusted nodes; 0 for none.
        alignment: a, how much a prior of equally frequent classes corrects the labels: it counts as so many labels of each
            class, so its share a / (a + labels a class) is large only while labels are few. 0 for none.
        confident: Share of the nodes that is trusted, as many of each class, or mean: all whose confidence is at least the
            mean of those without a label: the set C.
        warmup_epochs: Number of epochs of plain InfoNCE and cross-entropy, before predictions are worth something.
        balanced: Whether the logarithm of the classes' shares among the trusted is added to the logits that are taught
            (balanced softmax).
        clean: Whether labels come from a further pass without dropout.
        beta: β, exponent of the weights of nodes in the cross-entropy, which come from how far their labels and the similarity
            of both views' hidden layers disagree: above 0 hard nodes weigh more, below 0 those that agree; 0 for none.

    Raises:
        ValueError: If an argument is out of range.
    """

    short = "predicted"

    def __init__(
        self,
        weight: float = 1.0,
        alignment: float = 2.0,
        confident: float | Literal["mean"] = 0.8,
        warmup_epochs: int = 60,
        balanced: bool = False,
        clean: bool = False,
        beta: float = 0.0,
    ) -> None:
        check_at_least_zero("pseudo_labels.weight", weight)
        check_at_least_zero("pseudo_labels.alignment", alignment)
        self.weight, self.alignment, self.confident, self.warmup_epochs = weight, alignment, confident, warmup_epochs
        self.balanced, self.clean, self.beta = balanced, clean, beta
        if not -inf < beta < inf:
            raise ValueError(f"Argument `pseudo_labels.beta` expected to be finite but got {beta}; 0 weighs all nodes alike.")
        for name in ("balanced", "beta"):
            if getattr(self, name) and not weight:
                raise ValueError(
                    f"Argument `pseudo_labels.{name}` expected a `pseudo_labels.weight` above 0, since with 0 no logits are "
                    "taught. Leave it out, or raise the weight."
                )
        if confident != "mean":
            self._check()
        check_integer("pseudo_labels.warmup_epochs", warmup_epochs, 0)


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


def pseudo_labels_of(given: PseudoLabelsName | PseudoLabels | None, supervised: bool) -> PseudoLabels:
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

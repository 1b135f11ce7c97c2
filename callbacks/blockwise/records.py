"""Records of each pruned linear and block of a run, for pruning.json and TensorBoard."""

from dataclasses import asdict, dataclass, field
from typing import Any

from typing_extensions import Self


@dataclass
class LinearRecord:
    """One pruned linear; error and norm are Σ ‖(W − Ŵ) x‖² and Σ ‖W x‖² over the calibration tokens.

    With a dense share in `target`, W is the target that makes up for what the inputs lack.
    """

    method: str
    error: float
    norm: float
    zeros: int
    weights: int
    damping: float | None

    @property
    def relative_error(self) -> float:
        """error / norm; 0 for a linear whose outputs are all zero."""
        return self.error / self.norm if self.norm else 0.0

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.weights


@dataclass
class BlockRecord:
    """One pruned block; times in seconds, memory in GiB."""

    name: str
    seconds_statistics: float = 0.0
    seconds_solve: float = 0.0
    peak_memory_gib: float = 0.0
    linears: dict[str, LinearRecord] = field(default_factory=dict)
    seconds_rule: float = 0.0
    choice: str | None = None
    """States that the update rule chose for q, k and v."""
    update_shares: dict[str, float] = field(default_factory=dict)
    """Role -> share of the weight update that the projection took."""
    candidates: list[dict[str, Any]] = field(default_factory=list)
    outlier_ratios: dict[str, float] = field(default_factory=dict)
    attention: dict[str, float] = field(default_factory=dict)
    """Measures by which AttentionProbe compares the attention with the dense model's."""
    allocation: dict[str, float] = field(default_factory=dict)
    """The block's share of zeros and the measures that it follows from; empty if all blocks have the same share."""
    expert_tokens: list[int] = field(default_factory=list)
    """Calibration tokens of each expert; empty without experts."""
    borrowed_tokens: dict[str, int] = field(default_factory=dict)
    """Linear of an expert with too few tokens -> number of tokens of all experts that count for it as well."""

    @property
    def seconds(self) -> float:
        """Time spent on the block."""
        return self.seconds_statistics + self.seconds_solve + self.seconds_rule

    @property
    def relative_error(self) -> float:
        """Mean of the relative errors of the linears; a sum would mostly show the few with huge outputs."""
        errors = [linear.relative_error for linear in self.linears.values()]
        return sum(errors) / len(errors) if errors else 0.0

    @property
    def sparsity(self) -> float:
        """Share of zeros over the block's pruned linears."""
        return sparsity_of([self])

    def scalars(self) -> dict[str, float]:
        """Return TensorBoard tags and values."""
        values = {
            "block/relative_error": self.relative_error,
            "block/sparsity": self.sparsity,
            "block/seconds_statistics": self.seconds_statistics,
            "block/seconds_solve": self.seconds_solve,
            "block/peak_memory_gib": self.peak_memory_gib,
        }
        for name, linear in self.linears.items():
            values[f"relative_error/{name}"] = linear.relative_error
            values[f"sparsity/{name}"] = linear.sparsity
            if linear.damping is not None:
                values[f"damping/{name}"] = linear.damping
        values |= {f"attention/{name}": value for name, value in self.attention.items()}
        values |= {f"allocation/{name}": value for name, value in self.allocation.items()}
        values |= {f"update_share/{role}": share for role, share in self.update_shares.items()}
        values |= {f"outlier_ratio/{role}": ratio for role, ratio in self.outlier_ratios.items()}
        if self.expert_tokens:
            values["experts/least_tokens"], values["experts/most_tokens"] = min(self.expert_tokens), max(self.expert_tokens)
            values["experts/borrowing_linears"] = len(self.borrowed_tokens)
        if self.attention:
            values["block/seconds_rule"] = self.seconds_rule
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Make a record from what `dataclasses.asdict` returned."""
        return cls(**values | {"linears": {name: LinearRecord(**linear) for name, linear in values["linears"].items()}})

    def as_json(self) -> dict[str, Any]:
        """Return the content for pruning.json, derived values included."""
        linears = {
            name: asdict(linear) | {"relative_error": linear.relative_error, "sparsity": linear.sparsity}
            for name, linear in self.linears.items()
        }
        derived = {"relative_error": self.relative_error, "sparsity": self.sparsity, "seconds": self.seconds}
        return asdict(self) | derived | {"linears": linears}


def sparsity_of(records: list[BlockRecord]) -> float:
    """Return the share of zeros over all pruned linears."""
    linears = [linear for record in records for linear in record.linears.values()]
    weights = sum(linear.weights for linear in linears)
    return sum(linear.zeros for linear in linears) / weights if weights else 0.0

"""OutlierRule: hold in each block the projection whose weight has the largest outlier ratio (Eq. 18-19)."""

from collections.abc import Mapping

from typing_extensions import override

from callbacks.blockwise.update_rules.base import UpdateRule
from functional.pruning.attention import outlier_ratio
from lightning_modules.parts.architectures import PrunableLinear


class OutlierRule(UpdateRule):
    """Hold, in each block, the projection with the largest share of weights above the mean magnitude; needs no data."""

    short = "outlier"

    @override
    def holds(self, linears: Mapping[str, PrunableLinear], round_held: str | None) -> tuple[str, ...]:
        ratios = outlier_ratios(linears)
        return (max(ratios, key=ratios.get),) if ratios else ()


def outlier_ratios(linears: Mapping[str, PrunableLinear]) -> dict[str, float]:
    """Return role -> outlier ratio of its weight."""
    return {role: outlier_ratio(linear.weight) for role, linear in linears.items()}

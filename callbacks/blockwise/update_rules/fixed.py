"""FixedRule: hold the same projections in every block, as in the released code."""

from collections.abc import Mapping
from typing import Literal, get_args

from typing_extensions import override

from callbacks.blockwise.update_rules.base import ROLES, UpdateRule
from lightning_modules.parts.architectures import PrunableLinear
from utilities.checks import check_one_of

Held = Literal["q", "k", "v", "none", "all"]


class FixedRule(UpdateRule):
    """Hold the same projections in every block.

    Args:
        held: q, k, v, none or all of them. The paper holds k or v, by model.

    Raises:
        ValueError: If `held` is none of these.
    """

    short = "fixed"

    def __init__(self, held: Held = "v") -> None:
        check_one_of("held", held, get_args(Held))
        self.held = held

    @property
    def needed(self) -> tuple[str, ...]:
        """Held roles, which the model has to have."""
        return {"none": (), "all": ROLES}.get(self.held, (self.held,))

    @override
    def holds(self, linears: Mapping[str, PrunableLinear], round_held: str | None) -> tuple[str, ...]:
        return tuple(role for role in self.needed if role in linears)

"""UpdateRule: which of q, k and v keep their remaining weights as they are; D²Prune's dynamic update (§3.2).

    fixed        the same projection in every block
    outlier      in each block the projection with the largest outlier ratio (Eq. 18-19)
    perplexity   prune with q, k or v held, keep the round with the lowest loss on held-out data (Algorithm 1)
    attention    in each block the candidate whose attention is nearest to the dense model's (Eq. 12, or the attention's output)

A held projection is masked by D²-Wanda and its remaining weights stay; all others take the weight update.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

from lightning_modules.parts.architectures import PrunableLinear
from utilities.choice import Choice

UpdateRuleName = Literal["fixed", "outlier", "perplexity", "attention"]
ROLES = ("q", "k", "v")
UPDATE_METHOD, HELD_METHOD = "d2_sparsegpt", "d2_wanda"


class UpdateRule(Choice, ABC):
    """Base of the update rules of method d2prune."""

    @property
    def needed(self) -> tuple[str, ...]:
        """Roles that the model has to have."""
        return ROLES

    def rounds(self, roles: list[str]) -> list[str | None]:
        """Return for each round the projection that it holds in every block, or None if the rule decides block by block.

        Args:
            roles: Roles that are pruned in some block.
        """
        return [None]

    @abstractmethod
    def holds(self, linears: Mapping[str, PrunableLinear], round_held: str | None) -> tuple[str, ...]:
        """Return the roles that a block holds.

        Args:
            linears: Role -> dense linear of the block's pruned projections.
            round_held: Projection that this round holds in every block, or None.
        """

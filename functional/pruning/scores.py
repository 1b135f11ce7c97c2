"""Scores of the weights of one linear map, larger = keep. D²Prune Eq. 13-15, with what they extend.

    S = S_W + λ1 ŷ_i |W_ij| x̂_j − λ2 W_ij² x̂_j²

The minus is the implementation's sign; the constant ½ of the OBS term is dropped, as in the released code: λ1 = 1 belongs to
that scale. S_W is the second-order weight term: W² ‖X_j‖² / N without weight update, W² / [H⁻¹]_jj with it.

Worth knowing: with `rms` norms and λ2 = 0, x̂_j² is proportional to ‖X_j‖², so a row of the score without weight update is
increasing in |W_ij| x̂_j alone: D²-Wanda then keeps exactly what Wanda keeps, whatever λ1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoreTerms:
    """A score as a function of one weight: a_j W_ij² + r_i c_j |W_ij|, so that it can be taken anew while weights change.

    Attributes:
        square: a, (I,).
        linear: c, (I,), or None where there is no such term.
        rows: r, (O,), or None.
    """

    square: Tensor
    linear: Tensor | None = None
    rows: Tensor | None = None

    def __call__(self, weight: Tensor, columns: slice = slice(None)) -> Tensor:
        """Scores (O, columns) of some columns from their current weights."""
        score = self.square[columns] * weight.square()
        if self.linear is None or self.rows is None:
            return score
        return score + self.rows[:, None] * (weight.abs() * self.linear[columns])

    def coefficients(self, columns: slice, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """a, c of some columns, and r; zeros where there is no such term."""
        square = self.square[columns]
        if self.linear is None or self.rows is None:
            return square, torch.zeros_like(square), square.new_zeros(num_rows)
        return square, self.linear[columns], self.rows


def score_terms(
    second_order: Tensor, x_norm: Tensor | None, y_norm: Tensor | None, lambda1: float, lambda2: float
) -> ScoreTerms:
    """The dual Taylor score, or its second-order weight term alone.

    Args:
        second_order: S_W / W²: 1/U_jj² with weight update (U_jj² is the conditional [H⁻¹]_jj), ‖X_j‖² / N without, (I,).
        x_norm: x̂, (I,), or None for no activation terms.
        y_norm: ŷ, (O,).
        lambda1: λ1.
        lambda2: λ2.
    """
    if x_norm is None:
        return ScoreTerms(second_order)
    return ScoreTerms(second_order - lambda2 * x_norm.square(), lambda1 * x_norm, y_norm)

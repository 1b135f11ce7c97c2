"""Scores of the weights of one linear map, larger = keep: D²Prune Eq. 13-15 and the scores that they extend.

    S = S_W + λ1 ŷ_i |W_ij| x̂_j − λ2 W_ij² x̂_j²

The sign of the last term is that of the released code, which also drops the constant ½ of the OBS term; λ1 = 1 belongs to that
scale. S_W is the second-order weight term: W² ‖X_j‖² / N without a weight update, W² / [H⁻¹]_jj with it.

With `rms` norms and λ2 = 0, x̂_j² is proportional to ‖X_j‖². Without a weight update the scores of a row then grow with
|W_ij| x̂_j alone, so D²-Wanda keeps exactly the weights that Wanda keeps, whatever λ1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoreTerms:
    """A score as a function of one weight, a_j W_ij² + r_i c_j |W_ij|, which can be evaluated again after weights change.

    Attributes:
        square: a, (I,).
        linear: c, (I,), or None without this term.
        rows: r, (O,), or None without this term.

    Examples:
        >>> terms = ScoreTerms(square=torch.tensor([1.0, 2.0]))
        >>> terms(torch.tensor([[3.0, -1.0]]))
        tensor([[9., 2.]])
    """

    square: Tensor
    linear: Tensor | None = None
    rows: Tensor | None = None

    def __call__(self, weight: Tensor, columns: slice = slice(None)) -> Tensor:
        """Return the scores (O, columns) of some columns from their current weights."""
        if self.linear is None or self.rows is None:
            return self.square[columns] * weight.square()
        size = weight.abs()
        return (self.square[columns] * size).addcmul_(self.rows[:, None], self.linear[columns]).mul_(size)

    def rescaled(self, scale: Tensor) -> "ScoreTerms":
        """Return the score as a function of W_ij / scale_j.

        Args:
            scale: Factors of the columns, (I,).
        """
        linear = None if self.linear is None else self.linear * scale
        return ScoreTerms(self.square * scale.square(), linear, self.rows)

    def of_rows(self, rows: slice) -> "ScoreTerms":
        """Return the score of some rows alone."""
        return self if self.rows is None else ScoreTerms(self.square, self.linear, self.rows[rows])

    def coefficients(self, columns: slice, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a and c of some columns, and r; zeros without these terms."""
        square = self.square[columns]
        if self.linear is None or self.rows is None:
            return square, torch.zeros_like(square), square.new_zeros(num_rows)
        return square, self.linear[columns], self.rows


def score_terms(
    second_order: Tensor, x_norm: Tensor | None, y_norm: Tensor | None, lambda1: float, lambda2: float
) -> ScoreTerms:
    """Build the dual Taylor score, or its second-order weight term alone.

    Args:
        second_order: S_W / W², (I,): 1 / U_jj² with a weight update (U_jj² is the conditional [H⁻¹]_jj), ‖X_j‖² / N without.
        x_norm: x̂, (I,), or None for no activation terms.
        y_norm: ŷ, (O,), or None for no activation terms.
        lambda1: λ1.
        lambda2: λ2.

    Examples:
        >>> one, two = torch.ones(1), torch.full((1,), 2.0)
        >>> score_terms(one, x_norm=two, y_norm=two, lambda1=1.0, lambda2=0.0)(torch.tensor([[3.0]]))  # 3² + 2 · 3 · 2
        tensor([[21.]])
    """
    if x_norm is None:
        return ScoreTerms(second_order)
    return ScoreTerms(second_order - lambda2 * x_norm.square(), lambda1 * x_norm, y_norm)

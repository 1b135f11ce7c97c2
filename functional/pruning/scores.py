"""Scores of the weights of one linear map, larger = keep. D²Prune Eq. 13-15, with what they extend.

    S = S_W + λ1 ŷ_i |W_ij| x̂_j − λ2 W_ij² x̂_j²

The minus is the implementation's sign; the constant ½ of the OBS term is dropped, as in the released code: λ1 = 1 belongs to
that scale. S_W is the second-order weight term: W² ‖X_j‖² / N without weight update, W² / [H⁻¹]_jj with it.

Worth knowing: with `rms` norms and λ2 = 0, x̂_j² is proportional to ‖X_j‖², so a row of the score without weight update is
increasing in |W_ij| x̂_j alone: D²-Wanda then keeps exactly what Wanda keeps, whatever λ1.
"""

from torch import Tensor


def wanda_score(weight: Tensor, mean_square_norm: Tensor) -> Tensor:
    """W_ij² · (1/N) Σ_n ‖X_n,j‖²: the square of Wanda's |W_ij| ‖X_j‖, which orders the entries of a row alike. (O, I)."""
    return weight.square() * mean_square_norm


def obs_score(weight: Tensor, factor_diagonal: Tensor) -> Tensor:
    """W_ij² / U_jj², the OBS saliency with the conditional [H⁻¹]_jj = U_jj² (SparseGPT). (O, columns)."""
    return (weight / factor_diagonal).square()


def activation_terms(weight: Tensor, x_norm: Tensor, y_norm: Tensor, lambda1: float, lambda2: float) -> Tensor:
    """λ1 ŷ_i |W_ij| x̂_j − λ2 W_ij² x̂_j², the first-order terms of the dual Taylor expansion. (O, I).

    Args:
        weight: (O, I).
        x_norm: x̂, (I,).
        y_norm: ŷ, (O,).
        lambda1: λ1.
        lambda2: λ2.
    """
    contribution = weight.abs() * x_norm
    return lambda1 * y_norm[:, None] * contribution - lambda2 * contribution.square()

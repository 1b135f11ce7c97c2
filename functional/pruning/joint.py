"""Mask and weights in one solve: L0-constrained least squares by ADMM with a penalty that rises.

For every row w of a target W⁺ (functional.pruning.perturbation) the problem is: minimise (w − z) H (w − z)ᵀ over z with few
enough weights that are not 0. OBS chooses the mask before it knows the weights; here both change until they fit. In the
coordinates of :mod:`functional.pruning.admm` (D = diag(H)^−½, G = D H D) with B₀ = W⁺ D⁻¹, from Z = B₀, U = 0:

    F ← B₀ + U + ρ (Z − U − B₀) Q     F = B + U,  Q = (G + ρ I)⁻¹
    M ← the weights with the largest scores of F D
    Z ← M ⊙ F                         the projection on the mask
    U ← F − Z

While ρ is small, B stays near the least squares solution and M moves freely; as it rises, M settles. Until the last iteration
the limit between kept and dropped weights is that of a sample, so M has nearly its share of zeros; the last M has exactly that.
Conjugate gradients then lead to its least squares. The score is D²Prune's with S_W = W² / D², which is F²; the first-order term
favours weights between active inputs and outputs. Sources: rising penalties and conjugate gradients from ALPS (arXiv
2406.07831), masks inside the iteration also in "Fast and Effective Weight Update for Pruned LLMs" (arXiv 2401.02938).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from functional.pruning.admm import Preconditioned, penalised_inverse
from functional.pruning.joint_split import Limits, split
from functional.pruning.masks import Pattern, mask_by_rows_or_matrix
from functional.pruning.precision import float32_matmul
from functional.pruning.scores import ScoreTerms

Compared = Literal["matrix", "row"]

PENALTIES = (0.1, 0.24, 0.58, 1.4, 3.3)
"""ρ, one after the other."""
ITERATIONS = 6
"""Iterations with each penalty."""
GRADIENTS = 3
"""Steps of conjugate gradients."""
SMALLEST_CURVATURE = 1e-7
"""Relative curvature of G below which a step of conjugate gradients would be float32 noise."""


def joint_prune(
    target: Tensor,
    preconditioned: Preconditioned,
    terms: ScoreTerms,
    shares: Sequence[float],
    pattern: Pattern | None,
    parts: Sequence[int],
    by_rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the mask and its least squares weights.

    Args:
        target: W⁺, (ΣO, I), float32, of matrices that read the same inputs, one below the other; not modified.
        preconditioned: G and D of the inputs.
        terms: Score of a weight.
        shares: Share of zeros of each matrix; not used with a pattern.
        pattern: N:M, or None.
        parts: Number of rows of each matrix.
        by_rows: Whether each row has its share of zeros, or each matrix.

    Returns:
        New weights (ΣO, I), 0 outside the mask; mask (ΣO, I; True = kept); and the scores that chose it (ΣO, I).

    Examples:
        Two inputs that are nearly the same: the kept weight takes over what the other did.

        >>> from functional.pruning.admm import precondition
        >>> preconditioned = precondition(torch.tensor([[1.0, 0.9], [0.9, 1.0]]), damping=0.0)
        >>> terms = ScoreTerms(preconditioned.scale.square().reciprocal())
        >>> weight, mask, _ = joint_prune(torch.tensor([[1.0, 2.0]]), preconditioned, terms, [0.5], None, [1], by_rows=False)
        >>> weight, mask
        (tensor([[0.0000, 2.9000]]), tensor([[False,  True]]))
    """
    gram, scale, dead = preconditioned.gram, preconditioned.scale, preconditioned.dead
    live = ~dead | dead.all()  # without any live input all count alike
    dense = (target / scale).mul_(live).contiguous()  # targets of transposed weights are not
    terms = terms.rescaled(scale)
    limits = Limits(terms, shares, pattern, parts, by_rows, dense)
    free, base, change = dense.clone(), torch.empty_like(dense), torch.empty_like(dense)  # F of Z = B₀ is B₀
    with float32_matmul("high", dense.device):  # the last steps have the caller's precision
        inverse = penalised_inverse(gram, PENALTIES[0])
        for before, penalty in pairwise(penalty for penalty in PENALTIES for _ in range(ITERATIONS)):
            if penalty != before:
                inverse = penalised_inverse(gram, penalty)
            split(free, dense, terms, limits.of(free), before / penalty, base, change)
            free, base = base.addmm_(change, inverse, alpha=penalty), free
    scores = terms(free)
    mask = mask_by_rows_or_matrix(scores, shares, pattern, parts, by_rows)
    kept = free.masked_fill_(~mask, 0)
    return least_squares(dense, kept, mask & live, gram).mul_(scale), mask, scores


def least_squares(dense: Tensor, start: Tensor, mask: Tensor, gram: Tensor, steps: int = GRADIENTS) -> Tensor:
    """Minimise (b − z) G (b − z)ᵀ of every row over z that is 0 outside the mask, by conjugate gradients; (O, I), float32.

    Args:
        dense: b, (O, I), float32.
        start: z to start from, (O, I), 0 outside the mask.
        mask: (O, I), bool, True = kept.
        gram: G, (I, I), with ones in its diagonal.
        steps: Number of steps.
    """
    dropped = ~mask
    z = start.masked_fill(dropped, 0)
    residual = ((dense - z) @ gram).masked_fill_(dropped, 0)
    direction = residual.clone()
    energy = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        image = (direction @ gram).masked_fill_(dropped, 0)
        curvature = (direction * image).sum(1, keepdim=True)
        sound = curvature > SMALLEST_CURVATURE * direction.square().sum(1, keepdim=True)
        step = torch.where(sound, energy / curvature, 0)
        z.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        before, energy = energy, residual.square().sum(1, keepdim=True)
        direction = torch.addcmul(residual, torch.where(before > 0, energy / before, 0), direction)
    return z

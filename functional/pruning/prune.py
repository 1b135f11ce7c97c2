"""Pruning of one linear map: (weight, statistics) -> (new weight, mask). D²Prune Eq. 7-10, 13-15 and its baselines.

| method       | score                                  | compared within     | kept weights       |
| ------------ | -------------------------------------- | ------------------- | ------------------ |
| magnitude    | |W|                                    | the whole matrix    | unchanged          |
| wanda        | W² ‖X_j‖²                              | a row               | unchanged          |
| d2_wanda     | W² ‖X_j‖² + activation terms           | a row               | unchanged          |
| sparsegpt    | W² / [H⁻¹]_jj                          | 128 columns         | OBS update         |
| d2_sparsegpt | W² / [H⁻¹]_jj + activation terms       | 128 columns         | OBS update         |

With an N:M pattern every method compares within each group of M weights of a row.

What is defined beyond that: weights of dead inputs (always 0) are pruned first, and with the update become 0 even where they
are kept, as in the released code; without any live input all count alike, so |W| decides. Where the OBS update, which fixes
columns from left to right, would end in a larger error than none, the rows that it harms stay without. Scales do not matter as
long as float32 holds the sums of squares: far from 1 the solve works in units, powers of two, in which the largest weight and
the most energetic input are about 1.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from functional.pruning.masks import (
    Pattern,
    check_divisible,
    check_sparsity,
    keep_largest,
    keep_largest_of_groups,
    keep_largest_of_rows,
    parse_pattern,
    zeros_wanted,
)
from functional.pruning.scores import ScoreTerms, score_terms
from functional.pruning.solver import obs_prune, safe_unit
from functional.pruning.statistics import LARGEST, ActivationNorm, InputStatistics, OutputStatistics, check_activation_norm

log = logging.getLogger(__name__)

TermsOf = Callable[[Tensor], ScoreTerms]
"""Makes the score of a second-order term (I,)."""

METHODS = ("magnitude", "wanda", "sparsegpt", "d2_wanda", "d2_sparsegpt")


@dataclass
class PruneResult:
    """A pruned linear map.

    Attributes:
        weight: (O, I), in the dtype and on the device of the given weight; exactly 0 where the mask is False.
        mask: (O, I), bool, True = kept.
        error: Σ ‖(W − Ŵ) x‖² over the calibration tokens.
        norm: Σ ‖W x‖² over the calibration tokens.
        scores: (O, I), float32, the scores that chose the mask.
        damping: Share of the Hessian's mean diagonal that was added; None without weight update.
    """

    weight: Tensor
    mask: Tensor
    error: float
    norm: float
    scores: Tensor
    damping: float | None

    @property
    def relative_error(self) -> float:
        """error / norm; 0 for a map whose outputs are all zero."""
        return self.error / self.norm if self.norm else 0.0

    @property
    def sparsity(self) -> float:
        """Share of entries that the mask drops."""
        return 1 - self.mask.sum().item() / self.mask.numel()


@torch.no_grad()
def prune_linear(
    weight: Tensor,
    inputs: InputStatistics,
    outputs: OutputStatistics | None = None,
    method: str = "d2_sparsegpt",
    sparsity: float = 0.5,
    pattern: str | None = None,
    lambda1: float = 1.0,
    lambda2: float = 0.0,
    scale: float = 1500.0,
    activation_norm: ActivationNorm = "rms",
    block_size: int = 128,
    damping: float = 0.01,
) -> PruneResult:
    """Prune the weight of a linear map y = W x + b.

    Args:
        weight: W, (O, I), any floating dtype; not modified. The solve is float32 on the device of the statistics.
        inputs: Statistics of x.
        outputs: Statistics of y (with bias); needed by d2_wanda and d2_sparsegpt.
        method: One of `METHODS`, see the table above.
        sparsity: Share of zeros in [0, 1); not used with a pattern.
        pattern: "N:M" = N zeros in every M consecutive weights of a row; M divides I.
        lambda1: λ1, weight of the first-order activation term.
        lambda2: λ2, weight of the second-order activation term.
        scale: s in the activation norms; tokens per sample make `rms` the root mean square.
        activation_norm: rms (Alg. 1) or official (the released code), see :mod:`functional.pruning.statistics`.
        block_size: Columns that the weight update handles, and compares, at a time.
        damping: Share of the Hessian's mean diagonal added to it; grows, with a warning, where that is not enough.

    Returns:
        The pruned weight, its mask and its error on the calibration tokens.

    Raises:
        ValueError: If an argument is out of range, the shapes do not fit, or weight or statistics are not finite.
        NotPositiveDefiniteError: (a ValueError) If the Hessian cannot be factorised.
    """
    groups = parse_pattern(pattern)
    _check(weight, inputs, outputs, method, sparsity, groups, lambda1, lambda2, scale, activation_norm, block_size, damping)
    dense = weight.to(inputs.gram.device, torch.float32)
    updates = method.endswith("sparsegpt")
    x_unit, w_unit = inputs.unit(), _unit(dense)
    if not inputs.square_norm.any():
        log.warning("All inputs are 0, or so small that their squares are: the magnitude of the weights decides.")
    x_norm, y_norm = _activation_norms(method, inputs, outputs, activation_norm, scale, x_unit, w_unit)
    terms_of = partial(score_terms, x_norm=x_norm, y_norm=y_norm, lambda1=lambda1, lambda2=lambda2)
    used_damping = None
    if updates:
        factor, dead, used_damping = inputs.inverse_factor(damping)
        pruned, mask, scores = _updated(dense * w_unit, factor, dead, terms_of, sparsity, groups, block_size)
        pruned = _cast(pruned / w_unit, weight.dtype)
    else:
        energy = inputs.mean_square_norm() * x_unit
        scores = _scores_without_update(dense * w_unit, energy, terms_of, method)
        mask = _mask_without_update(scores, method, sparsity, groups)
        pruned = weight.to(mask.device).masked_fill(~mask, 0)
    _check_scores(scores, lambda1, lambda2, scale)
    energies = _energies(dense - pruned.float(), inputs)
    if updates:
        pruned, energies = _unharmed(pruned, energies, dense, mask, inputs)
    return PruneResult(
        weight=pruned.to(weight.device),
        mask=mask.to(weight.device),
        error=energies.sum().item(),
        norm=_energies(dense, inputs).sum().item(),
        scores=_in_units_of(scores, method, x_unit, w_unit),
        damping=used_damping,
    )


@torch.no_grad()
def partial_update(result: PruneResult, weight: Tensor, inputs: InputStatistics, share: float) -> PruneResult:
    """The same mask with a share of the weight update only: M ⊙ W + share · (Ŵ − M ⊙ W).

    Args:
        result: Ŵ with its mask M, from :func:`prune_linear` with a method that updates.
        weight: W, (O, I), the weight that was pruned.
        inputs: Statistics of x, for the error.
        share: 0 leaves the kept weights as they are, 1 is the whole update.

    Raises:
        ValueError: If `share` is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"Argument `share` expected to be in [0, 1] but got {share}.")
    dense = weight.to(inputs.gram.device, torch.float32)
    kept = dense.masked_fill(~result.mask.to(dense.device), 0)
    mixed = torch.lerp(kept, result.weight.to(kept), share).to(weight.dtype)
    error = _energies(dense - mixed.float(), inputs).sum().item()
    return replace(result, weight=mixed.to(weight.device), error=error)


def _activation_norms(
    method: str,
    inputs: InputStatistics,
    outputs: OutputStatistics | None,
    mode: ActivationNorm,
    scale: float,
    x_unit: float,
    w_unit: float,
) -> tuple[Tensor | None, Tensor | None]:
    """x̂ and ŷ in units, where the method has activation terms."""
    if not method.startswith("d2_"):
        return None, None
    of_inputs = inputs.updated_activation_norm if method.endswith("sparsegpt") else inputs.activation_norm
    return of_inputs(mode, scale) * x_unit**0.5, outputs.activation_norm(mode, scale) * x_unit**0.5 * w_unit


def _updated(
    weight: Tensor, factor: Tensor, dead: Tensor, terms_of: TermsOf, sparsity: float, groups: Pattern | None, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`obs_prune` with the scores of the inverse Hessian; dead inputs count nothing while there are others."""
    dead = dead & ~dead.all()
    terms = terms_of(factor.diagonal().square().reciprocal().masked_fill(dead, 0))
    pruned, mask, scores = obs_prune(weight, factor, terms, sparsity, groups, block_size)
    return pruned.masked_fill_(dead, 0), mask, scores


def _scores_without_update(weight: Tensor, energy: Tensor, terms_of: TermsOf, method: str) -> Tensor:
    """|W|, or the scores of the inputs' energies; without any energy all inputs count alike."""
    if method == "magnitude":
        return weight.abs()
    return terms_of(energy if energy.any() else torch.ones_like(energy))(weight)


def _mask_without_update(scores: Tensor, method: str, sparsity: float, groups: Pattern | None) -> Tensor:
    """What the table above says of magnitude, wanda and d2_wanda."""
    if groups is not None:
        return keep_largest_of_groups(scores, groups)
    if method == "magnitude":
        return keep_largest(scores, zeros_wanted(scores.numel(), sparsity))
    return keep_largest_of_rows(scores, zeros_wanted(scores.shape[1], sparsity))


def _unit(weight: Tensor) -> float:
    """By what weights are multiplied so that float32 holds their scores and energies: 1, or a power of four."""
    return safe_unit(weight.abs().max().item(), 16)


def _cast(pruned: Tensor, dtype: torch.dtype) -> Tensor:
    cast = pruned.to(dtype)
    if not torch.isfinite(cast).all():
        wider = "" if dtype in (torch.float32, torch.float64) else "Use bfloat16 or float32, or more `damping`."
        raise ValueError(
            f"Argument `weight`: the updated weight does not fit into {dtype}, it reaches {pruned.abs().max().item():.3g}. "
            f"{wider or 'Use more `damping`, or more calibration tokens.'}"
        )
    return cast


def _unharmed(pruned: Tensor, energies: Tensor, dense: Tensor, mask: Tensor, inputs: InputStatistics) -> tuple[Tensor, Tensor]:
    """The pruned weight without the update of those rows that are better off without, if it is worse as a whole than none."""
    without = _energies(dense.masked_fill(mask, 0), inputs)
    if energies.sum() <= without.sum():
        return pruned, energies
    harmed = energies > without
    log.warning("The weight update raises the error: %d of %d rows stay without.", harmed.sum(), len(harmed))
    kept = dense.masked_fill(~mask, 0).to(pruned.dtype)
    return torch.where(harmed.to(pruned.device)[:, None], kept, pruned), torch.minimum(energies, without)


def _energies(weight: Tensor, inputs: InputStatistics) -> Tensor:
    """Σ ‖w x‖² = w G wᵀ of each row, never below 0: float64 on the CPU, (O,)."""
    x_unit, w_unit = inputs.unit() ** 0.5, _unit(weight)
    scaled = weight * w_unit * x_unit  # one after the other: float32 need not hold the product
    rows = (scaled @ inputs.gram).mul_(scaled).sum(1)
    return rows.cpu().double().clamp_min(0) / (w_unit * x_unit) ** 2


def _in_units_of(scores: Tensor, method: str, x_unit: float, w_unit: float) -> Tensor:
    """Scores as the table has them; what float32 cannot hold becomes its largest number."""
    if w_unit == x_unit == 1:
        return scores
    for unit in (w_unit,) if method == "magnitude" else (w_unit, w_unit, x_unit):
        scores = scores / unit
    return scores.clamp(-LARGEST, LARGEST)


def _check_scores(scores: Tensor, lambda1: float, lambda2: float, scale: float) -> None:
    if not torch.isfinite(scores).all():
        raise ValueError(
            f"Arguments `lambda1` = {lambda1:g}, `lambda2` = {lambda2:g} and `scale` = {scale:g} give scores that overflow "
            "float32. Use smaller λ or a larger scale."
        )


def _check(
    weight, inputs, outputs, method, sparsity, groups, lambda1, lambda2, scale, activation_norm, block_size, damping
) -> None:
    if method not in METHODS:
        raise ValueError(f"Argument `method` expected to be one of {', '.join(METHODS)} but got {method!r}.")
    if weight.ndim != 2 or not weight.is_floating_point() or weight.shape[1] != inputs.features:
        raise ValueError(
            f"Argument `weight` expected to be floating point of shape (out_features, {inputs.features}) but got "
            f"{weight.dtype} of shape {tuple(weight.shape)}."
        )
    inputs.check_filled()
    if method.startswith("d2_"):
        if outputs is None or outputs.features != weight.shape[0]:
            raise ValueError(
                f"Argument `outputs` expected to be OutputStatistics({weight.shape[0]}) for method {method} but got "
                + ("None." if outputs is None else f"OutputStatistics({outputs.features}).")
            )
        outputs.check_filled()
        check_activation_norm(activation_norm, scale)
    if groups is None:
        check_sparsity(sparsity)
    else:
        check_divisible(weight.shape[1], groups)
    if block_size < 1:
        raise ValueError(f"Argument `block_size` expected to be a positive number of columns but got {block_size}.")
    if not 0 <= damping <= 1:
        raise ValueError(f"Argument `damping` expected to be in [0, 1] but got {damping}.")
    for name, value in {"lambda1": lambda1, "lambda2": lambda2}.items():
        if not abs(value) < float("inf"):
            raise ValueError(f"Argument `{name}` expected to be a finite number but got {value}.")
    if not torch.isfinite(weight.float()).all():
        raise ValueError("Argument `weight` holds NaN or Inf" + (" as float32." if weight.dtype == torch.float64 else "."))
    inputs.check_finite("inputs")
    if method.startswith("d2_"):
        outputs.check_finite("outputs")

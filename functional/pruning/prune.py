"""Pruning of one linear map: (weight, statistics) -> (new weight, mask). D²Prune Eq. 7-10, 13-15 and its baselines.

| method       | score                                  | compared within     | kept weights       |
| ------------ | -------------------------------------- | ------------------- | ------------------ |
| magnitude    | |W|                                    | the whole matrix    | unchanged          |
| wanda        | W² ‖X_j‖²                              | a row               | unchanged          |
| d2_wanda     | W² ‖X_j‖² + activation terms           | a row               | unchanged          |
| sparsegpt    | W² / [H⁻¹]_jj                          | 128 columns         | OBS update         |
| d2_sparsegpt | W² / [H⁻¹]_jj + activation terms       | 128 columns         | OBS update         |

With an N:M pattern every method compares within each group of M weights of a row.
"""

from dataclasses import dataclass, replace

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
from functional.pruning.scores import score_terms
from functional.pruning.solver import obs_prune
from functional.pruning.statistics import ActivationNorm, InputStatistics, OutputStatistics, check_activation_norm

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
    y_norm, x_norm = None, None
    if method.startswith("d2_"):
        y_norm = outputs.activation_norm(activation_norm, scale)
        x_norm = (inputs.updated_activation_norm if updates else inputs.activation_norm)(activation_norm, scale)

    used_damping = None
    if updates:
        factor, dead, used_damping = inputs.inverse_factor(damping)
        terms = score_terms(factor.diagonal().square().reciprocal(), x_norm, y_norm, lambda1, lambda2)
        pruned, mask, scores = obs_prune(dense.masked_fill(dead, 0), factor, terms, sparsity, groups, block_size)
    else:
        terms = score_terms(inputs.mean_square_norm(), x_norm, y_norm, lambda1, lambda2)
        scores = dense.abs() if method == "magnitude" else terms(dense)
        mask = _mask_without_update(scores, method, sparsity, groups)
        pruned = dense.masked_fill(~mask, 0)

    pruned = pruned.to(weight.dtype)
    if not torch.isfinite(pruned).all():
        raise ValueError(f"The updated weight does not fit into {weight.dtype}. Use bfloat16 or float32, or more `damping`.")
    return PruneResult(
        weight=pruned.to(weight.device),
        mask=mask.to(weight.device),
        error=_energy(dense - pruned.float(), inputs.gram),
        norm=_energy(dense, inputs.gram),
        scores=scores,
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
    return replace(result, weight=mixed.to(weight.device), error=_energy(dense - mixed.float(), inputs.gram))


def _mask_without_update(scores: Tensor, method: str, sparsity: float, groups: Pattern | None) -> Tensor:
    """What the table above says of magnitude, wanda and d2_wanda."""
    if groups is not None:
        return keep_largest_of_groups(scores, groups)
    if method == "magnitude":
        return keep_largest(scores, zeros_wanted(scores.numel(), sparsity))
    return keep_largest_of_rows(scores, zeros_wanted(scores.shape[1], sparsity))


def _energy(weight: Tensor, gram: Tensor) -> float:
    """Σ ‖W x‖² = tr(W G Wᵀ), never below 0."""
    rows = (weight @ gram).mul_(weight).sum(1)
    return max(rows.cpu().double().sum().item(), 0.0)


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
    for name, tensor in {"weight": weight, "inputs": inputs.gram}.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"Argument `{name}` holds NaN or Inf.")

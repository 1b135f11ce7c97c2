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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from functional.pruning.admm import Solver, admm_update, check_solver
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
from functional.pruning.precision import float32_matmul
from functional.pruning.scores import ScoreTerms, score_terms
from functional.pruning.solver import obs_prune
from functional.pruning.stack import Stack, energies_of
from functional.pruning.statistics import LARGEST, ActivationNorm, InputStatistics, OutputStatistics, check_activation_norm

log = logging.getLogger(__name__)

TermsOf = Callable[[Tensor], ScoreTerms]
"""Makes the score of a second-order term (I,)."""

LEAST_GAIN = 1e-4
"""Share by which ADMM must lower the error of a row to be taken."""

METHODS = ("magnitude", "wanda", "sparsegpt", "d2_wanda", "d2_sparsegpt")


@dataclass
class PruneResult:
    """A pruned linear map.

    Attributes:
        weight: (O, I), in the dtype and on the device of the given weight; exactly 0 where the mask is False.
        mask: (O, I), bool, True = kept.
        error: Σ ‖(W − Ŵ) x‖² over the calibration tokens; estimated where the statistics have a Gram matrix of a part of them.
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
    solver: Solver = "obs",
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
        solver: Of the weight update: obs, or admm, which goes on from there with the same mask (functional.pruning.admm) and
            is taken where it lowers the error of a row.

    Returns:
        The pruned weight, its mask and its error on the calibration tokens.

    Raises:
        ValueError: If an argument is out of range, the shapes do not fit, or weight or statistics are not finite.
        NotPositiveDefiniteError: (a ValueError) If the Hessian cannot be factorised.
    """
    options = {"lambda1": lambda1, "lambda2": lambda2, "scale": scale, "activation_norm": activation_norm}
    options |= {"block_size": block_size, "damping": damping, "solver": solver}
    return prune_linears([weight], inputs, [outputs], method=method, sparsity=sparsity, pattern=pattern, **options)[0]


@torch.no_grad()
def prune_linears(
    weights: Sequence[Tensor],
    inputs: InputStatistics,
    outputs: Sequence[OutputStatistics | None],
    method: str = "d2_sparsegpt",
    sparsity: float | Sequence[float] = 0.5,
    pattern: str | None = None,
    lambda1: float = 1.0,
    lambda2: float = 0.0,
    scale: float = 1500.0,
    activation_norm: ActivationNorm = "rms",
    block_size: int = 128,
    damping: float = 0.01,
    solver: Solver = "obs",
) -> list[PruneResult]:
    """Prune linear maps that read the same x together, which is faster: each as `prune_linear`, whose arguments these are.

    Args:
        weights: W of each, (O, I).
        outputs: Statistics of y of each.
        sparsity: Of each, or one for all.
    """
    check_solver(solver)
    groups = parse_pattern(pattern)
    shares = list(sparsity) if isinstance(sparsity, Sequence) else [sparsity] * len(weights)
    for weight, y, share in zip(weights, outputs, shares, strict=True):
        _check(weight, inputs, y, method, share, groups, lambda1, lambda2, scale, activation_norm, block_size, damping)
    stack = Stack(weights, inputs)
    if not inputs.square_norm.any():
        log.warning("All inputs are 0, or so small that their squares are: the magnitude of the weights decides.")
    x_norm, y_norm = _activation_norms(method, inputs, outputs, stack, activation_norm, scale)
    terms_of = partial(score_terms, x_norm=x_norm, y_norm=y_norm, lambda1=lambda1, lambda2=lambda2)
    used_damping = None
    if method.endswith("sparsegpt"):
        factor, dead, used_damping = inputs.inverse_factor(damping)
        with float32_matmul("highest", factor.device):
            solved, mask, scores = _updated(stack, factor, dead, terms_of, shares, groups, block_size)
        pruned = _cast(stack.in_own_units(solved), [weight.dtype for weight in weights])
    else:
        scores = _scores_without_update(stack, inputs, terms_of, method)
        mask = _mask_without_update(scores, method, shares, groups, stack.parts)
        pruned = [w.to(mask.device).masked_fill(~kept, 0) for w, kept in zip(weights, stack.split(mask), strict=True)]
    _check_scores(scores, lambda1, lambda2, scale)
    energies = energies_of([dense - new.float() for dense, new in zip(stack.dense, pruned, strict=True)], inputs)
    if used_damping is not None:
        pruned, energies = _unharmed(pruned, energies, stack, mask, inputs)
        if solver == "admm":
            pruned, energies = _refined(pruned, energies, stack, solved, mask, inputs, used_damping)
    norms = energies_of(stack.dense, inputs)
    return [
        PruneResult(
            weight=new.to(weight.device),
            mask=kept.to(weight.device),
            error=error.sum().item(),
            norm=norm.sum().item(),
            scores=_in_units_of(score, method, stack.x_unit, unit),
            damping=used_damping,
        )
        for weight, new, kept, error, norm, score, unit in zip(
            weights, pruned, stack.split(mask), energies, norms, stack.split(scores), stack.units, strict=True
        )
    ]


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
    dense = weight.to(inputs.square_norm.device, torch.float32)
    kept = dense.masked_fill(~result.mask.to(dense.device), 0)
    mixed = torch.lerp(kept, result.weight.to(kept), share).to(weight.dtype)
    error = energies_of([dense - mixed.float()], inputs)[0].sum().item()
    return replace(result, weight=mixed.to(weight.device), error=error)


def _activation_norms(
    method: str,
    inputs: InputStatistics,
    outputs: Sequence[OutputStatistics | None],
    stack: Stack,
    mode: ActivationNorm,
    scale: float,
) -> tuple[Tensor | None, Tensor | None]:
    """x̂ and ŷ in units, where the method has activation terms."""
    if not method.startswith("d2_"):
        return None, None
    of_inputs = inputs.updated_activation_norm if method.endswith("sparsegpt") else inputs.activation_norm
    root = stack.x_unit**0.5
    y_norms = [y.activation_norm(mode, scale) * root * unit for y, unit in zip(outputs, stack.units, strict=True)]
    return of_inputs(mode, scale) * root, torch.cat(y_norms)


def _updated(
    stack: Stack,
    factor: Tensor,
    dead: Tensor,
    terms_of: TermsOf,
    shares: list[float],
    groups: Pattern | None,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`obs_prune` with the scores of the inverse Hessian; dead inputs count nothing while there are others."""
    dead = dead & ~dead.all()
    terms = terms_of(factor.diagonal().square().reciprocal().masked_fill(dead, 0))
    pruned, mask, scores = obs_prune(stack.scaled, factor, terms, shares, groups, block_size, stack.parts)
    return pruned.masked_fill_(dead, 0), mask, scores


def _scores_without_update(stack: Stack, inputs: InputStatistics, terms_of: TermsOf, method: str) -> Tensor:
    """|W|, or the scores of the inputs' energies; without any energy all inputs count alike."""
    if method == "magnitude":
        return stack.scaled.abs()
    energy = inputs.mean_square_norm() * stack.x_unit
    return terms_of(energy if energy.any() else torch.ones_like(energy))(stack.scaled)


def _mask_without_update(
    scores: Tensor, method: str, shares: list[float], groups: Pattern | None, parts: Sequence[int]
) -> Tensor:
    """What the table above says of magnitude, wanda and d2_wanda."""
    if groups is not None:
        return keep_largest_of_groups(scores, groups)
    keep, numel = (keep_largest, torch.numel) if method == "magnitude" else (keep_largest_of_rows, lambda part: part.shape[1])
    pairs = zip(scores.split(parts), shares, strict=True)
    return torch.cat([keep(part, zeros_wanted(numel(part), share)) for part, share in pairs])


def _cast(pruned: list[Tensor], dtypes: list[torch.dtype]) -> list[Tensor]:
    cast = [weight.to(dtype) for weight, dtype in zip(pruned, dtypes, strict=True)]
    finite = torch.stack([weight.isfinite().all() for weight in cast]).tolist()
    for weight, dtype in ((w, d) for w, d, good in zip(pruned, dtypes, finite, strict=True) if not good):
        wider = "" if dtype in (torch.float32, torch.float64) else "Use bfloat16 or float32, or more `damping`."
        raise ValueError(
            f"Argument `weight`: the updated weight does not fit into {dtype}, it reaches {weight.abs().max().item():.3g}. "
            f"{wider or 'Use more `damping`, or more calibration tokens.'}"
        )
    return cast


def _unharmed(
    pruned: list[Tensor], energies: list[Tensor], stack: Stack, mask: Tensor, inputs: InputStatistics
) -> tuple[list[Tensor], list[Tensor]]:
    """The pruned weights without the update of those rows that are better off without, if one is worse as a whole than none."""
    masks = stack.split(mask)
    without = energies_of([dense.masked_fill(kept, 0) for dense, kept in zip(stack.dense, masks, strict=True)], inputs)
    for i, dense in enumerate(stack.dense):
        if energies[i].sum() <= without[i].sum():
            continue
        harmed = energies[i] > without[i]
        log.warning("The weight update raises the error: %d of %d rows stay without.", harmed.sum(), len(harmed))
        kept = dense.masked_fill(~masks[i], 0).to(pruned[i].dtype)
        pruned[i] = torch.where(harmed.to(dense.device)[:, None], kept, pruned[i])
        energies[i] = torch.minimum(energies[i], without[i])
    return pruned, energies


def _refined(
    pruned: list[Tensor],
    energies: list[Tensor],
    stack: Stack,
    solved: Tensor,
    mask: Tensor,
    inputs: InputStatistics,
    damping: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """The pruned weights with those rows of ADMM whose error is lower, by more than float32 could make up."""
    with float32_matmul("highest", mask.device):
        refined = stack.in_own_units(admm_update(stack.scaled, solved, mask, inputs.preconditioned(damping)))
    refined = [new.to(old.dtype) for new, old in zip(refined, pruned, strict=True)]
    found = energies_of([dense - new.float() for dense, new in zip(stack.dense, refined, strict=True)], inputs)
    for i, (new, energy) in enumerate(zip(refined, found, strict=True)):
        better = energy < (1 - LEAST_GAIN) * energies[i]  # not where a row has left the range of its type: that is NaN
        pruned[i] = torch.where(better.to(new.device)[:, None], new, pruned[i])
        energies[i] = torch.where(better, energy, energies[i])
    return pruned, energies


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
    inputs.check_finite("inputs")
    if method.startswith("d2_"):
        outputs.check_finite("outputs")

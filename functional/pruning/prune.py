"""Pruning of one linear map: (weight, statistics) -> (new weight, mask). D²Prune Eq. 7-10, 13-15 and its baselines.

| method       | score                                  | compared within     | kept weights       |
| ------------ | -------------------------------------- | ------------------- | ------------------ |
| magnitude    | |W|                                    | the whole matrix    | unchanged          |
| wanda        | W² ‖X_j‖²                              | a row               | unchanged          |
| d2_wanda     | W² ‖X_j‖² + activation terms           | a row               | unchanged          |
| sparsegpt    | W² / [H⁻¹]_jj                          | 128 columns         | OBS update         |
| d2_sparsegpt | W² / [H⁻¹]_jj + activation terms       | 128 columns         | OBS update         |
| either with solver joint | W² H_jj (+ activation terms) | the whole matrix | least squares    |

With an N:M pattern every method compares within each group of M weights of a row.

Defined beyond the paper: weights of dead inputs (always 0) are pruned first, and the update sets them to 0 even where they are
kept, as in the released code. Without any live input all inputs count alike, so |W| decides. The OBS update fixes columns from
left to right; rows that it would leave with a larger error than no update stay without it. Scales do not matter as long as
float32 holds the sums of squares: far from 1 the solve works in units, powers of two, in which the largest weight and the most
energetic input are about 1.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from functional.pruning.batches import LARGEST
from functional.pruning.checks import SolverName, check_arguments, check_perturbation, check_scores, check_solver
from functional.pruning.joint import Compared
from functional.pruning.masks import parse_pattern
from functional.pruning.methods import Solved, aim_at_dense_outputs, solve_jointly, solve_with_update, solve_without_update
from functional.pruning.perturbation import DENSE_SHARE, Perturbation
from functional.pruning.scores import score_terms
from functional.pruning.stack import Stack, energies_of
from functional.pruning.statistics import ActivationNorm, InputStatistics, OutputStatistics

log = logging.getLogger(__name__)

METHODS = ("magnitude", "wanda", "sparsegpt", "d2_wanda", "d2_sparsegpt")
UPDATED = ("sparsegpt", "d2_sparsegpt")
"""Methods that update the kept weights."""

Scale = float | Literal["auto"]


@dataclass
class PruneResult:
    """A pruned linear map.

    Attributes:
        weight: (O, I), in the dtype and on the device of the given weight; exactly 0 where the mask is False.
        mask: (O, I), bool, True = kept.
        error: Σ ‖(W − Ŵ) x‖² over the calibration tokens; an estimate if only some of them entered the Gram matrix. With a
            perturbation, W is the target that makes up for it, here and in `norm`.
        norm: Σ ‖W x‖² over the calibration tokens.
        scores: (O, I), float32, the scores that chose the mask.
        damping: Share of the Hessian's mean diagonal that was added; None without a weight update.
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
    scale: Scale = "auto",
    activation_norm: ActivationNorm = "rms",
    block_size: int = 128,
    damping: float = 0.01,
    solver: SolverName = "obs",
    compared: Compared = "matrix",
    perturbation: Perturbation | None = None,
    dense_share: float = DENSE_SHARE,
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
        scale: s in the activation norms; auto is the number of tokens of a sample, which makes `rms` the root mean square.
        activation_norm: rms (Alg. 1) or official (the released code), see :mod:`functional.pruning.statistics`.
        block_size: Columns that the weight update handles, and compares, at a time.
        damping: Share of the Hessian's mean diagonal that is added to it; grows, with a warning, if that is not enough.
        solver: Update of the kept weights: obs; admm, which continues from the OBS solution with the same mask
            (functional.pruning.admm) and replaces rows whose error it lowers; or joint, which chooses the mask while it solves
            (functional.pruning.joint).
        compared: Whether weights compete within the whole matrix or within their row, for the joint solver.
        perturbation: What the inputs lack of those in the dense model; a weight update then aims at the dense model's outputs
            (functional.pruning.perturbation).
        dense_share: α, the share of the perturbation that the update makes up for, in [0, 1].

    Returns:
        The pruned weight, its mask and its error on the calibration tokens.

    Raises:
        ValueError: If an argument is out of range, the shapes do not fit, or weight or statistics are not finite.
        NotPositiveDefiniteError: (a ValueError) If the Hessian cannot be factorised.

    Examples:
        The first input is ten times larger than the others, so Wanda keeps its weight although it is the smallest.

        >>> x = torch.tensor([[[10.0, 1.0, 1.0], [10.0, -1.0, 1.0]]])  # 1 sample, 2 tokens, 3 features
        >>> inputs = InputStatistics(3).update(x, sample_index=0)
        >>> result = prune_linear(torch.tensor([[1.0, 2.0, 3.0]]), inputs, method="wanda", sparsity=0.34)
        >>> result.weight, result.error
        (tensor([[1., 0., 3.]]), 8.0)
    """
    given = method, sparsity, pattern, lambda1, lambda2, scale, activation_norm, block_size, damping, solver
    return prune_linears([weight], inputs, [outputs], *given, compared, perturbation, dense_share)[0]


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
    scale: Scale = "auto",
    activation_norm: ActivationNorm = "rms",
    block_size: int = 128,
    damping: float = 0.01,
    solver: SolverName = "obs",
    compared: Compared = "matrix",
    perturbation: Perturbation | None = None,
    dense_share: float = DENSE_SHARE,
) -> list[PruneResult]:
    """Prune linear maps that read the same x together. The results are those of `prune_linear`, sooner.

    Args:
        weights: W of each map, (O, I), any floating dtype; not modified.
        inputs: Statistics of x.
        outputs: Statistics of y of each map; None where the method does not need them.
        method: One of `METHODS`.
        sparsity: Share of zeros of each map, or one for all.
        pattern: "N:M", or None.
        lambda1: λ1, weight of the first-order activation term.
        lambda2: λ2, weight of the second-order activation term.
        scale: s in the activation norms, or auto.
        activation_norm: rms or official.
        block_size: Columns that the weight update handles, and compares, at a time.
        damping: Share of the Hessian's mean diagonal that is added to it.
        solver: Update of the kept weights: obs, admm or joint.
        compared: Whether weights compete within the matrix or the row, for the joint solver.
        perturbation: What the inputs lack of those in the dense model.
        dense_share: Share of the perturbation that the update makes up for.

    Returns:
        The result of each map.

    Raises:
        ValueError: If an argument is out of range, the shapes do not fit, or weights or statistics are not finite.
        NotPositiveDefiniteError: (a ValueError) If the Hessian cannot be factorised.
    """
    check_solver(solver, compared)
    groups = parse_pattern(pattern)
    shares = list(sparsity) if isinstance(sparsity, Sequence) else [sparsity] * len(weights)
    for weight, y, share in zip(weights, outputs, shares, strict=True):
        given = weight, inputs, y, method, METHODS, share, groups, lambda1, lambda2, scale, activation_norm, block_size, damping
        check_arguments(*given, perturbation, dense_share)
    scale = inputs.tokens_per_sample() if scale == "auto" else scale
    stack = Stack(weights, inputs)
    if not inputs.square_norm.any():
        log.warning("All inputs are 0, or so small that their squares are: the magnitude of the weights decides.")
    if perturbation is not None and dense_share and method in UPDATED:
        damping = aim_at_dense_outputs(stack, inputs, perturbation, damping, dense_share)
    x_norm, y_norm = _activation_norms(method, inputs, outputs, stack, activation_norm, scale)
    terms_of = partial(score_terms, x_norm=x_norm, y_norm=y_norm, lambda1=lambda1, lambda2=lambda2)
    if method in UPDATED and solver == "joint":
        solved = solve_jointly(stack, inputs, terms_of, shares, groups, damping, compared == "row")
    elif method in UPDATED:
        solved = solve_with_update(stack, inputs, terms_of, shares, groups, block_size, damping, solver)
    else:
        solved = solve_without_update(stack, inputs, terms_of, method, shares, groups)
    check_scores(solved.scores, lambda1, lambda2, scale)
    return _results(stack, inputs, solved, method)


@torch.no_grad()
def partial_update(
    result: PruneResult, weight: Tensor, inputs: InputStatistics, share: float, target: Tensor | None = None
) -> PruneResult:
    """Take only a share of the weight update, with the same mask: M ⊙ W + share · (Ŵ − M ⊙ W).

    Without any update the kept weights are those of W, with a target too: aiming at it is a part of the update.

    Args:
        result: Ŵ with its mask M, from :func:`prune_linear` with a method that updates.
        weight: W, (O, I), the weight that was pruned.
        inputs: Statistics of x, for error and norm.
        share: 0 leaves the kept weights as they are, 1 is the whole update.
        target: W⁺ of :func:`target_of`, which error and norm belong to, if there was a perturbation; W when None.

    Raises:
        ValueError: If `share` is not in [0, 1], or the target has another shape than the weight.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"Argument `share` expected to be in [0, 1] but got {share}.")
    kept = weight.to(inputs.square_norm.device, torch.float32).masked_fill(~result.mask.to(inputs.square_norm.device), 0)
    mixed = torch.lerp(kept, result.weight.to(kept), share).to(weight)
    return measured_against(replace(result, weight=mixed), weight if target is None else target, inputs)


@torch.no_grad()
def measured_against(result: PruneResult, target: Tensor, inputs: InputStatistics) -> PruneResult:
    """Return a result with the error and norm that belong to a target T: Σ ‖(T − Ŵ) x‖² and Σ ‖T x‖².

    Args:
        result: Ŵ.
        target: T, (O, I), any floating dtype.
        inputs: Statistics of x.

    Raises:
        ValueError: If the target has another shape than the weight.
    """
    if target.shape != result.weight.shape:
        raise ValueError(
            f"Argument `target` expected to have the shape {tuple(result.weight.shape)} of the weight but got "
            f"{tuple(target.shape)}. Make it with `target_of`."
        )
    target = target.to(inputs.square_norm.device, torch.float32)
    error, norm = (rows.sum().item() for rows in energies_of([target - result.weight.to(target), target], inputs))
    return replace(result, error=error, norm=norm)


@torch.no_grad()
def target_of(
    weight: Tensor, inputs: InputStatistics, perturbation: Perturbation, damping: float, dense_share: float = DENSE_SHARE
) -> Tensor:
    """Return W⁺, the target of a solve with a perturbation, (O, I), float32, on the device of the statistics.

    Results do not keep it, which would be another float32 weight for each linear; the factor of the Hessian that it needs is
    cached with the statistics.

    Args:
        weight: W, (O, I), the weight that was pruned.
        inputs: Statistics of x.
        perturbation: As given to :func:`prune_linear`.
        damping: `damping` of the result.
        dense_share: As given to :func:`prune_linear`.

    Raises:
        ValueError: If the perturbation does not fit the weight and the inputs.
        NotPositiveDefiniteError: (a ValueError) If the Hessian cannot be factorised.
    """
    check_perturbation(perturbation, weight, inputs)
    stack = Stack([weight], inputs)
    aim_at_dense_outputs(stack, inputs, perturbation, damping, dense_share)
    return stack.dense[0]


def _activation_norms(
    method: str,
    inputs: InputStatistics,
    outputs: Sequence[OutputStatistics | None],
    stack: Stack,
    mode: ActivationNorm,
    scale: float,
) -> tuple[Tensor | None, Tensor | None]:
    """Return x̂ and ŷ in the stack's units if the method has activation terms, else None twice."""
    if not method.startswith("d2_"):
        return None, None
    of_inputs = inputs.updated_activation_norm if method in UPDATED else inputs.activation_norm
    root = stack.x_unit**0.5
    given = [y for y in outputs if y is not None]  # none is missing: the arguments have been checked
    y_norms = [y.activation_norm(mode, scale) * root * unit for y, unit in zip(given, stack.units, strict=True)]
    return of_inputs(mode, scale) * root, torch.cat(y_norms)


def _results(stack: Stack, inputs: InputStatistics, solved: Solved, method: str) -> list[PruneResult]:
    norms = energies_of(stack.dense, inputs)
    return [
        PruneResult(
            weight=new.to(weight.device),
            mask=kept.to(weight.device),
            error=error.sum().item(),
            norm=norm.sum().item(),
            scores=_in_units_of(score, method, stack.x_unit, unit),
            damping=solved.damping,
        )
        for weight, new, kept, error, norm, score, unit in zip(
            stack.originals,
            solved.weights,
            stack.split(solved.mask),
            solved.errors,
            norms,
            stack.split(solved.scores),
            stack.units,
            strict=True,
        )
    ]


def _in_units_of(scores: Tensor, method: str, x_unit: float, w_unit: float) -> Tensor:
    """Take the units out of scores; values that float32 cannot hold become its largest number."""
    if w_unit == x_unit == 1:
        return scores
    for unit in (w_unit,) if method == "magnitude" else (w_unit, w_unit, x_unit):
        scores = scores / unit
    return scores.clamp(-LARGEST, LARGEST)

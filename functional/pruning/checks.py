"""Check the arguments of `prune_linear` before anything is computed."""

from typing import Literal, get_args

import torch
from torch import Tensor

from functional.pruning.masks import Pattern, check_divisible, check_sparsity
from functional.pruning.perturbation import Perturbation
from functional.pruning.statistics import ActivationNorm, InputStatistics, OutputStatistics, check_activation_norm

SolverName = Literal["obs", "admm", "joint"]


def check_solver(solver: str, compared: str = "matrix") -> None:
    """Check that a solver, and the group in which it compares weights, are known.

    Raises:
        ValueError: If one is not.
    """
    if compared not in ("matrix", "row"):
        raise ValueError(f"Argument `compared` expected to be matrix or row but got {compared!r}.")
    if solver not in get_args(SolverName):
        raise ValueError(f"Argument `solver` expected to be obs, admm or joint but got {solver!r}.")


def check_arguments(
    weight: Tensor,
    inputs: InputStatistics,
    outputs: OutputStatistics | None,
    method: str,
    methods: tuple[str, ...],
    sparsity: float,
    groups: Pattern | None,
    lambda1: float,
    lambda2: float,
    scale: float | str,
    activation_norm: ActivationNorm,
    block_size: int,
    damping: float,
    perturbation: Perturbation | None = None,
    dense_share: float = 0.0,
) -> None:
    """Check the arguments of `prune_linear`, where they are explained.

    Args:
        weight: W, (O, I).
        inputs: Statistics of x.
        outputs: Statistics of y, or None.
        method: Name of the method.
        methods: Names of all methods.
        sparsity: Share of zeros.
        groups: N:M, or None.
        lambda1: λ1.
        lambda2: λ2.
        scale: s, or auto.
        activation_norm: rms or official.
        block_size: Columns of a block of the weight update.
        damping: Share of the mean diagonal that is added to the Hessian.
        perturbation: What the inputs lack, or None.
        dense_share: Share of it that the update makes up for.

    Raises:
        ValueError: If an argument is out of range or does not fit the others; names the first such argument.
    """
    if method not in methods:
        raise ValueError(f"Argument `method` expected to be one of {', '.join(methods)} but got {method!r}.")
    if weight.ndim != 2 or not weight.is_floating_point() or weight.shape[1] != inputs.features:
        raise ValueError(
            f"Argument `weight` expected to be floating point of shape (out_features, {inputs.features}) but got "
            f"{weight.dtype} of shape {tuple(weight.shape)}."
        )
    dual = method.startswith("d2_")
    if dual:
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
    if not 0 <= dense_share <= 1:
        raise ValueError(f"Argument `dense_share` expected to be in [0, 1] but got {dense_share}.")
    if perturbation is not None:
        check_perturbation(perturbation, weight, inputs)
    inputs.check_finite("inputs")
    if outputs is not None and dual:
        outputs.check_finite("outputs")


def check_perturbation(perturbation: Perturbation, weight: Tensor, inputs: InputStatistics) -> None:
    """Check that a perturbation fits a weight and the statistics of its inputs.

    Args:
        perturbation: What the inputs lack.
        weight: W, (O, I).
        inputs: Statistics of x.

    Raises:
        ValueError: If it does not, or is not finite.
    """
    if perturbation.features != inputs.features or perturbation.out_features not in (0, weight.shape[0]):
        raise ValueError(
            f"Argument `perturbation` expected to be Perturbation({inputs.features}) or Perturbation({inputs.features}, "
            f"{weight.shape[0]}) but got {perturbation!r}."
        )
    if perturbation.num_tokens != inputs.num_tokens:
        raise ValueError(
            f"Argument `perturbation` holds {perturbation.num_tokens} tokens, but `inputs` hold {inputs.num_tokens}. Update "
            "both with every batch."
        )
    perturbation.check_finite("perturbation")


def check_scores(scores: Tensor, lambda1: float, lambda2: float, scale: float) -> None:
    """Check that scores have not left the range of float32.

    Args:
        scores: Any shape.
        lambda1: λ1, for the error.
        lambda2: λ2, for the error.
        scale: s, for the error.

    Raises:
        ValueError: If a score is NaN or Inf.
    """
    if not torch.isfinite(scores).all():
        raise ValueError(
            f"Arguments `lambda1` = {lambda1:g}, `lambda2` = {lambda2:g} and `scale` = {scale:g} give scores that overflow "
            "float32. Use smaller λ or a larger scale."
        )

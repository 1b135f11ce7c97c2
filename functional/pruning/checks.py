"""Checks of the arguments of `prune_linear`, before anything is computed."""

import torch
from torch import Tensor

from functional.pruning.masks import Pattern, check_divisible, check_sparsity
from functional.pruning.statistics import ActivationNorm, InputStatistics, OutputStatistics, check_activation_norm


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
) -> None:
    """Raise a ValueError that names the first argument of `prune_linear` that is out of range or does not fit."""
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
    inputs.check_finite("inputs")
    if outputs is not None and dual:
        outputs.check_finite("outputs")


def check_scores(scores: Tensor, lambda1: float, lambda2: float, scale: float) -> None:
    """Raise a ValueError if scores have left the range of float32."""
    if not torch.isfinite(scores).all():
        raise ValueError(
            f"Arguments `lambda1` = {lambda1:g}, `lambda2` = {lambda2:g} and `scale` = {scale:g} give scores that overflow "
            "float32. Use smaller λ or a larger scale."
        )

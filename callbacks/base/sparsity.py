"""Zeros of a module's prunable linears: where they are, how many there are, and how to put them back."""

import torch
from torch import Tensor

from lightning_modules.base.prunable import PrunableModule
from lightning_modules.parts.architectures import PrunableLinear

LEAST_SPARSITY = 0.01
"""Share of zeros below which a model counts as dense: a few weights are zero by chance, most in 8 and 4 bits."""


def prunable_linears(module: PrunableModule) -> dict[str, PrunableLinear]:
    """Return the prunable linears by full name."""
    return {
        f"{block_name}.{name}": linear
        for block_name, block in module.blocks.items()
        for name, linear in module.linears(block).items()
    }


def linear_weights(module: PrunableModule) -> dict[str, Tensor]:
    """Return the weights (O, I) of the prunable linears by full name, to be read."""
    return {name: linear.weight for name, linear in prunable_linears(module).items()}


def zeros_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a mask (O, I) for each weight, True where it is 0."""
    return {name: weight == 0 for name, weight in weights.items()}


def share_of(zeros: dict[str, Tensor]) -> float:
    """Return the share of True in all masks together."""
    return sum(int(mask.sum()) for mask in zeros.values()) / sum(mask.numel() for mask in zeros.values())


@torch.no_grad()
def apply_zeros(weights: dict[str, Tensor], zeros: dict[str, Tensor]) -> None:
    """Set weights to 0 where a mask is True, even where they are NaN."""
    for name, weight in weights.items():
        weight.masked_fill_(zeros[name], 0)

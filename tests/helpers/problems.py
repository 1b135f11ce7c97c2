"""Weights and calibration data of many kinds, and their error in float64."""

import torch
from torch import Tensor

from functional.pruning import InputStatistics, OutputStatistics

KINDS = ("independent", "correlated", "rank 1", "constant", "ones", "zero", "dead channels", "duplicated", "outliers")


def problem(kind: str, rows: int, columns: int, samples: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight (rows, columns) and inputs (samples, tokens, columns), float32."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(samples, tokens, columns, generator=generator)
    if kind == "correlated":
        x = x @ (torch.randn(columns, columns, generator=generator) + 2 * torch.eye(columns))
    if kind == "rank 1":
        x = x[..., :1] * torch.randn(columns, generator=generator)
    if kind == "constant":
        x = x[:1, :1].expand_as(x).clone()
    if kind == "ones":
        x = torch.ones_like(x)
    if kind == "zero":
        x = torch.zeros_like(x)
    if kind == "dead channels":
        x[..., torch.rand(columns, generator=generator) < 0.7] = 0
    if kind == "duplicated":
        x = x[..., torch.arange(columns) // 2]
        weight = weight[:, torch.arange(columns) // 2]
    if kind == "outliers":
        x[..., : max(columns // 8, 1)] *= 1e3
    return weight, x


def collect(weight: Tensor, x: Tensor) -> tuple[InputStatistics, OutputStatistics]:
    """Statistics of inputs and of the outputs that this weight makes of them."""
    inputs, outputs = InputStatistics(weight.shape[1]), OutputStatistics(weight.shape[0])
    inputs.update(x, 0)
    outputs.update(torch.nn.functional.linear(x, weight.to(x.dtype)), 0)
    return inputs, outputs


def energy(weight: Tensor, x: Tensor) -> float:
    """Σ ‖w x‖² over the tokens, in float64."""
    return (x.double() @ weight.double().T).square().sum().item()

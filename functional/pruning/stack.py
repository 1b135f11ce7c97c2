"""Weights that read the same inputs, one below the other, and their energies over the calibration tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from functional.pruning.precision import float32_matmul
from functional.pruning.solver import safe_unit
from functional.pruning.statistics import InputStatistics


class Stack:
    """Weights that read the same inputs, one below the other, in units in which float32 holds what is made of them.

    Attributes:
        dense: The weights as float32 where the statistics are.
        parts: Their numbers of rows.
        units: By what each is multiplied in `scaled`.
        scaled: All of them, (ΣO, I); not to be changed.
        x_unit: By what squares of x are multiplied.

    Raises:
        ValueError: If a weight is not finite.
    """

    def __init__(self, weights: Sequence[Tensor], inputs: InputStatistics) -> None:
        device = inputs.square_norm.device
        self.dense = [weight.to(device, torch.float32) for weight in weights]
        self.parts = [len(weight) for weight in weights]
        self.units = []
        for largest, weight in zip(_largest(self.dense), weights, strict=True):
            if not largest < float("inf"):
                wide = " as float32." if weight.dtype == torch.float64 else "."
                raise ValueError(f"Argument `weight` holds NaN or Inf{wide}")
            self.units.append(safe_unit(largest, 16))
        scaled = [weight if unit == 1 else weight * unit for weight, unit in zip(self.dense, self.units, strict=True)]
        self.scaled = torch.cat(scaled) if len(scaled) > 1 else scaled[0]
        self.x_unit = inputs.unit()

    def split(self, x: Tensor) -> list[Tensor]:
        """What belongs to each, of rows of all."""
        return list(x.split(self.parts))

    def in_own_units(self, weights: Tensor) -> list[Tensor]:
        """Weights like `scaled`, each in the units that it came in."""
        return [part / unit for part, unit in zip(self.split(weights), self.units, strict=True)]


def energies_of(weights: list[Tensor], inputs: InputStatistics) -> list[Tensor]:
    """Σ ‖w x‖² = w G wᵀ over the calibration tokens of each row, never below 0: float64 on the CPU, (O,) of each weight.

    Of a part of the tokens only, it is scaled up to all.
    """
    x_unit, found = inputs.unit() ** 0.5, []
    units = [safe_unit(largest, 16) for largest in _largest(weights)]
    with float32_matmul(inputs.precision, inputs.gram.device):
        for weight, w_unit in zip(weights, units, strict=True):
            scaled = weight if w_unit == x_unit == 1 else weight * w_unit * x_unit  # float32 need not hold their product
            found.append((scaled @ inputs.gram).mul_(scaled).sum(1))
    rows = torch.cat(found).cpu().double().clamp_min(0).split([len(weight) for weight in weights])
    share = inputs.gram_tokens / inputs.num_tokens
    return [energies / ((w_unit * x_unit) ** 2 * share) for energies, w_unit in zip(rows, units, strict=True)]


def _largest(weights: list[Tensor]) -> list[float]:
    """Largest magnitude of each, waited for once; NaN if it holds any."""
    return torch.stack([weight.abs().max() for weight in weights]).tolist()

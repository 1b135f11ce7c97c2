"""Weights that read the same inputs, one below the other, and the energies of their rows over the calibration tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from functional.pruning.hessian import safe_unit, unit
from functional.pruning.precision import float32_matmul
from functional.pruning.statistics import InputStatistics

FREE = 16
"""Powers of two by which the largest weight may be away from 1 before units are needed."""


class Stack:
    """Weights that read the same inputs, stacked in units in which float32 holds what a solve makes of them.

    Args:
        weights: (O, I) each, any floating dtype and device; not modified.
        inputs: Statistics of x.

    Attributes:
        originals: The weights as given.
        dense: The weights as float32 on the device of the statistics.
        parts: Number of rows of each.
        units: Factor of each in `scaled`.
        scaled: All of them, (ΣO, I); not to be modified.
        x_unit: Factor of squares of x.

    Raises:
        ValueError: If a weight is not finite.
    """

    def __init__(self, weights: Sequence[Tensor], inputs: InputStatistics) -> None:
        device = inputs.square_norm.device
        self.originals = list(weights)
        self.dense = [weight.to(device, torch.float32) for weight in weights]
        self.parts = [len(weight) for weight in weights]
        self.units = []
        for largest, weight in zip(_largest(self.dense), weights, strict=True):
            if not largest < float("inf"):
                wide = " as float32." if weight.dtype == torch.float64 else "."
                raise ValueError(f"Argument `weight` holds NaN or Inf{wide}")
            self.units.append(safe_unit(largest, FREE))
        scaled = [weight if factor == 1 else weight * factor for weight, factor in zip(self.dense, self.units, strict=True)]
        self.scaled = torch.cat(scaled) if len(scaled) > 1 else scaled[0]
        self.x_unit = unit(inputs)

    def split(self, x: Tensor) -> list[Tensor]:
        """Rows of the whole stack, (ΣO, …), by part."""
        return list(x.split(self.parts))

    def differences(self, pruned: Sequence[Tensor]) -> list[Tensor]:
        """W − Ŵ of each part, float32."""
        return [dense - new.float() for dense, new in zip(self.dense, pruned, strict=True)]

    def in_own_units(self, weights: Tensor) -> list[Tensor]:
        """Weights in the units of `scaled`, (ΣO, I), by part and without units."""
        return [part / factor for part, factor in zip(self.split(weights), self.units, strict=True)]

    def in_own_dtypes(self, weights: Tensor) -> list[Tensor]:
        """As `in_own_units`, in the dtypes of the given weights.

        Raises:
            ValueError: If a dtype cannot hold its weight.
        """
        own = self.in_own_units(weights)
        cast = [weight.to(original.dtype) for weight, original in zip(own, self.originals, strict=True)]
        finite = torch.stack([weight.isfinite().all() for weight in cast]).tolist()
        for weight, original in ((w, o) for w, o, good in zip(own, self.originals, finite, strict=True) if not good):
            wider = "" if original.dtype in (torch.float32, torch.float64) else "Use bfloat16 or float32, or more `damping`."
            raise ValueError(
                f"Argument `weight`: the updated weight does not fit into {original.dtype}, it reaches "
                f"{weight.abs().max().item():.3g}. {wider or 'Use more `damping`, or more calibration tokens.'}"
            )
        return cast


def energies_of(weights: Sequence[Tensor], inputs: InputStatistics) -> list[Tensor]:
    """Σ ‖w x‖² = w G wᵀ of each row over the calibration tokens, never below 0: float64 on the CPU, (O,) per weight.

    Where the Gram matrix holds a part of the tokens, the energy is scaled up to all.
    """
    x_unit, found = unit(inputs) ** 0.5, []
    units = [safe_unit(largest, FREE) for largest in _largest(weights)]
    with float32_matmul(inputs.precision, inputs.gram.device):
        for weight, w_unit in zip(weights, units, strict=True):
            scaled = weight if w_unit == x_unit == 1 else weight * w_unit * x_unit  # float32 need not hold their product
            found.append((scaled @ inputs.gram).mul_(scaled).sum(1))
    rows = torch.cat(found).cpu().double().clamp_min(0).split([len(weight) for weight in weights])
    share = inputs.gram_tokens / inputs.num_tokens
    return [energies / ((w_unit * x_unit) ** 2 * share) for energies, w_unit in zip(rows, units, strict=True)]


def _largest(weights: Sequence[Tensor]) -> list[float]:
    """Largest magnitude of each, with one wait for the device; NaN if a weight holds any."""
    return torch.stack([weight.abs().max() for weight in weights]).tolist()

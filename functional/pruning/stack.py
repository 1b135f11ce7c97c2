"""Stack weights that read the same inputs, and measure the energies of their rows over the calibration tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from functional.pruning.hessian import safe_unit, unit
from functional.pruning.precision import float32_matmul
from functional.pruning.statistics import DerivedOutputStatistics, InputStatistics

FREE = 16
"""Distance of the largest weight from 1, in powers of two, up to which no units are needed."""


class Stack:
    """Weights that read the same inputs, stacked in units that keep a solve within the range of float32.

    Args:
        weights: (O, I) each, any floating dtype and device; not modified.
        inputs: Statistics of x.

    Attributes:
        originals: The weights as given.
        dense: The weights as float32 on the device of the statistics, or what `aim_at` has put in their place.
        parts: Number of rows of each weight.
        units: Factor of each weight in `scaled`.
        scaled: All weights times their factors, (ΣO, I); not to be modified.
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

    def aim_at(self, target: Tensor) -> None:
        """Let other weights, (ΣO, I), without units, be those that the pruned ones have to come close to."""
        self.dense = self.split(target)
        self.scaled = torch.cat([part * factor for part, factor in zip(self.dense, self.units, strict=True)])

    def split(self, x: Tensor) -> list[Tensor]:
        """Split rows of the whole stack, (ΣO, …), into those of each part."""
        return list(x.split(self.parts))

    def differences(self, pruned: Sequence[Tensor]) -> list[Tensor]:
        """Return the difference of target and pruned weight of each part, float32."""
        return [dense - new.float() for dense, new in zip(self.dense, pruned, strict=True)]

    def in_own_units(self, weights: Tensor) -> list[Tensor]:
        """Split weights in the units of `scaled`, (ΣO, I), into parts without units."""
        return [part / factor for part, factor in zip(self.split(weights), self.units, strict=True)]

    def in_own_dtypes(self, weights: Tensor) -> list[Tensor]:
        """Do the same as `in_own_units`, and cast to the dtypes of the given weights.

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
    """Return Σ ‖w x‖² = w G wᵀ of each row over the calibration tokens, never below 0: float64 on the CPU, (O,) per weight.

    If only some of the tokens entered the Gram matrix, the energy is scaled up to all.
    """
    x_unit, found = unit(inputs) ** 0.5, []
    units = [safe_unit(largest, FREE) for largest in _largest(weights)]
    with float32_matmul(inputs.precision, inputs.gram.device):
        for weight, w_unit in zip(weights, units, strict=True):
            # One factor after the other: their product may leave float32.
            scaled = weight if w_unit == x_unit == 1 else weight * w_unit * x_unit
            found.append((scaled @ inputs.gram).mul_(scaled).sum(1))
    rows = torch.cat(found).cpu().double().clamp_min(0).split([len(weight) for weight in weights])
    share = inputs.gram_tokens / inputs.num_tokens
    return [energies / ((w_unit * x_unit) ** 2 * share) for energies, w_unit in zip(rows, units, strict=True)]


def derived_outputs(weight: Tensor, inputs: InputStatistics) -> DerivedOutputStatistics:
    """Return the statistics of y = W x, for a map without bias whose outputs were not measured.

    Args:
        weight: W, (O, I), any floating dtype.
        inputs: Statistics of x, with all tokens in the Gram matrix.
    """
    inputs.check_whole()
    (energies,) = energies_of([weight.to(inputs.square_norm.device, torch.float32)], inputs)
    return DerivedOutputStatistics(energies, inputs)


def _largest(weights: Sequence[Tensor]) -> list[float]:
    """Return the largest magnitude of each weight, NaN if it holds any; waits for the device only once."""
    return torch.stack([weight.abs().max() for weight in weights]).tolist()

"""Factor the Hessian H = (2/N) Σ x xᵀ of input statistics, once for all linears that share x.

Solvers work in units: H · unit with a power of four that keeps float32 products in range. Results are cached with the
statistics (`InputStatistics.derived`) until these change.
"""

import math

from torch import Tensor

from functional.pruning.admm import Preconditioned, precondition
from functional.pruning.solver import inverse_factor
from functional.pruning.statistics import InputStatistics

FREE = 64
"""Distance of the largest energy of an input from 1, in powers of two, up to which no units are needed."""


def safe_unit(largest: float, free: int) -> float:
    """Return 1 if `largest` is within 2^±free, else a power of four near 1 / `largest`.

    Products with such a power, or with its root, are exact.

    Examples:
        >>> safe_unit(3.0, free=16), safe_unit(2.0**40, free=16) == 2.0**-40
        (1.0, True)
    """
    exponent = math.frexp(largest)[1]
    return 1.0 if abs(exponent) <= free else 2.0 ** min(max(-2 * (exponent // 2), -126), 126)  # which float32 holds


def unit(inputs: InputStatistics) -> float:
    """Return the factor of squares of x that keeps a solve within float32: 1, or a power of four."""
    return inputs.derived("unit", lambda: safe_unit(inputs.gram.diagonal().abs().max().item(), FREE))


def inverse_factor_of(inputs: InputStatistics, damping: float) -> tuple[Tensor, Tensor, float]:
    """Return :func:`functional.pruning.solver.inverse_factor` of H · unit, cached."""
    return inputs.derived(("factor", damping), lambda: inverse_factor(inputs.hessian(unit(inputs)), damping))


def preconditioned_of(inputs: InputStatistics, damping: float) -> Preconditioned:
    """Return :func:`functional.pruning.admm.precondition` of H · unit, cached."""
    return inputs.derived(("preconditioned", damping), lambda: precondition(inputs.hessian(unit(inputs)), damping))

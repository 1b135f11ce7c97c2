"""The Hessian H = (2/N) Σ x xᵀ of input statistics, and what the solvers make of it, once for all linears that share x.

Solvers work in units: H · unit with a power of four that keeps float32 products in range. Results are kept with the statistics
(`InputStatistics.derived`) until these change.
"""

import math

from torch import Tensor

from functional.pruning.admm import Preconditioned, precondition
from functional.pruning.solver import inverse_factor
from functional.pruning.statistics import InputStatistics

FREE = 64
"""Powers of two by which the largest energy of an input may be away from 1 before units are needed."""


def safe_unit(largest: float, free: int) -> float:
    """1 if `largest` is within 2^±free, else a power of four near 1 / `largest`: neither it nor its root rounds a product."""
    exponent = math.frexp(largest)[1]
    return 1.0 if abs(exponent) <= free else 2.0 ** min(max(-2 * (exponent // 2), -126), 126)  # which float32 holds


def unit(inputs: InputStatistics) -> float:
    """Factor of squares of x with which float32 holds what a solve makes of them: 1, or a power of four."""
    return inputs.derived("unit", lambda: safe_unit(inputs.gram.diagonal().abs().max().item(), FREE))


def inverse_factor_of(inputs: InputStatistics, damping: float) -> tuple[Tensor, Tensor, float]:
    """:func:`functional.pruning.solver.inverse_factor` of H · unit."""
    return inputs.derived(("factor", damping), lambda: inverse_factor(inputs.hessian(unit(inputs)), damping))


def preconditioned_of(inputs: InputStatistics, damping: float) -> Preconditioned:
    """:func:`functional.pruning.admm.precondition` of H · unit."""
    return inputs.derived(("preconditioned", damping), lambda: precondition(inputs.hessian(unit(inputs)), damping))

"""Post-training pruning of one linear map: statistics -> scores -> mask -> weights. Pure functions on tensors.

D²Prune: Sparsifying Large Language Models via Dual Taylor Expansion and Attention Distribution Awareness (AAAI 2026),
with the methods that it builds on and is compared with: magnitude, Wanda, SparseGPT.
"""

from functional.pruning.masks import Pattern, parse_pattern, zeros_wanted
from functional.pruning.perturbation import Perturbation
from functional.pruning.prune import (
    METHODS,
    UPDATED,
    PruneResult,
    measured_against,
    partial_update,
    prune_linear,
    prune_linears,
    target_of,
)
from functional.pruning.solver import NotPositiveDefiniteError
from functional.pruning.stack import derived_outputs
from functional.pruning.statistics import ActivationNorm, InputStatistics, OutputStatistics

__all__ = [
    "METHODS",
    "UPDATED",
    "ActivationNorm",
    "InputStatistics",
    "NotPositiveDefiniteError",
    "OutputStatistics",
    "Pattern",
    "Perturbation",
    "PruneResult",
    "derived_outputs",
    "measured_against",
    "parse_pattern",
    "partial_update",
    "prune_linear",
    "prune_linears",
    "target_of",
    "zeros_wanted",
]

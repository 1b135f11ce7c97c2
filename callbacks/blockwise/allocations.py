"""Ways to share the zeros of `sparsity` out over blocks, by their names in configs; the formulas are in functional/pruning."""

from math import isfinite
from typing import Literal

from utilities.choice import Choice

AllocationName = Literal["uniform", "owl", "error", "depth"]


class Allocation(Choice):
    """Base of the allocations: each gives every block a share of zeros; their number over the model stays exact."""

    def check(self, sparsity: float) -> None:
        """Check that these settings are possible at a sparsity.

        Raises:
            ValueError: If they are not.
        """


class UniformAllocation(Allocation):
    """The same share in every block."""

    short = "uniform"


class OwlAllocation(Allocation):
    """Blocks with more outliers among their scores lose less (OWL, arXiv 2310.05175); one pass over the dense model.

    Args:
        threshold: M; a score is an outlier above M times its block's mean.
        spread: Λ; largest distance of a block's share of zeros from `sparsity`, before the mean over blocks is corrected.

    Raises:
        ValueError: If an argument is not positive.
    """

    short = "owl"

    def __init__(self, threshold: float = 5.0, spread: float = 0.08) -> None:
        for name, value in (("threshold", threshold), ("spread", spread)):
            if not 0 < value < float("inf"):
                raise ValueError(f"Argument `{name}` expected to be a positive number but got {value}.")
        self.threshold, self.spread = threshold, spread

    def check(self, sparsity: float) -> None:
        """Check that no block's share of zeros can leave [0, 1].

        Raises:
            ValueError: If `spread` is too large for the sparsity.
        """
        _check_range("spread", self.spread, sparsity)


class ErrorAllocation(Allocation):
    """The last weight that is pruned adds the same relative error in every block; one pass over the dense model."""

    short = "error"


class DepthAllocation(Allocation):
    """Shares of zeros fall linearly with depth, from S + slope in the first block that is pruned to S - slope in the last.

    It needs no pass over the data. Where blocks differ in size, all shares move by one number that keeps S over the model.

    Args:
        slope: Distance of the outer blocks' shares from `sparsity`, S; below 0 shares rise with depth.

    Raises:
        ValueError: If `slope` is not finite.
    """

    short = "depth"

    def __init__(self, slope: float = 0.1) -> None:
        if not isfinite(slope):
            raise ValueError(f"Argument `slope` expected to be a finite number but got {slope}.")
        self.slope = slope

    def check(self, sparsity: float) -> None:
        """Check that no block's share of zeros can leave [0, 1].

        Raises:
            ValueError: If `slope` is too large for the sparsity.
        """
        _check_range("slope", self.slope, sparsity)


def _check_range(name: str, value: float, sparsity: float) -> None:
    if abs(value) > (most := min(sparsity, 1 - sparsity)):
        raise ValueError(
            f"Argument `allocation.{name}` expected to be at most {most:g} in magnitude at a sparsity of {sparsity:g}, or "
            f"shares of zeros would leave [0, 1], but got {value}."
        )

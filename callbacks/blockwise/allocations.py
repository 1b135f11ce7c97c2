"""How the zeros of `sparsity` are shared out over blocks, as a config names it; the mathematics is functional/pruning."""

from typing import Literal

from utilities.choice import Choice

AllocationName = Literal["uniform", "owl", "error"]


class Allocation(Choice):
    """Shares of zeros of the blocks; their sum over the model stays exact."""

    def check(self, sparsity: float) -> None:
        """Raise a ValueError unless these settings can be had at a sparsity."""


class UniformAllocation(Allocation):
    """The same share in every block."""

    short = "uniform"


class OwlAllocation(Allocation):
    """Blocks with more outliers among their scores lose less (OWL, arXiv 2310.05175); one pass over the dense model.

    Args:
        threshold: M; a score is an outlier above M times its block's mean.
        spread: Λ; how far a block's share of zeros may be from `sparsity`, before the mean over blocks is corrected.

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
        """Raise a ValueError if a block's share of zeros could leave [0, 1]."""
        if self.spread > (most := min(sparsity, 1 - sparsity)):
            raise ValueError(
                f"Argument `allocation.spread` expected to be at most {most:g} at a sparsity of {sparsity:g}, or shares of "
                f"zeros would leave [0, 1], but got {self.spread}."
            )


class ErrorAllocation(Allocation):
    """The last weight that is pruned costs every block the same relative error; one pass over the dense model."""

    short = "error"

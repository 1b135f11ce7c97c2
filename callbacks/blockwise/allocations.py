"""Ways to share the zeros of `sparsity` out over blocks, by their names in configs; the formulas are in functional/pruning."""

from typing import Literal

from utilities.choice import Choice

AllocationName = Literal["uniform", "owl", "error"]


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
        if self.spread > (most := min(sparsity, 1 - sparsity)):
            raise ValueError(
                f"Argument `allocation.spread` expected to be at most {most:g} at a sparsity of {sparsity:g}, or shares of "
                f"zeros would leave [0, 1], but got {self.spread}."
            )


class ErrorAllocation(Allocation):
    """The last weight that is pruned adds the same relative error in every block; one pass over the dense model."""

    short = "error"

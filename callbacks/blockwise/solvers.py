"""Solvers of the weight update, by their names in configs; the formulas are in functional/pruning."""

from typing import Any, get_args

from functional.pruning.joint import Compared
from utilities.checks import check_integer, check_one_of, check_share
from utilities.choice import Choice


class Solver(Choice):
    """Base of the solvers, which update the kept weights of a linear.

    Args:
        block_size: Columns of a weight that the update handles, and compares, at a time.
        damping: Share of the mean of the Hessian's diagonal that is added to it, in [0, 1]; grows, with a warning, if the
            Hessian is not positive definite.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, block_size: int = 128, damping: float = 0.01) -> None:
        check_integer("block_size", block_size, 1)
        check_share("damping", damping)
        self.block_size, self.damping = block_size, damping

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `prune_linear` that belong to the solver."""
        return {"solver": self.short, **self.settings}


class ObsSolver(Solver):
    """Optimal brain surgeon, column by column, as SparseGPT."""

    short = "obs"


class AdmmSolver(Solver):
    """OBS, then ADMM with its mask towards the least squares solution (arXiv 2401.02938), for rows whose error that lowers."""

    short = "admm"


class JointSolver(Solver):
    """Mask and weights in one solve: ADMM with a penalty that rises, then least squares (functional.pruning.joint).

    Args:
        compared: Whether weights compete for a place in the mask within the whole matrix or within their row.
        damping: Share of the mean of the Hessian's diagonal that is added to it, in [0, 1].

    Raises:
        ValueError: If an argument is out of range.
    """

    short = "joint"

    def __init__(self, compared: Compared = "matrix", damping: float = 0.01) -> None:
        check_one_of("compared", compared, get_args(Compared))
        check_share("damping", damping)
        self.compared, self.damping = compared, damping

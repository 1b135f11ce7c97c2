"""PruningSettings: what the result of a pruning run depends on, checked at once; settings that do not apply are refused."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Literal, get_args

from typing_extensions import Self

from callbacks.blockwise.allocations import Allocation, UniformAllocation
from callbacks.blockwise.solvers import JointSolver, ObsSolver, Solver
from callbacks.blockwise.update_rules import AttentionRule, FixedRule, UpdateRule
from functional.pruning import UPDATED, ActivationNorm, parse_pattern
from functional.pruning.masks import check_sparsity
from functional.pruning.perturbation import DENSE_SHARE
from functional.pruning.precision import Precision, check_precision
from functional.pruning.statistics import check_activation_norm
from utilities.checks import check_one_of

Method = Literal["d2prune", "magnitude", "wanda", "sparsegpt", "d2_wanda", "d2_sparsegpt"]
DUAL = ("d2prune", "d2_wanda", "d2_sparsegpt")
"""Methods whose score has activation terms."""
WITH_UPDATE = ("d2prune", *UPDATED)
"""Methods that update the kept weights."""
Target = Literal["pruned"] | float
LAMBDA1 = 1.0
"""λ1 of the other solvers, and of methods without one."""
JOINT_LAMBDA1 = 30.0
"""λ1 of the joint solver, chosen on held-out text with `DENSE_SHARE`."""


@dataclass(frozen=True)
class Score:
    """Activation terms of the score, D²Prune Eq. 13-15.

    Args:
        lambda1: λ1, weight of the first-order term ŷ |W| x̂; when None, 30 with the joint solver, else 1.
        lambda2: λ2, weight of W² x̂², which is subtracted.
        scale: s in the activation norms; auto is the number of tokens of a sample.
        activation_norm: rms (Algorithm 1) or official (what the released code computes).

    Raises:
        ValueError: If an argument is out of range.
    """

    lambda1: float | None = None
    lambda2: float = 0.0
    scale: float | Literal["auto"] = "auto"
    activation_norm: ActivationNorm = "rms"

    def __post_init__(self) -> None:
        for name, value in {"lambda1": self.lambda1 or 0.0, "lambda2": self.lambda2}.items():
            if not isfinite(value):
                raise ValueError(f"Argument `score.{name}` expected to be a finite number but got {value}.")
        check_activation_norm(self.activation_norm, self.scale)


@dataclass(frozen=True)
class PruningSettings:
    """Settings of `BlockwisePruning` that its result depends on; that class documents them.

    Raises:
        ValueError: If a setting is out of range, or does not apply beside the others.
    """

    method: Method
    sparsity: float | None
    pattern: str | None
    score: Score
    update_rule: UpdateRule
    solver: Solver
    target: Target
    stages: bool
    class_token_weight: float
    allocation: Allocation
    precision: Precision
    ignore: tuple[str, ...]

    @classmethod
    def of(
        cls,
        method: Method = "d2prune",
        sparsity: float | None = None,
        pattern: str | None = None,
        score: Score | None = None,
        update_rule: UpdateRule | None = None,
        solver: Solver | None = None,
        target: Target | None = None,
        stages: bool | None = None,
        class_token_weight: float = 1.0,
        allocation: Allocation | None = None,
        precision: Precision = "auto",
        ignore: Sequence[str] = (),
    ) -> Self:
        """Make settings in which None is replaced by the default of the method.

        Args:
            method: As in `BlockwisePruning`, like all others.
            sparsity: Share of zeros, or None.
            pattern: N:M, or None.
            score: Activation terms of the score.
            update_rule: Update rule.
            solver: Solver of the weight update.
            target: Outputs that the updated weights come close to.
            stages: Whether the linears of a block are pruned in their order.
            class_token_weight: How many times a class token counts in calibration statistics.
            allocation: Allocation of zeros to blocks.
            precision: Precision of Gram matrices.
            ignore: Globs of full names of linears to leave dense.

        Raises:
            ValueError: If a setting is out of range, or the method has no use for it.
        """
        check_one_of("method", method, get_args(Method))
        if score is not None and method not in DUAL:
            raise _does_not_apply("score", "methods with activation terms", method, "d2prune, d2_wanda or d2_sparsegpt")
        if update_rule is not None and method != "d2prune":
            raise _does_not_apply("update_rule", "method d2prune", method, "d2prune")
        if solver is not None and method not in WITH_UPDATE:
            raise _does_not_apply("solver", "methods with a weight update", method, "d2prune, sparsegpt or d2_sparsegpt")
        rule = update_rule or (AttentionRule() if method == "d2prune" else FixedRule("none"))
        if isinstance(ignore, str):
            raise ValueError(f"Argument `ignore` expected to be a list of globs but got {ignore!r}.")
        if target not in (None, "pruned") and method not in WITH_UPDATE:
            raise _does_not_apply("target", "methods with a weight update", method, "d2prune, sparsegpt or d2_sparsegpt")
        if class_token_weight != 1 and method == "magnitude":
            raise _does_not_apply("class_token_weight", "methods with calibration statistics", method, "any other method")
        joint = isinstance(solver, JointSolver)
        target = (DENSE_SHARE if joint else "pruned") if target is None else target
        score, solver = score or Score(), solver or ObsSolver()
        if score.lambda1 is None:
            score = replace(score, lambda1=JOINT_LAMBDA1 if joint else LAMBDA1)
        stages, allocation = joint if stages is None else stages, allocation or UniformAllocation()
        given = method, sparsity, pattern, score, rule, solver, target, stages, class_token_weight, allocation
        return cls(*given, precision, tuple(ignore))

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError(
                "Arguments `sparsity` (a share of zeros in [0, 1)) and `pattern` (N zeros in every M weights, such as '2:4') "
                f"expected exactly one of them to be set but got sparsity={self.sparsity!r} and pattern={self.pattern!r}. "
                f"{'Give one of them.' if self.pattern is None else 'Set one of them to null.'}"
            )
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
            self.allocation.check(self.sparsity)
        elif self.allocation != UniformAllocation():
            raise ValueError(
                f"Argument `allocation` = {self.allocation!r} gives blocks different shares of zeros, but with `pattern` = "
                f"{self.pattern!r} all have the same. Leave it out, or give `sparsity` instead of the pattern."
            )
        if self.target != "pruned" and (isinstance(self.target, str | bool) or not 0 <= self.target <= 1):
            raise ValueError(f"Argument `target` expected to be pruned or a share in [0, 1] but got {self.target!r}.")
        if not isinstance(self.stages, bool):
            raise ValueError(f"Argument `stages` expected to be true or false but got {self.stages!r}.")
        if not 0 < self.class_token_weight < float("inf"):
            raise ValueError(
                f"Argument `class_token_weight` expected to be a positive number but got {self.class_token_weight}. Leave it "
                "out, or give 1 to count class tokens like others."
            )
        parse_pattern(self.pattern)
        check_precision(self.precision)

    @property
    def updates(self) -> bool:
        """Whether kept weights are updated, for which all tokens have to enter the Gram matrices."""
        return self.method in WITH_UPDATE

    @property
    def reads_outputs(self) -> bool:
        """Whether scores depend on the linears' outputs."""
        return self.method in DUAL

    @property
    def derives_outputs(self) -> bool:
        """Whether statistics of a map's outputs that follow from those of its inputs are enough."""
        return self.updates and not (self.reads_outputs and self.score.activation_norm == "official")

    @property
    def dense_share(self) -> float:
        """α, the share of `target` as a number: 0 for the outputs that the pruned model's inputs give."""
        return 0.0 if self.target == "pruned" else self.target

    def by_rows(self, method: str) -> bool:
        """Return whether a method of `prune_linears` drops equally many weights in every row."""
        by_rows = method in UPDATED and isinstance(self.solver, JointSolver) and self.solver.compared == "row"
        return by_rows or method in ("wanda", "d2_wanda")

    @property
    def title(self) -> str:
        """Name of the run in tables."""
        return f"{self.method} at {self.pattern or self.sparsity}"

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `prune_linears` that are the same for all linears."""
        score = {} if self.method not in DUAL else vars(self.score)
        solver = self.solver.arguments() if self.updates else {}
        return {"sparsity": self.sparsity or 0.0, "pattern": self.pattern} | score | solver

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as in a config, without those that the method has no use for."""
        found: dict[str, Any] = {"method": self.method, "sparsity": self.sparsity, "pattern": self.pattern}
        found |= {"score": dict(vars(self.score))} if self.method in DUAL else {}
        found |= {"update_rule": self.update_rule.as_dict()} if self.method == "d2prune" else {}
        found |= {"solver": self.solver.as_dict(), "target": self.target} if self.updates else {}
        found |= {"stages": self.stages}
        found |= {} if self.method == "magnitude" else {"class_token_weight": self.class_token_weight}
        return found | {"allocation": self.allocation.as_dict(), "precision": self.precision, "ignore": list(self.ignore)}


def _does_not_apply(argument: str, belongs: str, method: str, remedy: str) -> ValueError:
    return ValueError(
        f"Argument `{argument}` belongs to {belongs}, but `method` is {method!r}. Leave it out, or use {remedy}; null takes it "
        "out of a config."
    )

"""PruningSettings: what a user may set of a pruning run, checked on its own and against the module, before any weight moves."""

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import isfinite
from typing import Literal, get_args

from callbacks.blockwise.update_rules.probe import Reference
from callbacks.blockwise.update_rules.rules import ROLES, Candidates, Objective, UpdateRule, outlier_choice
from functional.pruning import METHODS, ActivationNorm, parse_pattern
from functional.pruning.admm import Solver, check_solver
from functional.pruning.allocation import Allocation
from functional.pruning.masks import check_divisible, check_sparsity
from functional.pruning.precision import Precision, check_precision
from functional.pruning.statistics import check_activation_norm
from lightning_modules.base.prunable import PrunableModule

Method = Literal["d2prune", "magnitude", "wanda", "sparsegpt", "d2_wanda", "d2_sparsegpt"]
NonUpdated = Literal["q", "k", "v", "none", "all"]
DEFAULT_NON_UPDATED: NonUpdated = "v"
DEFAULT_UPDATE_RULE: UpdateRule = "attention"

Plan = dict[str, dict[str, str]]
"""Per block (full name) the method of each linear (name within the block) that is to be pruned."""

ROW_WISE = ("wanda", "d2_wanda")
"""Methods that take equally many weights of each row, unless there is a pattern."""


@dataclass(frozen=True)
class PruningSettings:
    """Settings of `BlockwisePruning`, which documents them."""

    method: Method = "d2prune"
    sparsity: float | None = None
    pattern: str | None = None
    lambda1: float = 1.0
    lambda2: float = 0.0
    scale: float | Literal["auto"] = "auto"
    activation_norm: ActivationNorm = "rms"
    block_size: int = 128
    damping: float = 0.01
    precision: Precision = "auto"
    update_rule: UpdateRule | None = None
    non_updated: NonUpdated | None = None
    candidates: Candidates = "partial"
    objective: Objective = "output"
    reference: Reference = "model"
    rho: float = 1.0
    rule_windows: int = 4
    rule_source: str | list[str] | None = None
    ignore: list[str] = field(default_factory=list)
    allocation: Allocation = "uniform"
    owl_threshold: float = 5.0
    owl_range: float = 0.08
    solver: Solver = "obs"

    def __post_init__(self) -> None:
        choices = {
            "method": Method,
            "update_rule": UpdateRule,
            "non_updated": NonUpdated,
            "candidates": Candidates,
            "objective": Objective,
            "reference": Reference,
            "allocation": Allocation,
        }
        for name, type_ in choices.items():
            value, accepted = getattr(self, name), get_args(type_)
            if value not in accepted and not (value is None and name in ("update_rule", "non_updated")):
                raise ValueError(f"Argument `{name}` expected to be one of {', '.join(accepted)} but got {value!r}.")
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError(
                f"Give either `sparsity`, a share of zeros in [0, 1), or `pattern`, N zeros in every M weights such as '2:4', "
                f"but got sparsity={self.sparsity!r} and pattern={self.pattern!r}."
            )
        for name in ("lambda1", "lambda2"):
            if not isfinite(value := getattr(self, name)):
                raise ValueError(f"Argument `{name}` expected to be a finite number but got {value}.")
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        parse_pattern(self.pattern)
        check_precision(self.precision)
        check_solver(self.solver)
        if self.solver != "obs" and not self.updates:
            raise ValueError(
                f"Argument `solver` = {self.solver!r} belongs to methods with a weight update, but `method` is "
                f"{self.method!r}. Leave it out, or use d2prune, sparsegpt or d2_sparsegpt."
            )
        check_activation_norm(self.activation_norm, 1.0 if self.scale == "auto" else self.scale)
        if isinstance(self.ignore, str):
            raise ValueError(f"Argument `ignore` expected to be a list of globs but got the string {self.ignore!r}.")
        if self.block_size < 1:
            raise ValueError(f"Argument `block_size` expected to be a positive number of columns but got {self.block_size}.")
        if not 0 <= self.damping <= 1:
            raise ValueError(f"Argument `damping` expected to be in [0, 1] but got {self.damping}.")
        self._check_update_rule()
        self._check_allocation()

    def _check_update_rule(self) -> None:
        for name, none in {"non_updated": "none", "update_rule": "fixed"}.items():
            if self.method != "d2prune" and getattr(self, name) not in (None, none):
                raise ValueError(
                    f"Argument `{name}` = {getattr(self, name)!r} belongs to method d2prune, but `method` is {self.method!r}. "
                    "Leave it out, or use d2prune."
                )
        if self.non_updated is not None and self.rule != "fixed":
            raise ValueError(
                f"Argument `non_updated` = {self.non_updated!r} belongs to update_rule fixed, but `update_rule` is "
                f"{self.update_rule!r}, which chooses itself. Leave one of them out."
            )
        if isinstance(self.rule_windows, bool) or not isinstance(self.rule_windows, int) or self.rule_windows < 1:
            raise ValueError(f"Argument `rule_windows` expected to be a positive integer but got {self.rule_windows!r}.")
        if not 0 <= self.rho < float("inf"):
            raise ValueError(f"Argument `rho` expected to be a number of at least 0 but got {self.rho}.")

    def _check_allocation(self) -> None:
        for name in ("owl_threshold", "owl_range"):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise ValueError(f"Argument `{name}` expected to be a positive number but got {value}.")
        if self.allocation != "uniform" and self.pattern is not None:
            raise ValueError(
                f"Argument `allocation` = {self.allocation!r} gives blocks different shares of zeros, but with `pattern` = "
                f"{self.pattern!r} all have the same. Leave it out, or give `sparsity` instead of the pattern."
            )
        if self.allocation == "owl" and self.owl_range > (most := min(self.sparsity, 1 - self.sparsity)):
            raise ValueError(
                f"Argument `owl_range` expected to be at most {most:g} at a sparsity of {self.sparsity:g}, or shares of zeros "
                f"would leave [0, 1], but got {self.owl_range}."
            )

    @property
    def rule(self) -> UpdateRule:
        """The update rule: as set, or fixed where a fixed choice or another method is set, else the default."""
        if self.update_rule is not None:
            return self.update_rule
        return "fixed" if self.method != "d2prune" or self.non_updated is not None else DEFAULT_UPDATE_RULE

    @property
    def held(self) -> NonUpdated | None:
        """What the fixed rule holds: projections whose weights are masked but not updated; None for another rule."""
        if self.rule != "fixed":
            return None
        if self.method != "d2prune":
            return "none"
        return self.non_updated or DEFAULT_NON_UPDATED

    @property
    def updates(self) -> bool:
        """Whether kept weights are updated, which needs whole Gram matrices."""
        return self.method in ("d2prune", "sparsegpt", "d2_sparsegpt")

    def plan(self, module: PrunableModule, held: NonUpdated | None = None) -> Plan:
        """Which linears of which blocks are pruned, and how.

        Args:
            module: The module, still dense.
            held: What is held in every block; the settings' own when None. The attention rule replaces what the plan says
                of q, k and v.

        Raises:
            ValueError: If the module lacks a held projection, an `ignore` pattern matches nothing or all linears are
                ignored, or M of the pattern does not divide the inputs of a linear.
        """
        held = held or self.held or "none"
        roles = {"none": (), "all": ROLES}.get(held, (held,)) if self.rule != "attention" else ROLES
        _check_projections(module, ROLES if self.rule != "fixed" else roles, self)
        unused, plan = set(self.ignore), {}
        for block_name, block in module.blocks.items():
            plan[block_name] = {}
            if self.rule == "outlier":
                linears, projections = module.linears(block), module.architecture.projections
                roles = outlier_choice({role: linears[projections[role]] for role in ROLES})[0]
            for name, linear in module.linears(block).items():
                matching = {glob for glob in self.ignore if fnmatchcase(f"{block_name}.{name}", glob)}
                unused -= matching
                if matching:
                    continue
                if self.pattern is not None:
                    _check_groups(f"{block_name}.{name}", linear.in_features, self.pattern)
                plan[block_name][name] = self._method_of(name, [module.architecture.projections[role] for role in roles])
        example = next(f"{name}.{linear}" for name, block in module.blocks.items() for linear in module.linears(block))
        if unused:
            raise ValueError(
                f"Argument `ignore`: {', '.join(sorted(map(repr, unused)))} matches no linear. Names look like {example!r}, "
                "and patterns are globs such as '*.down_proj'."
            )
        if not any(plan.values()):
            raise ValueError(f"Argument `ignore` = {self.ignore} leaves no linear to prune.")
        return plan

    def by_rows(self, module: PrunableModule) -> Callable[[str, str], bool]:
        """Whether a linear of this name within its block, with this planned method, may lose equally many weights of each row.

        Which of q, k and v are held the attention rule says when their block is reached, and the perplexity rule at the end.
        """
        projections = module.architecture.projections
        open_ = {projections[role] for role in ROLES if role in projections} if self.rule in ("attention", "perplexity") else ()
        return lambda name, method: method in ROW_WISE or name in open_

    def arguments(self, tokens_per_sample: float) -> dict:
        """Arguments of `prune_linear` beside the method."""
        return {
            "sparsity": self.sparsity if self.sparsity is not None else 0.0,
            "pattern": self.pattern,
            "lambda1": self.lambda1,
            "lambda2": self.lambda2,
            "scale": float(tokens_per_sample) if self.scale == "auto" else self.scale,
            "activation_norm": self.activation_norm,
            "block_size": self.block_size,
            "damping": self.damping,
            "solver": self.solver,
        }

    def _method_of(self, name: str, held: list[str]) -> str:
        if self.method in METHODS:
            return self.method
        return "d2_wanda" if name in held else "d2_sparsegpt"


def _check_projections(module: PrunableModule, roles: tuple[str, ...], settings: PruningSettings) -> None:
    projections = module.architecture.projections
    missing = [role for role in roles if role not in projections]
    if missing:
        argument = f"`non_updated` = {settings.held!r}" if settings.held else f"`update_rule` = {settings.rule!r}"
        raise ValueError(
            f"Argument {argument}: this model has no projection {', '.join(missing)}, only {', '.join(projections) or 'none'}. "
            "Use `update_rule: fixed` with `non_updated: none`, or one that it has."
        )


def _check_groups(name: str, in_features: int, pattern: str) -> None:
    try:
        check_divisible(in_features, parse_pattern(pattern))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error

"""PruningSettings: what a user may set of a pruning run, checked on its own and against the module, before any weight moves."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, get_args

from functional.pruning import METHODS, ActivationNorm, parse_pattern
from functional.pruning.masks import check_divisible, check_sparsity
from functional.pruning.statistics import check_activation_norm
from lightning_modules.prunable import PrunableModule

Method = Literal["d2prune", "magnitude", "wanda", "sparsegpt", "d2_wanda", "d2_sparsegpt"]
NonUpdated = Literal["q", "k", "v", "none"]
DEFAULT_NON_UPDATED: NonUpdated = "v"

Plan = dict[str, dict[str, str]]
"""Per block (full name) the method of each linear (name within the block) that is to be pruned."""


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
    non_updated: NonUpdated | None = None
    ignore: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"Argument `method` expected to be one of {', '.join(get_args(Method))} but got {self.method!r}.")
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError(
                f"Give either `sparsity`, a share of zeros in [0, 1), or `pattern`, N zeros in every M weights such as '2:4', "
                f"but got sparsity={self.sparsity!r} and pattern={self.pattern!r}."
            )
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        parse_pattern(self.pattern)
        check_activation_norm(self.activation_norm, 1.0 if self.scale == "auto" else self.scale)
        if isinstance(self.ignore, str):
            raise ValueError(f"Argument `ignore` expected to be a list of globs but got the string {self.ignore!r}.")
        if self.block_size < 1:
            raise ValueError(f"Argument `block_size` expected to be a positive number of columns but got {self.block_size}.")
        if not 0 <= self.damping <= 1:
            raise ValueError(f"Argument `damping` expected to be in [0, 1] but got {self.damping}.")
        if self.non_updated not in (None, *get_args(NonUpdated)):
            raise ValueError(
                f"Argument `non_updated` expected to be one of {', '.join(get_args(NonUpdated))} but got {self.non_updated!r}."
            )
        if self.method != "d2prune" and self.non_updated not in (None, "none"):
            raise ValueError(
                f"Argument `non_updated` = {self.non_updated!r} belongs to method d2prune, but `method` is {self.method!r}. "
                "Leave it out, or use d2prune."
            )

    @property
    def held(self) -> NonUpdated:
        """The projection whose weights are masked but not updated."""
        if self.method != "d2prune":
            return "none"
        return self.non_updated or DEFAULT_NON_UPDATED

    def plan(self, module: PrunableModule) -> Plan:
        """Which linears of which blocks are pruned, and how.

        Raises:
            ValueError: If the module lacks the held projection, an `ignore` pattern matches nothing or all linears are
                ignored, or M of the pattern does not divide the inputs of a linear.
        """
        held = self._held_linear(module)
        unused, plan = set(self.ignore), {}
        for block_name, block in module.blocks.items():
            plan[block_name] = {}
            for name, linear in module.linears(block).items():
                matching = {glob for glob in self.ignore if fnmatchcase(f"{block_name}.{name}", glob)}
                unused -= matching
                if matching:
                    continue
                if self.pattern is not None:
                    _check_groups(f"{block_name}.{name}", linear.in_features, self.pattern)
                plan[block_name][name] = self._method_of(name, held)
        example = next(f"{block}.{name}" for block, names in plan.items() for name in module.architecture.linears)
        if unused:
            raise ValueError(
                f"Argument `ignore`: {', '.join(sorted(map(repr, unused)))} matches no linear. Names look like {example!r}, "
                "and patterns are globs such as '*.down_proj'."
            )
        if not any(plan.values()):
            raise ValueError(f"Argument `ignore` = {self.ignore} leaves no linear to prune.")
        return plan

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
        }

    def _held_linear(self, module: PrunableModule) -> str | None:
        if self.held == "none":
            return None
        projections: Mapping[str, str] = module.architecture.projections
        if self.held not in projections:
            raise ValueError(
                f"Argument `non_updated` = {self.held!r}: this model has no such projection, only "
                f"{', '.join(projections) or 'none'}. Use one of them, or 'none'."
            )
        return projections[self.held]

    def _method_of(self, name: str, held: str | None) -> str:
        if self.method in METHODS:
            return self.method
        return "d2_wanda" if name == held else "d2_sparsegpt"


def _check_groups(name: str, in_features: int, pattern: str) -> None:
    try:
        check_divisible(in_features, parse_pattern(pattern))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error

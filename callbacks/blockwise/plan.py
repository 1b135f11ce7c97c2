"""Plan a pruning run: which linears of which blocks are pruned, and by which method."""

from contextlib import nullcontext
from fnmatch import fnmatchcase

from callbacks.blockwise.settings import PruningSettings
from callbacks.blockwise.update_rules import ROLES, AttentionRule, FixedRule, OutlierRule, PerplexityRule
from callbacks.blockwise.update_rules.base import HELD_METHOD, UPDATE_METHOD
from functional.pruning import METHODS, parse_pattern
from functional.pruning.masks import check_divisible
from lightning_modules.base.prunable import PrunableModule
from lightning_modules.parts.architectures import PrunableLinear

Plan = dict[str, dict[str, str]]
"""Block (full name) -> linear (name within the block) -> method."""


def plan_of(settings: PruningSettings, module: PrunableModule, round_held: str | None = None) -> Plan:
    """Plan one round over the blocks. The attention rule replaces the methods of q, k and v, block by block.

    Args:
        settings: Settings of the run.
        module: The module, still dense.
        round_held: Projection that this round holds in every block (perplexity rule).

    Raises:
        ValueError: If the model lacks a projection that the update rule needs, or `ignore` excludes it; if a glob of `ignore`
            matches nothing, or all linears are ignored; if M of the pattern does not divide the inputs of a linear; if class
            tokens have a weight and the model has none.
    """
    _check_class_tokens(settings, module)
    _check_projections(settings, module)
    unused, plan = set(settings.ignore), {}
    for block_name, block in module.blocks.items():
        linears = module.linears(block)
        matches = {name: _matching(settings.ignore, f"{block_name}.{name}") for name in linears}
        unused -= {glob for globs in matches.values() for glob in globs}
        pruned = {name: linear for name, linear in linears.items() if not matches[name]}
        for name, linear in pruned.items():
            _check_groups(f"{block_name}.{name}", linear.in_features, settings.pattern)
        with module.reading(block_name) if isinstance(settings.update_rule, OutlierRule) else nullcontext():
            plan[block_name] = _methods(settings, module, pruned, round_held)
    _check_ignored(settings, module, plan, unused)
    return plan


def pruned_projections(module: PrunableModule, linears: dict[str, PrunableLinear] | dict[str, str]) -> dict[str, str]:
    """Return role -> name of q, k and v among some linears of a block."""
    projections = module.architecture.projections
    return {role: projections[role] for role in ROLES if projections.get(role) in linears}


def pruned_roles(module: PrunableModule, plan: Plan) -> list[str]:
    """Return those of q, k and v that are pruned in some block."""
    found = {role for names in plan.values() for role in pruned_projections(module, names)}
    return [role for role in ROLES if role in found]


def _methods(
    settings: PruningSettings, module: PrunableModule, linears: dict[str, PrunableLinear], round_held: str | None
) -> dict[str, str]:
    if settings.method in METHODS:
        return dict.fromkeys(linears, settings.method)
    roles = pruned_projections(module, linears)
    held = settings.update_rule.holds({role: linears[name] for role, name in roles.items()}, round_held)
    names = {roles[role] for role in held}
    return {name: HELD_METHOD if name in names else UPDATE_METHOD for name in linears}


def _matching(globs: tuple[str, ...], full_name: str) -> list[str]:
    return [glob for glob in globs if fnmatchcase(full_name, glob)]


def _check_class_tokens(settings: PruningSettings, module: PrunableModule) -> None:
    if settings.class_token_weight != 1 and not module.class_tokens:
        raise ValueError(
            f"Argument `class_token_weight` = {settings.class_token_weight:g} needs a model with class tokens, but "
            f"{type(module.model).__name__} has none. Leave it out, or set it to 1."
        )


def _check_projections(settings: PruningSettings, module: PrunableModule) -> None:
    projections = module.architecture.projections
    missing = [role for role in settings.update_rule.needed if role not in projections]
    if missing:
        raise ValueError(
            f"Argument `update_rule` = {settings.update_rule!r}: this model has no projection {', '.join(missing)}, only "
            f"{', '.join(projections) or 'none'}. Use FixedRule with `held: none`, or one that it has."
        )


def _check_ignored(settings: PruningSettings, module: PrunableModule, plan: Plan, unused: set[str]) -> None:
    example = next(f"{name}.{linear}" for name, block in module.blocks.items() for linear in module.linears(block))
    if unused:
        raise ValueError(
            f"Argument `ignore`: {', '.join(sorted(map(repr, unused)))} matches no linear. Names look like {example!r}; "
            "give globs such as '*.down_proj'."
        )
    if not any(plan.values()):
        raise ValueError(f"Argument `ignore` = {list(settings.ignore)} leaves no linear to prune.")
    left, rule = pruned_roles(module, plan), settings.update_rule
    missing = set(rule.needed) - set(left) if isinstance(rule, FixedRule) else not left
    if missing and not isinstance(rule, AttentionRule):  # which has nothing to choose then
        raise ValueError(
            f"Argument `update_rule` = {rule!r} decides about {', '.join(rule.needed)}, but `ignore` = "
            f"{list(settings.ignore)} leaves {', '.join(left) or 'none of them'} to prune. Use FixedRule with `held: none`, or "
            "ignore less."
        )


def _check_groups(name: str, in_features: int, pattern: str | None) -> None:
    if pattern is None:
        return
    try:
        check_divisible(in_features, parse_pattern(pattern))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def rows_lose_alike(settings: PruningSettings, module: PrunableModule, method: str, name: str) -> bool:
    """Return whether all rows of a linear may have to lose equally many weights, depending on what the update rule decides.

    Args:
        settings: Settings of the run.
        module: The module.
        method: Planned method of the linear.
        name: Name of the linear within the block.
    """
    undecided = isinstance(settings.update_rule, AttentionRule | PerplexityRule)
    projections = module.architecture.projections
    return settings.by_rows(method) or (undecided and name in {projections.get(role) for role in ROLES})

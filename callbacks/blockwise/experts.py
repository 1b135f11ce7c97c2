"""Experts of mixtures: how many tokens reach each, which borrow tokens of the whole layer, and which are pruned together.

A matrix whose expert gets fewer tokens than `ENOUGH` times its inputs has too few for its Gram matrix. All T tokens of the
layer then count (ENOUGH · I − n) / T times in its statistics, at most once, beside the n that are routed to it: its expert is
run on all of them, while only outputs for its own tokens go on.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from callbacks.blockwise.placement import room
from lightning_modules.parts.architectures import PrunableLinear

ENOUGH = 2
"""Number of tokens for each input of a matrix, below which it borrows."""
MOST_BORROWED = 1.0
"""How many times a token of the layer counts at most."""
SUMS_SHARE = 0.25
"""Share of the free memory that sums of the experts that are pruned together may take."""
BYTES = 24
"""Memory of an entry of a Gram matrix while it is summed and solved, in bytes."""


@contextmanager
def counting(experts: nn.Module) -> Iterator[Tensor]:
    """Count the tokens that come to each expert within the context, and those of all together, (experts + 1,), int64."""
    counts = torch.zeros(len(experts.down_proj) + 1, dtype=torch.int64)

    def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
        chosen = next(iter((*args[1:], *kwargs.values())))
        counts[:-1] += torch.bincount(chosen.flatten(), minlength=len(counts) - 1).cpu()
        counts[-1] += len(chosen)

    handle = experts.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()


def let_borrow(linears: Mapping[str, PrunableLinear], counts: Mapping[nn.Module, Tensor]) -> dict[str, int]:
    """Let matrices with too few tokens borrow.

    Args:
        linears: Name -> linear; those that are no experts' are passed over.
        counts: Experts -> what `counting` counted, summed over all processes.

    Returns:
        Linear -> number of tokens that it borrows.

    Raises:
        ValueError: If no token at all reaches the experts.
    """
    borrowed = {}
    for name, linear in linears.items():
        if not linear.is_routed:
            continue
        *own, total = counts[linear.module.experts].tolist()
        if not total:
            raise ValueError(f"The linear {name!r} was never called while calibrating, so it cannot be pruned.")
        lacking = max(ENOUGH * linear.in_features - own[linear.module.expert], 0)
        linear.module.borrowed = min(lacking / total, MOST_BORROWED)
        if lacking:
            borrowed[name] = min(lacking, total)
    return borrowed


def end_borrowing(linears: Iterable[PrunableLinear]) -> None:
    """Let experts run on their own tokens only."""
    for linear in linears:
        if linear.is_routed:
            linear.module.borrowed = 0.0


@contextmanager
def not_borrowing(linears: Iterable[PrunableLinear]) -> Iterator[None]:
    """Let experts run on their own tokens only, within the context.

    Products of all tokens round otherwise than those of a few, and what needs no statistics must not depend on them.
    """
    before = {linear.module: linear.module.borrowed for linear in linears if linear.is_routed}
    for module in before:
        module.borrowed = 0.0
    try:
        yield
    finally:
        for module, borrowed in before.items():
            module.borrowed = borrowed


def in_groups(stage: list[str], linears: Mapping[str, PrunableLinear], device: torch.device) -> list[list[str]]:
    """Split a stage so that the sums of the experts of a group fit into memory; all experts of a group are in one pass.

    Args:
        stage: Linears of the stage.
        linears: Name -> linear.
        device: Device of the sums.
    """
    left = allowed = SUMS_SHARE * room(device)
    groups: list[list[str]] = [[]]
    before = None
    for name in stage:
        linear = linears[name]
        if linear.is_routed and linear.module is not before:
            size = BYTES * linear.in_features**2
            if size > left and groups[-1]:
                groups.append([])
                left = allowed
            left -= size
            before = linear.module
        groups[-1].append(name)
    return groups

"""Find the blocks and linears of a language model that is in no table, and verify them by running it on one window.

The blocks are the longest chain of modules in the model, its largest ModuleList. Each has to be called once, in order, on what
the one before it returns; run one by one they have to give the model's own logits. Their linears are pruned, if each token of
the window goes through them once. Roles come from names. What cannot be verified is refused, with what was found.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_modules.parts.architectures import Architecture, is_conv1d
from lightning_modules.parts.block_stream import BlockStream, replaced_forwards
from lightning_modules.parts.experts import is_experts, routed_forwards

ROLE_NAMES = {
    "q": r"(wq|q|query|q_proj|query_proj)",
    "k": r"(wk|k|key|k_proj|key_proj)",
    "v": r"(wv|v|value|v_proj|value_proj)",
    "o": r"(wo|o|dense|out|proj|o_proj|out_proj|c_proj)",
}
"""Role -> names of a linear within its attention module."""
ROUTER = r"(gate|router|wg|shared_expert_gate)"
"""Names of linears that choose experts; they stay dense."""
TOLERANCE = 1e-3
"""Largest relative difference of logits that counts as rounding, in float32; 16 times that in half precision."""


@dataclass(frozen=True)
class Discovery:
    """What was found.

    Attributes:
        architecture: Entry for the model.
        left_dense: Linears that are not pruned -> the reason.
    """

    architecture: Architecture
    left_dense: dict[str, str] = field(default_factory=dict)

    def summary(self, blocks: int) -> str:
        """Return one line for the user."""
        found = self.architecture
        roles = ", ".join(f"{role} = {name}" for role, name in found.projections.items()) or "none, so no q, k, v to hold"
        dense = "; ".join(f"{name} ({why})" for name, why in self.left_dense.items()) or "none"
        experts = f"; experts of {', '.join(found.experts)}" if found.experts else ""
        where = found.blocks if isinstance(found.blocks, str) else f"{found.blocks[0]} to {found.blocks[-1]}"
        return (
            f"{blocks} blocks at {where}; linears {', '.join(found.linears)}{experts}; roles: {roles}; left dense: {dense}. "
            "Run block by block they give the model's own logits."
        )


def discover(model: nn.Module, run_model: Callable[[], Tensor], model_type: str, streamed: bool = False) -> Discovery:
    """Find the blocks and linears of a model.

    Args:
        model: The model.
        run_model: Runs it on one window and returns its logits, (1, tokens, vocabulary).
        model_type: Its name, for errors.
        streamed: Whether a block has its weights only while it runs; then it runs twice, or three times if it has experts.

    Raises:
        ValueError: If no chain of blocks can be verified, or experts hold most of the weights.
    """
    path, blocks = chain_of(model, model_type)
    what = f"{path!r} ({len(blocks)} x {type(blocks[0]).__name__})"
    try:
        _check_experts(blocks, run_model)
        with replaced_forwards(_routed_of(blocks)):  # else rounding decides which experts nearly tying tokens go to
            calls = _verified(blocks, run_model, streamed)
    except Exception as error:  # whatever a forward that is not a chain of blocks raises
        raise refusal(model_type, f"{what} was taken for its blocks, but {brief(error)}") from error
    experts = _experts(blocks, model_type)
    linears, dense = _linears(blocks, calls)
    if not linears:
        raise refusal(model_type, f"{what} has no linear that every token goes through")
    attention, projections = _roles(blocks, linears)
    found = Architecture(path, tuple(linears), projections, attention, everywhere=False, experts=tuple(experts))
    return Discovery(found, dense)


def chain_of(model: nn.Module, model_type: str) -> tuple[str, list[nn.Module]]:
    """Return path and modules of the list that is taken for the blocks of a model, by its parameters; they need no content.

    Args:
        model: The model.
        model_type: Its name, for errors.

    Raises:
        ValueError: If it has no list of modules.
    """
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise refusal(model_type, "it has no list of blocks (nn.ModuleList)")
    path, blocks = max(lists, key=lambda pair: sum(parameter.numel() for parameter in pair[1].parameters()))
    return path, list(blocks)


@torch.no_grad()
def _verified(blocks: list[nn.Module], run_model: Callable[[], Tensor], streamed: bool) -> dict[nn.Module, list[int]]:
    """Check that the blocks make the logits; return linear -> number of tokens of each of its calls."""
    calls: dict[nn.Module, list[int]] = {}

    def count(module: nn.Module, args: tuple, _: object) -> None:
        calls.setdefault(module, []).append(args[0].numel() // args[0].shape[-1] if args else 0)

    handles = [module.register_forward_hook(count) for block in blocks for module in block.modules() if _is_linear(module)]
    try:
        logits = run_model()
    finally:
        for handle in handles:
            handle.remove()
    hidden = check_blocks(BlockStream(blocks), run_model, logits, streamed)
    tokens = hidden.numel() // hidden.shape[-1]
    return {module: [seen - tokens for seen in found] for module, found in calls.items()}


@torch.no_grad()
def check_blocks(stream: BlockStream, run_model: Callable[[], Tensor], logits: Tensor, streamed: bool = False) -> Tensor:
    """Check that blocks, run one by one, make the logits of a model.

    Args:
        stream: Empty stream through the blocks.
        run_model: Runs the model on one batch and returns its logits.
        logits: What it returns.
        streamed: Whether what comes after the blocks has to make the logits of what the last one returns alone, so that no
            block has to run again.

    Returns:
        The output of the last block.

    Raises:
        ValueError: If the logits differ, or do not depend on the blocks.
    """
    stream.capture(0, run_model)
    for index in range(len(stream.blocks)):
        stream.advance(0, index)
    hidden = stream.hidden(0)

    def with_output(hidden: Tensor) -> Tensor:
        if not streamed:
            return _with_last_output(stream.blocks[-1], hidden, run_model)
        stream.replace(0, hidden)
        return stream.finish(0, run_model)

    again = with_output(hidden)
    if not (again - logits).abs().max() <= _tolerance(logits):
        raise ValueError(f"run one by one they change the logits by up to {(again - logits).abs().max().item():.3g}")
    if torch.equal(with_output(torch.zeros_like(hidden)), logits):
        raise ValueError("the logits do not depend on what the last one returns")
    return hidden


def _with_last_output(block: nn.Module, hidden: Tensor, run_model: Callable[[], Tensor]) -> Tensor:
    """Return the logits if the last block returns these hidden states."""

    def replace(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = block.register_forward_hook(replace)
    try:
        return run_model()
    finally:
        handle.remove()


def _experts(blocks: list[nn.Module], model_type: str) -> list[str]:
    """Return the paths of experts; refuse those that are kept in an unknown way, by their names and classes."""
    known, unknown = {}, {}
    for block in blocks:
        for name, module in block.named_modules():
            own = name.rpartition(".")[2]
            named = ("expert" in own and not own.startswith("shared_expert")) or "Experts" in type(module).__name__
            if is_experts(module):
                known[name] = None
            elif named and not any(name.startswith(f"{other}.") for other in known):
                unknown[name] = type(module).__name__
    if unknown:
        raise refusal(
            model_type,
            f"it is a mixture of experts whose tokens go to some of them only ({', '.join(unknown)}: a "
            f"{next(iter(unknown.values()))}). Only experts that transformers keeps together (use_experts_implementation) can "
            "be pruned",
        )
    return list(known)


@torch.no_grad()
def _check_experts(blocks: list[nn.Module], run_model: Callable[[], Tensor]) -> None:
    """Check that experts run one by one return what they do in the model, on the inputs that they have there."""
    forwards = _routed_of(blocks)
    if not forwards:
        return

    def compare(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        difference = (forwards[module](*args, **kwargs) - output).abs().max()
        if not difference <= _tolerance(output):
            raise ValueError(f"experts run one by one change the outputs of a {type(module).__name__} by {difference:.3g}")

    handles = [module.register_forward_hook(compare, with_kwargs=True) for module in forwards]
    try:
        run_model()
    finally:
        for handle in handles:
            handle.remove()


def _routed_of(blocks: list[nn.Module]) -> dict[nn.Module, Callable[..., Tensor]]:
    return {module: forward for block in blocks for module, forward in routed_forwards(block).items()}


def _tolerance(x: Tensor) -> Tensor:
    return TOLERANCE * (1 if x.dtype == torch.float32 else 16) * x.float().abs().max()


def _linears(blocks: list[nn.Module], calls: Mapping[nn.Module, list[int]]) -> tuple[list[str], dict[str, str]]:
    """Return the names of the linears that are pruned, in the order of the blocks' modules, and of the others with reasons."""
    found: dict[str, None] = {}
    dense: dict[str, str] = {}
    for block in blocks:
        for name, module in block.named_modules():
            if not _is_linear(module):
                continue
            seen = calls.get(module, [])
            if any(re.fullmatch(ROUTER, part) for part in name.split(".")):
                dense[name] = "chooses experts"
            elif len(seen) != 1:
                dense[name] = "is not called" if not seen else f"is called {len(seen)} times"
            elif seen[0]:
                dense[name] = "does not see every token"
            else:
                found[name] = None
    return [name for name in found if name not in dense], dense


def _roles(blocks: list[nn.Module], linears: list[str]) -> tuple[str, dict[str, str]]:
    """Return the attention module and its projections if all blocks have them, by their names."""
    parents: dict[str, dict[str, str]] = {}
    for name in linears:
        parent, _, own = name.rpartition(".")
        for role, pattern in ROLE_NAMES.items():
            if re.fullmatch(pattern, own):
                parents.setdefault(parent, {}).setdefault(role, name)
    modules = [dict(block.named_modules()) for block in blocks]
    for parent, roles in parents.items():
        whole = set(roles) == set(ROLE_NAMES) and all(name in found for found in modules for name in roles.values())
        if parent and whole and modules[0][roles["k"]].weight.shape == modules[0][roles["v"]].weight.shape:
            return parent, {role: roles[role] for role in ROLE_NAMES}
    return "", {}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def refusal(model_type: str, why: str) -> ValueError:
    """Return the error about a model that could not be discovered.

    Args:
        model_type: Name of the model.
        why: What was found, without a full stop.
    """
    return ValueError(
        f"Model type {model_type!r} is not in ARCHITECTURES, and could not be discovered: {why}. Add an entry to "
        "lightning_modules/parts/architectures.py (docs/adding-a-model.md), or use a model of a family that is there."
    )


def brief(error: Exception) -> str:
    """Return the first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")

"""Find the blocks and linears of a vision model that is in no table, and verify them by running it on two images.

The blocks are the chain of modules that hidden states pass through (lightning_modules.parts.call_tree): blocks, and what lies
between stages. Run one by one they have to give the model's own logits. A linear, or a convolution that is a matrix, is pruned
if it is called once and reads the images in the order of the batch. Roles come from names; rows of a fused linear count as q, k
and v if a change of them changes attention as it should. What cannot be verified is refused, with what was found.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_modules.parts.architectures import Architecture, PrunableLinear, find_linears, is_matrix
from lightning_modules.parts.attention_form import run_attention_eagerly
from lightning_modules.parts.block_stream import BlockStream
from lightning_modules.parts.call_tree import Call, call_tree, longest_chain
from lightning_modules.parts.discovery import ROLE_NAMES, Discovery, brief, check_blocks, refusal
from lightning_modules.parts.fused import QKV, equal

FUSED_NAME = "qkv"
MOST_HEADS = 16
"""Inputs up to which a linear stays dense: it mixes heads, or reads coordinates or a few pixels, and has next to no weights."""
LEAST_SHARE = 0.7
"""Least share of the model's parameters, those of the head aside, that the blocks have to hold."""
SAME = 0.3
"""Share of the difference between two images up to which that between a batch and its images alone is rounding."""
CHANGED = 0.01
"""Share of the largest difference of a probability from which on a difference is a change."""


def discover_vision(model: nn.Module, run_model: Callable[[Tensor], Tensor], images: Tensor, model_type: str) -> Discovery:
    """Find the blocks and linears of an image classifier.

    Args:
        model: The model, in evaluation mode.
        run_model: Returns logits of images, (samples, classes).
        images: Two images, (2, channels, height, width).
        model_type: Name of the model, for errors.

    Raises:
        ValueError: If no chain of blocks can be verified.
    """
    try:
        root = call_tree(model, lambda: run_model(images))
    except Exception as error:  # whatever its forward raises
        raise refusal(model_type, f"it does not run on images of {tuple(images.shape[1:])}: {brief(error)}") from error
    links = longest_chain(root, is_matrix)
    if not links:
        raise refusal(
            model_type, "no linear lies in a chain of modules, each of which is called with what the last one returned"
        )
    blocks = [link.module for link in links]
    what = _named([link.name for link in links])
    uniform = all(link.given.shape == link.returned.shape for link in links)
    try:
        _check_share(root, blocks)
        check_blocks(BlockStream(blocks, uniform), lambda: run_model(images), run_model(images))
    except Exception as error:  # whatever a forward that is not a chain of blocks raises
        raise refusal(model_type, f"{what} were taken for its blocks, but {brief(error)}") from error
    alone = [call_tree(model, lambda image=image: run_model(image)) for image in images.split(1)]
    linears, dense = _linears(links, root, alone)
    if not linears:
        raise refusal(model_type, f"{what} have no linear that reads every image once")
    path = _list_of([link.name for link in links], model) if uniform else None
    names = path or tuple(link.name for link in links)
    found = Architecture(names, tuple(linears), attention="", everywhere=False, uniform=uniform)
    return Discovery(_with_roles(found, links), dense)


def _named(names: Sequence[str]) -> str:
    return f"{names[0]} to {names[-1]} ({len(names)} modules)"


def _list_of(names: Sequence[str], model: nn.Module) -> str | None:
    """Return the path of the list that consists of these modules, if there is one."""
    path = names[0].rpartition(".")[0]
    return path if path and names == [f"{path}.{name}" for name, _ in model.get_submodule(path).named_children()] else None


def _check_share(root: Call, blocks: Sequence[nn.Module]) -> None:
    def size(modules: Sequence[nn.Module]) -> int:
        return sum(p.numel() for p in {parameter for module in modules for parameter in module.parameters()})

    heads = [call.module for call in root.parts if call.ends(root)]
    share = size(blocks) / (size([root.module]) - size(heads))
    if share < LEAST_SHARE:
        raise ValueError(f"they hold only {share:.0%} of its parameters")


def _linears(links: Sequence[Call], root: Call, alone: Sequence[Call]) -> tuple[list[str], dict[str, str]]:
    """Return names within a block of the linears that are pruned, in the order of the modules, and of others with reasons."""
    calls, single = _calls_of(root), [_calls_of(tree) for tree in alone]
    found: dict[str, None] = {}
    dense: dict[str, str] = {}
    for link in links:
        for name, module in link.module.named_modules():
            if is_matrix(module):
                reason = _why_dense(module, calls.get(module, []), [part.get(module, []) for part in single])
            elif isinstance(module, nn.Conv2d):
                reason = "is a convolution of overlapping patches or of groups of channels"
            else:
                continue
            if reason:
                dense.setdefault(name, reason)
            else:
                found[name] = None
    return [name for name in found if name not in dense], dense


def _why_dense(module: nn.Module, calls: list[Call], alone: list[list[Call]]) -> str:
    """Return why a linear stays dense, or nothing."""
    linear = PrunableLinear(module)
    if len(calls) != 1:
        return "is not called" if not calls else f"is called {len(calls)} times"
    if linear.in_features <= MOST_HEADS:
        return f"has {linear.in_features} inputs only"
    whole, parts = linear.tokens_in(calls[0].given), [linear.tokens_in(part[0].given) for part in alone if part]
    rows = whole.numel() // linear.in_features
    if len(parts) != 2 or parts[0].shape != parts[1].shape or whole.numel() != 2 * parts[0].numel():
        return "does not read images"
    together = torch.stack([part.float() for part in parts])
    if not (whole.reshape_as(together) - together).norm() <= SAME * (together[0] - together[1]).norm():
        return "does not read the images in the order of the batch"
    return "reads one token of an image" if rows == 2 else ""


def _calls_of(root: Call) -> dict[nn.Module, list[Call]]:
    found: dict[nn.Module, list[Call]] = {}
    for call in root.all():
        found.setdefault(call.module, []).append(call)
    return found


def _with_roles(found: Architecture, links: Sequence[Call]) -> Architecture:
    """Return the entry with q, k, v and o, if each block has one attention at most and all attentions have the same names."""
    per_block = [parents for link in links if (parents := _attentions(list(find_linears(link.module, found))))]
    if not per_block or any(parents != per_block[0] for parents in per_block) or len(per_block[0]) != 1:
        return found
    attention, projections = next(iter(per_block[0].items()))
    fused = f"{attention}.{FUSED_NAME}"
    if fused not in found.linears:
        return replace(found, projections=projections, attention=attention)
    if not all(_are_thirds(link, attention) for link in links if _has(link, fused)):
        return found
    return replace(found, projections=projections, attention=attention, fused={fused: equal(*QKV)})


def _attentions(linears: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return attention module -> role -> projection, of one block."""
    parents: dict[str, dict[str, str]] = {}
    for name in linears:
        parent, _, own = name.rpartition(".")
        if own == FUSED_NAME:
            parents.setdefault(parent, {}).update({role: f"{name}.{role}" for role in QKV})
        for role, pattern in ROLE_NAMES.items():
            if re.fullmatch(pattern, own):
                parents.setdefault(parent, {}).setdefault(role, name)
    return {
        parent: {role: roles[role] for role in ROLE_NAMES}
        for parent, roles in parents.items()
        if parent and set(roles) == set(ROLE_NAMES)
    }


def _has(link: Call, path: str) -> bool:
    return any(name == path for name, _ in link.module.named_modules())


def _are_thirds(link: Call, path: str) -> bool:
    """Return whether the thirds of a fused linear are q, k and v: what a change of one token's outputs does says so.

    q changes what this token attends to and nothing else, k what others attend to, v no attention at all.
    """
    attention = link.module.get_submodule(path)
    call = next(call for call in link.all() if call.module is attention)
    fused = attention.get_submodule(FUSED_NAME)
    if not isinstance(fused, nn.Linear) or fused.out_features % 3:
        return False

    def attended(rows: slice | None) -> tuple[Tensor, Tensor]:
        def change(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            changed = output.clone()
            if rows is not None:
                first = changed.flatten(0, -2)[0, rows]  # a token of the first image, or of its first window
                first += 20 * first.abs().max() * torch.linspace(-1, 1, len(first), dtype=first.dtype, device=first.device)
            return changed

        handle = fused.register_forward_hook(change)
        try:
            output, probabilities = run_attention_eagerly(attention, call.args, call.kwargs)
        finally:
            handle.remove()
        return output, probabilities[0]

    try:
        output, before = attended(None)
        found = [attended(rows) for rows in equal(*QKV)(fused.out_features, None).values()]
    except RuntimeError:  # no softmax over tokens
        return False
    differences = torch.stack([(probabilities - before).abs().amax(dim=(0, 2)) for _, probabilities in found])
    (own_q, *others_q), (_, *others_k), moved_v = (differences > CHANGED * differences.max()).tolist()
    return own_q and not any(others_q) and any(others_k) and not any(moved_v) and not torch.equal(found[2][0], output)

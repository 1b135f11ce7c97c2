"""Cut experts out of a model: parameters of the experts, rows of the router, and the numbers in the config."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.parts.experts import experts_of

NUMBERS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Names under which configs and modules keep the number of experts."""


def router_of(block: nn.Module, path: str) -> nn.Module:
    """Return the router beside the experts of a block: the module whose weight has a row for each.

    Args:
        block: The block.
        path: Name of the experts within it.

    Raises:
        ValueError: If there is none.
    """
    experts = block.get_submodule(path)
    count, parent = len(experts.down_proj), block.get_submodule(path.rpartition(".")[0])
    for module in parent.children():
        weight = getattr(module, "weight", None)
        if module is not experts and isinstance(weight, Tensor) and weight.ndim == 2 and len(weight) == count:
            return module
    raise ValueError(f"The router of {path!r} in {type(block).__name__} was not found: no weight beside it has {count} rows.")


@torch.no_grad()
def cut_experts(block: nn.Module, path: str, kept: Tensor) -> None:
    """Keep some experts of a block only.

    Args:
        block: The block; changed in place.
        path: Name of the experts within it.
        kept: Numbers of the experts that stay, ascending.
    """
    experts, router = block.get_submodule(path), router_of(block, path)
    count = len(experts.down_proj)
    vars(experts).pop("_matrices", None)  # they are those of all experts
    parent = block.get_submodule(path.rpartition(".")[0])
    for module in (experts, parent, *router.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if (cut := _cut(parameter, count, kept)) is not parameter:
                setattr(module, name, nn.Parameter(cut, parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, _cut(buffer, count, kept))
    for module in (experts, router, parent):
        _renumber(module, count, len(kept))


def _cut(x: Tensor, count: int, kept: Tensor) -> Tensor:
    """Keep the entries of some experts along the first axis, or the second of a single row."""
    if x.ndim and len(x) == count:
        return x[kept.to(x.device)]
    return x[:, kept.to(x.device)] if x.ndim == 2 and tuple(x.shape) == (1, count) else x


def renumber(model: nn.Module, before: int, after: int) -> None:
    """Write the new number of experts into a model of transformers and its config.

    Raises:
        ValueError: If the config does not say how many there are.
    """
    _renumber(model, before, after)
    if not _renumber(model.config, before, after):
        raise ValueError(
            f"The config of {model.config.model_type!r} names none of {', '.join(NUMBERS)} = {before}, so a smaller model "
            "could not be loaded again."
        )


def check_smaller(model: nn.Module, blocks: str, kept: Tensor) -> None:
    """Check on a model without weights that experts can be cut out of all layers and transformers loads what is left.

    Args:
        model: The whole model; not modified.
        blocks: Path of its list of blocks.
        kept: Numbers of the experts that stay.

    Raises:
        ValueError: If they cannot, or it does not.
    """
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        smaller = type(model)(config)
    before = 0
    for block in smaller.get_submodule(blocks):
        for path, experts in experts_of(block).items():
            before = len(experts.down_proj)
            cut_experts(block, path, kept)
    renumber(smaller, before, len(kept))
    with torch.device("meta"):
        expected = {name: value.shape for name, value in type(model)(smaller.config).state_dict().items()}
    found = {name: value.shape for name, value in smaller.state_dict().items()}
    if wrong := [name for name in found if found[name] != expected.get(name)]:
        shapes = tuple(found[wrong[0]]), tuple(expected.get(wrong[0], ()))
        raise ValueError(
            f"Experts of a {type(model).__name__} cannot be dropped: {wrong[0]} would be {shapes[0]}, but the config of the "
            f"smaller model gives {shapes[1]}."
        )


def _renumber(holder: Any, before: int, after: int) -> bool:
    names = [name for name in NUMBERS if getattr(holder, name, None) == before]
    for name in names:
        setattr(holder, name, after)
    return bool(names)

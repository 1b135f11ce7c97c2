"""Cut experts out of a model: parameters of the experts, rows of the router, and the numbers in the config."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
    for module in (experts, router):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if len(parameter) == count:
                setattr(module, name, nn.Parameter(parameter[kept.to(parameter.device)], parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.ndim and len(buffer) == count:
                setattr(module, name, buffer[kept.to(buffer.device)])
    for module in (experts, router, block.get_submodule(path.rpartition(".")[0])):
        _renumber(module, count, len(kept))


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


def check_loadable(model: nn.Module) -> None:
    """Check that transformers makes a model of the same shapes from the config.

    Raises:
        ValueError: If it does not.
    """
    with torch.device("meta"):
        expected = {name: value.shape for name, value in type(model)(model.config).state_dict().items()}
    found = {name: value.shape for name, value in model.state_dict().items()}
    if wrong := [name for name in found if found[name] != expected.get(name)]:
        shapes = tuple(found[wrong[0]]), tuple(expected.get(wrong[0], ()))
        raise ValueError(
            f"The smaller {type(model).__name__} could not be loaded again: {wrong[0]} is {shapes[0]}, but its config gives "
            f"{shapes[1]}."
        )


def _renumber(holder: Any, before: int, after: int) -> bool:
    values: Mapping[str, Any] = vars(holder)
    names = [name for name in NUMBERS if values.get(name) == before]
    for name in names:
        setattr(holder, name, after)
    return bool(names)

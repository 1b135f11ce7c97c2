"""StoredTensors: the tensors of a model as its files hold them, perhaps under other names or in other parts.

transformers converts checkpoints while it loads them: files of mixtures hold the matrices of every expert, the model has one
parameter for all experts of a layer; others have other names. Its own conversions are applied here, to some tensors at a time.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.parts.shards import Shards

META = torch.device("meta")


@dataclass
class _Recipe:
    """How tensors of the model are made of those of the files.

    Attributes:
        target: First tensor of the model that is made.
        converter: Conversion of transformers; None if the only source is taken as it is.
        sources: Tensors of the files, each with the pattern by which the converter knows it.
    """

    target: str
    converter: Any
    sources: list[tuple[str, str]] = field(default_factory=list)


class Conversion:
    """What transformers does to the checkpoints of a model while it loads and saves them.

    Args:
        model: The model; its weights are not used.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.model = model
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._all = mapping

    def recipes(self, names: Iterable[str], wanted: Mapping[str, Tensor]) -> list[_Recipe]:
        """Return how tensors of a model are made.

        Args:
            names: Tensors of the files.
            wanted: Tensors of the model.
        """
        from transformers.core_model_loading import rename_source_key

        found: dict[str, _Recipe] = {}
        for name in sorted(names, key=_natural):  # experts by their numbers
            given = self.model.base_model_prefix, wanted
            target, pattern = rename_source_key(name, self._renamings, self._converters, *given)
            if target not in wanted and name in wanted:
                target, pattern = rename_source_key(name, [], [], *given)
            if target in wanted:
                converter = None if pattern is None else self._by_pattern[pattern]
                found.setdefault(target, _Recipe(target, converter)).sources.append((name, pattern or name))
        return list(found.values())

    def apply(self, recipe: _Recipe, tensors: list[Tensor]) -> dict[str, Tensor]:
        """Return tensors of the model.

        Args:
            recipe: How they are made.
            tensors: Its sources; emptied, so that they are freed one after the other.
        """
        if recipe.converter is None:
            return {recipe.target: tensors.pop(0)}
        converter = copy.deepcopy(recipe.converter)
        for name, pattern in recipe.sources:
            converter.add_tensor(recipe.target, name, pattern, tensors.pop(0))
        made = converter.convert(recipe.target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def remember_used(self) -> None:
        """Note in the model which conversions its files needed, as `from_pretrained` does, so that saving reverts them."""
        if self._all and hasattr(self._all[0], "was_used"):
            self.model._weight_conversions = [entry for entry in self._all if entry.was_used()]

    def revert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of the model as files hold them."""
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.model, tensors)


class StoredTensors:
    """The tensors of a model in some files, by their names in the model. Making it reads nothing but what `shards` has read.

    Args:
        conversion: Conversions of the model.
        shards: The files.
        wanted: Tensors of the model, whose dtypes they get.
    """

    def __init__(self, conversion: Conversion, shards: Shards, wanted: Mapping[str, Tensor]) -> None:
        self.shards = shards
        self._conversion = conversion
        self._dtypes = {name: tensor.dtype for name, tensor in wanted.items()}
        self._recipes: dict[str, _Recipe] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for recipe in conversion.recipes(shards.names, wanted):
            shapes = self._shapes_of(recipe)
            self._recipes |= dict.fromkeys(shapes, recipe)
            self._shapes |= shapes

    def __contains__(self, name: str) -> bool:
        return name in self._recipes

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._shapes[name]

    def read(self, names: Iterable[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Yield name and content of some tensors, those that are made together one after the other.

        Args:
            names: Their names in the model; those that the files lack are passed over.
            device: Device that they go to.
        """
        left = [name for name in names if name in self._recipes]
        while left:
            recipe = self._recipes[left[0]]
            dtype = self._dtypes[recipe.target]
            made = self._conversion.apply(recipe, self.shards.read([name for name, _ in recipe.sources], dtype))
            for name in [name for name in left if name in made]:
                yield name, made.pop(name).to(device)
            left = [name for name in left if self._recipes[name] is not recipe]

    def _shapes_of(self, recipe: _Recipe) -> dict[str, tuple[int, ...]]:
        """Return tensor of the model -> shape; nothing if the conversion cannot do with these sources."""
        sources = [torch.empty(self.shards.shape(name), device=META) for name, _ in recipe.sources]
        try:
            return {name: tuple(tensor.shape) for name, tensor in self._conversion.apply(recipe, sources).items()}
        except Exception:  # whatever its operations raise; the model then lacks these tensors, which is an error
            return {}


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers within names by their values."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name)]

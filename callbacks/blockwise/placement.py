"""Offload: the blocks of a model wait in the host's memory, and only those that are worked on are on the GPU.

Embeddings, final norm and head stay on the device. While blocks are pruned two of them are there; a pass of the whole model
(validation) takes every block there and back, batch after batch.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_modules.base.prunable import PrunableModule


class Offload:
    """Where the blocks of a module are.

    Args:
        module: The module; its model exists when a fit starts.
        trainer: Its trainer.
        enabled: Without it everything stays where Lightning puts it, and nothing here does anything.
    """

    def __init__(self, module: PrunableModule, trainer: Trainer, enabled: bool) -> None:
        self._module, self._device, self._enabled = module, trainer.strategy.root_device, enabled
        if enabled:
            trainer.strategy.model_to_device = self._all_but_blocks

    def hold(self, indices: range) -> None:
        """Have these blocks on the device, and no others."""
        if self._enabled:
            blocks = list(self._module.blocks.values())
            for index in (index for index in range(len(blocks)) if index not in indices):
                blocks[index].to("cpu")
            for index in indices:
                blocks[index].to(self._device)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """While open, every block comes to the device for its own forward pass alone."""
        with ExitStack() as hooks:
            if self._enabled:
                self.hold(range(0))
                for block in self._module.blocks.values():
                    hooks.enter_context(block.register_forward_pre_hook(lambda block, _: block.to(self._device) and None))
                    hooks.enter_context(block.register_forward_hook(lambda block, *_: block.to("cpu") and None))
            yield

    def _all_but_blocks(self) -> None:
        """In place of the strategy's own `model_to_device`."""
        path, _, name = self._module.architecture.blocks.rpartition(".")
        parent = self._module.model.get_submodule(path)
        blocks = parent._modules[name]
        parent._modules[name] = nn.ModuleList()
        try:
            self._module.to(self._device)
        finally:
            parent._modules[name] = blocks


def give_back_placement(trainer: Trainer) -> None:
    """Undo what `Offload` did to the strategy."""
    trainer.strategy.__dict__.pop("model_to_device", None)


def fits(num_bytes: int, device: torch.device) -> bool:
    """Whether a GPU has room for so much beside what it is used for; other devices always do."""
    return device.type != "cuda" or num_bytes < 0.4 * torch.cuda.mem_get_info(device)[0]

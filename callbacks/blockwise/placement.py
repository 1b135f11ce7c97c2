"""Placement: keeps blocks on the device or in host memory; and batch sizes that fit a GPU.

With offload, blocks wait in host memory; embeddings, final norm and head stay on the device. While blocks are pruned, two of
them are on the device. A pass of the whole model (validation) moves every block there and back for each batch. Blocks that are
streamed wait in their files, and are read in place of being moved.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_modules.base.prunable import PrunableModule
from lightning_modules.parts.block_stream import BlockStream
from lightning_modules.parts.host_memory import free_memory
from utilities.distributed import Processes
from utilities.files import check_space

DEFAULT_WINDOWS = 8
MOST_TOKENS = 65536
"""Largest number of tokens at a time; more are not faster, even through small blocks on a large GPU."""
ACTIVATION_SHARE = 0.125
"""Share of the GPU's memory that a block's activations may take."""
HIDDEN_SHARE = 0.4
"""Share of the free memory that hidden states, or traces, may take."""
HOST_SHARE = 0.25
"""Share of the host's free memory that the hidden states of a streamed run may take."""


@dataclass(frozen=True)
class Spill:
    """Files for hidden states that take more than a share of the host's memory; used without a GPU only.

    Attributes:
        directory: Directory of this process's files.
        processes: Number of processes that share memory and disk.
    """

    directory: Path
    processes: int = 1

    def is_needed(self, num_bytes: int) -> bool:
        """Return whether hidden states of this size, in each process, take more than `HOST_SHARE` of the free memory."""
        return num_bytes * self.processes > HOST_SHARE * free_memory()

    def check_space(self, num_bytes: int) -> None:
        """Check that the disk has room for hidden states of this size of each process.

        Raises:
            ValueError: If it has not.
        """
        what = "Hidden states that host memory has no room for"
        check_space(self.directory, num_bytes * self.processes, what)


def spill_of(trainer: Trainer, scratch: Path, processes: Processes) -> Spill:
    """Return the files of this process below the temporary directory of the output."""
    return Spill(scratch / "hidden" / str(processes.rank), max(trainer.world_size // trainer.num_nodes, 1))


class Placement:
    """Moves the blocks of a module between device and host memory.

    Args:
        module: The module; its model may be made later, when a fit starts.
        trainer: Trainer of the run.
        offload: Whether blocks wait in host memory; if not, no method moves anything.
    """

    def __init__(self, module: PrunableModule, trainer: Trainer, offload: bool) -> None:
        self._module, self._device, self._offload = module, trainer.strategy.root_device, offload
        if offload:
            trainer.strategy.model_to_device = self._all_but_blocks

    def hold(self, indices: range) -> None:
        """Move these blocks to the device and all others off it."""
        if self._module.streamed is not None:
            names = list(self._module.blocks)
            self._module.streamed.hold(names[index] for index in indices)
        elif self._offload:
            blocks = list(self._module.blocks.values())
            for index in (index for index in range(len(blocks)) if index not in indices):
                blocks[index].to("cpu")
            for index in indices:
                blocks[index].to(self._device)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Move every block to the device only for its own forward pass, within the context."""
        with ExitStack() as hooks:
            if self._module.streamed is not None:
                self.hold(range(0))  # each reads itself
            elif self._offload:
                self.hold(range(0))
                for block in self._module.blocks.values():
                    hooks.enter_context(block.register_forward_pre_hook(lambda block, _: block.to(self._device) and None))
                    hooks.enter_context(block.register_forward_hook(lambda block, *_: block.to("cpu") and None))
            yield

    def _all_but_blocks(self) -> None:
        """Move everything but the blocks; replaces the strategy's own `model_to_device`."""
        paths = [path.rpartition(".") for path in self._module.blocks]
        parents = [(self._module.model.get_submodule(path), name) for path, _, name in paths]
        blocks = [parent._modules[name] for parent, name in parents]
        try:
            for parent, name in parents:
                parent._modules[name] = nn.Identity()
            self._module.to(self._device)
        finally:
            for (parent, name), block in zip(parents, blocks, strict=True):
                parent._modules[name] = block


def give_back_placement(trainer: Trainer) -> None:
    """Undo what `Placement` did to the strategy."""
    trainer.strategy.__dict__.pop("model_to_device", None)


def fits(num_bytes: int, device: torch.device) -> bool:
    """Return whether a GPU has room for hidden states of this size beside the model; other devices always do."""
    return device.type != "cuda" or num_bytes < HIDDEN_SHARE * torch.cuda.mem_get_info(device)[0]


def make_room(streams: list[BlockStream], num_batches: int, device: torch.device, spill: Spill | None) -> None:
    """Decide, after the first batch, where the hidden states of all batches wait: on the device, on the host or in files.

    Args:
        streams: Streams of the run, each with the first batch.
        num_batches: Number of batches.
        device: Device of the run.
        spill: Files of a streamed run; None uses none.

    Raises:
        ValueError: If the disk has no room for the files.
    """
    num_bytes = num_batches * sum(stream.hidden(0).nbytes for stream in streams)
    if not fits(num_bytes, device):
        for stream in streams:
            stream.move_to_host()
    elif spill is not None and device.type == "cpu" and spill.is_needed(num_bytes):
        spill.check_space(num_bytes)
        for number, stream in enumerate(streams):
            stream.move_to_files(spill.directory / str(number))


def has_spare(num_bytes: int, device: torch.device) -> bool:
    """Return whether a GPU, or the host for a CPU, has this much memory to spare; what is not known counts as none."""
    return num_bytes < HIDDEN_SHARE * room(device)


def room(device: torch.device) -> int:
    """Return the free memory of a GPU, or of the host for a CPU, in bytes; 0 if it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory() if device.type == "cpu" else 0


def windows_at_a_time(module: PrunableModule, seq_len: int, num_windows: int, device: torch.device) -> int:
    """Return the number of windows whose activations in one block fit a share of the GPU's memory.

    It is a power of two, so that processes share whole batches. The share is that of the total memory, not of the free memory,
    so that the same run takes the same batches, bit for bit.

    Args:
        module: The model.
        seq_len: Tokens of a window.
        num_windows: Number of windows of this process.
        device: Device of the run; on others than GPUs at most `DEFAULT_WINDOWS`, since more are not faster.
    """
    if device.type != "cuda":
        return min(DEFAULT_WINDOWS, num_windows)
    linears = list(module.linears(next(iter(module.blocks.values()))).values())
    features = sum((linear.in_features + 2 * linear.out_features) * linear.share_of_tokens for linear in linears)
    token = features * next(module.model.parameters()).element_size()
    tokens = min(MOST_TOKENS, ACTIVATION_SHARE * torch.cuda.get_device_properties(device).total_memory / token)
    most = min(max(int(tokens // seq_len), 1), num_windows)
    return 2 ** (most.bit_length() - 1)

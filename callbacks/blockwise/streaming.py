"""Pruned blocks of a model that is larger than memory: each is written into a shard of its own as soon as it is pruned.

With `resume` the shards lie beside the records of finished blocks (callbacks.blockwise.resume), which hold their SHA-256;
without, in the temporary directory of the output. At the end they get their names in the output and are not copied. Of several
processes the first one writes, and all have to see the files.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from safetensors import SafetensorError
from torch import Tensor

from callbacks.blockwise.placement import HOST_SHARE
from callbacks.blockwise.settings import PruningSettings
from callbacks.blockwise.update_rules import PerplexityRule
from lightning_modules.base.prunable import PrunableModule
from lightning_modules.parts.host_memory import free_memory
from lightning_modules.parts.shards import digest_of_file, write_shard
from lightning_modules.parts.streamed import StreamedBlocks
from utilities.contract import data_of
from utilities.distributed import Processes

SHARD = "shard"
"""Name of the SHA-256 of a block's shard in the record of a finished block."""


class PrunedShards:
    """Shards of the pruned blocks of one run.

    Args:
        streamed: Reads the blocks of the model.
        directory: Directory of the shards; made when the first one is written.
        processes: Processes of the run.
    """

    def __init__(self, streamed: StreamedBlocks, directory: Path, processes: Processes) -> None:
        self._streamed, self._directory, self._processes = streamed, directory, processes

    def writer(self, number: int, block: str) -> Callable[[], dict[str, str]]:
        """Return what writes a block that has been pruned, to be called in the first process, in any thread.

        Args:
            number: Number of the step.
            block: Full name of the block.

        Returns:
            A function that returns what the record of the block has to hold. It raises an OSError if the block cannot be
            written, as on a full disk; shards that were written before are unchanged.

        Raises:
            RuntimeError: If processes hold different weights, or another one failed.
        """
        if self._processes.size > 1:
            self._processes.check_equal(self._streamed.checksum(block), block)
        tensors = self._processes.in_first(lambda: self._streamed.as_stored(block))
        return lambda: {SHARD: self._write(number, tensors)}

    def take(self, number: int, block: str) -> None:
        """Read a block, in all processes, from where it has been written from now on."""
        self._processes.together(lambda: self._streamed.replace(block, self._path(number), read=False))

    def restore(self, number: int, block: str) -> None:
        """Give a block the weights that an earlier run has written, now and from now on."""
        self._streamed.replace(block, self._path(number), read=True)

    def check(self, number: int, content: Mapping[str, Any]) -> None:
        """Check the shard of a finished block.

        Args:
            number: Number of the step.
            content: Record of the block.

        Raises:
            ValueError: If the shard is missing or damaged.
        """
        path = self._path(number)
        if not path.is_file() or digest_of_file(path) != content.get(SHARD):
            raise ValueError(f"{path} is {'damaged: its SHA-256 is another' if path.is_file() else 'missing'}.")

    def _write(self, number: int, tensors: Mapping[str, Tensor]) -> str:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            return write_shard(self._path(number), tensors)
        except (OSError, SafetensorError) as error:  # safetensors raises its own on a full disk
            reason = getattr(error, "strerror", None) or error
            raise OSError(
                f"Block {number} could not be kept in {self._directory} ({reason}). Make room there and start the same command "
                "again; with `resume: true` it goes on with this block."
            ) from error

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:05d}.safetensors"


def check_streaming(module: PrunableModule, settings: PruningSettings, offload: bool) -> None:
    """Check that a run can do with blocks that are read one by one; any run can whose module does not stream.

    Args:
        module: Module of the run; its model is not loaded yet.
        settings: Settings of the run.
        offload: Whether blocks wait in host memory.

    Raises:
        ValueError: If it cannot.
    """
    if not module.streams:
        return
    if offload:
        raise ValueError(
            "Argument `offload` = True keeps all blocks in host memory, but `stream` = True leaves them in their files. Leave "
            "one of them out: a GPU needs room for two blocks with either."
        )
    if isinstance(settings.update_rule, PerplexityRule):
        raise ValueError(
            "Argument `update_rule` expected attention, outlier or fixed with `stream` = True but got perplexity, which prunes "
            "the model three times and keeps the weights of the best. Use another rule, or leave `stream` out."
        )


def check_shared(directory: Path, processes: Processes) -> None:
    """Check that all processes see the files that the first one writes.

    Args:
        directory: Directory of the files; made in the first process if it does not exist.
        processes: Processes of the run.

    Raises:
        ValueError: If one does not, as on another machine without a common disk.
    """
    if processes.size == 1:
        return
    mark = directory / processes.first_of(lambda: _mark(directory))
    blind = [rank for rank, sees in enumerate(processes.gather(mark.is_dir())) if not sees]
    processes.in_first(mark.rmdir)
    if blind:
        raise ValueError(
            f"Argument `output_dir` expected a directory that all processes see, with `stream` = True, but process "
            f"{blind[0]} of {processes.size} does not find what the first one wrote to {str(directory)!r}. Give one on a disk "
            "that all machines share, or leave `stream` out."
        )


def _mark(directory: Path) -> str:
    """Make an empty directory for other processes to find, and return its name."""
    directory.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=".seen-", dir=directory)).name


def size_of(module: PrunableModule) -> int:
    """Return the bytes of all weights of a model, whether they are there or not."""
    return sum(tensor.nbytes for tensor in module.model.state_dict().values())


def spilled_bytes(trainer: Trainer, module: PrunableModule, settings: PruningSettings) -> int:
    """Return the bytes of hidden states of all processes that will go into files, if sizes are known before the first batch.

    Args:
        trainer: Trainer of the run.
        module: Module of the run; its model is loaded.
        settings: Settings of the run.

    Returns:
        0 as well if the hidden states fit into host memory, are kept by a GPU, or the module does not stream.
    """
    facts, device = data_of(trainer).facts(), trainer.strategy.root_device
    if not module.streams or device.type != "cpu" or trainer.limit_train_batches != 1.0:
        return 0
    width = getattr(module.model.config.get_text_config(), "hidden_size", None)
    if facts.num_calibration is None or facts.tokens is None or width is None:
        return 0
    copies = 2 if settings.dense_share > 0 else 1
    total = copies * facts.num_calibration * facts.tokens * width * module.model.dtype.itemsize
    return total if total / trainer.num_nodes > HOST_SHARE * free_memory() else 0


def can_share(directory: Path, other: Path) -> bool:
    """Return whether two directories, which may not exist yet, are on one disk, so that a file can be in both."""
    disks = {next(path for path in (place, *place.parents) if path.exists()).stat().st_dev for place in (directory, other)}
    return len(disks) == 1 and hasattr(os, "link")

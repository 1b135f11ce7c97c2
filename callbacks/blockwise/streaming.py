"""Pruned blocks of a model that is larger than memory: each is written into a shard of its own as soon as it is pruned.

With `resume` the shards lie beside the records of finished blocks (callbacks.blockwise.resume), which hold their SHA-256;
without, in the temporary directory of the output. At the end they get their names in the output and are not copied.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from callbacks.blockwise.settings import PruningSettings
from callbacks.blockwise.update_rules import PerplexityRule
from lightning_modules.base.prunable import PrunableModule
from lightning_modules.parts.shards import digest_of_file
from lightning_modules.parts.streamed import StreamedBlocks
from utilities.distributed import Processes

SHARD = "shard"
"""Name of the SHA-256 of a block's shard in the record of a finished block."""


class PrunedShards:
    """Shards of the pruned blocks of one run.

    Args:
        streamed: Reads the blocks of the model.
        directory: Directory of the shards; made when the first one is written.
    """

    def __init__(self, streamed: StreamedBlocks, directory: Path) -> None:
        self._streamed, self._directory = streamed, directory

    def write(self, number: int, block: str) -> dict[str, str]:
        """Write a block that has been pruned, and read it from there from now on.

        Args:
            number: Number of the step.
            block: Full name of the block.

        Returns:
            What the record of the block has to hold.

        Raises:
            OSError: If it cannot be written, as on a full disk; shards that were written before are unchanged.
        """
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            return {SHARD: self._streamed.write(block, self._path(number))}
        except (OSError, SafetensorError) as error:  # safetensors raises its own on a full disk
            reason = getattr(error, "strerror", None) or error
            raise OSError(
                f"Block {number} could not be kept in {self._directory} ({reason}). Make room there and start the same command "
                "again; with `resume: true` it goes on with this block."
            ) from error

    def restore(self, number: int, block: str) -> None:
        """Give a block the weights that an earlier run has written, now and from now on."""
        self._streamed.replace(block, self._path(number))

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

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:05d}.safetensors"


def check_streaming(module: PrunableModule, settings: PruningSettings, offload: bool, processes: Processes) -> None:
    """Check that a run can do with blocks that are read one by one; any run can whose module does not stream.

    Args:
        module: Module of the run; its model is not loaded yet.
        settings: Settings of the run.
        offload: Whether blocks wait in host memory.
        processes: Processes of the run.

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
    if processes.size > 1:
        raise ValueError(
            f"Argument `trainer.devices` expected 1 with `stream` = True but got {processes.size} processes, which would all "
            "read the same files. Use one, or leave `stream` out."
        )


def size_of(module: PrunableModule) -> int:
    """Return the bytes of all weights of a model, whether they are there or not."""
    return sum(tensor.nbytes for tensor in module.model.state_dict().values())


def can_share(directory: Path, other: Path) -> bool:
    """Return whether two directories, which may not exist yet, are on one disk, so that a file can be in both."""
    disks = {next(path for path in (place, *place.parents) if path.exists()).stat().st_dev for place in (directory, other)}
    return len(disks) == 1 and hasattr(os, "link")

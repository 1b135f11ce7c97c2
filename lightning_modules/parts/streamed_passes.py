"""StreamedPasses: batches go through a streamed model together, so that each block is read once for many of them."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_modules.parts.block_stream import BlockStream
from lightning_modules.parts.host_memory import free_memory
from lightning_modules.parts.streamed import StreamedBlocks

SHARE = 0.25
"""Share of the free memory that the hidden states of waiting batches may take."""


class StreamedPasses:
    """Passes of a whole model, which wait for each other block by block; their outputs have the bits of passes on their own.

    Args:
        streamed: Reads the blocks of the model.
        processes: Number of processes that share the host's memory.
        shows: Whether a bar counts the blocks that all waiting batches have passed.
    """

    def __init__(self, streamed: StreamedBlocks, processes: int = 1, shows: bool = False) -> None:
        self._streamed, self._processes, self._shows = streamed, processes, shows
        self._stream = BlockStream(list(streamed.blocks.values()), routed=False)
        self._waiting: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []
        self._most_bytes = 0.0
        """Bytes of hidden states for which there is room, known from the first of the waiting batches on."""

    def add(self, run_model: Callable[[], Any], use: Callable[[Any], None]) -> None:
        """Add a batch; if there is no room for the next one, all that wait are finished.

        Args:
            run_model: Runs the whole model on the batch. It is called twice, with blocks that only hand on hidden states.
            use: Takes what it returns.
        """
        key = len(self._waiting)
        self._stream.capture(key, run_model)
        self._waiting.append((run_model, use))
        hidden = self._stream.hidden(key)
        if key == 0:
            self._most_bytes = SHARE * self._free(hidden.device)
        if (key + 2) * hidden.nbytes > self._most_bytes:
            self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Send all batches that wait through the blocks, and give their outputs away in the order in which they came."""
        if not self._waiting:
            return
        names = Tqdm(self._streamed.blocks, desc="Blocks", leave=False, disable=not self._shows)
        for index, name in enumerate(names):
            with self._streamed.reading(name):
                for key in range(len(self._waiting)):
                    self._stream.advance(key, index)
        for key, (run_model, use) in enumerate(self._waiting):
            use(self._stream.finish(key, run_model))
        self._waiting = []
        self._stream.clear()

    def _free(self, device: torch.device) -> float:
        return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory() / self._processes

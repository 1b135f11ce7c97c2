"""PrunableModule: base of modules that can be pruned block by block. It owns the model and its chain of blocks.

Without a pruning callback the module trains like any other. A callback arms it with a calibration step; training steps then
pass their batch to that step, and there is no optimizer.
"""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_modules.base.resumable import ResumableModule
from lightning_modules.parts.architectures import (
    ARCHITECTURES,
    Architecture,
    PrunableLinear,
    find_blocks,
    find_linears,
    without_entry,
)
from lightning_modules.parts.block_stream import BlockStream
from lightning_modules.parts.discovery import Discovery
from lightning_modules.parts.streamed import StreamedBlocks
from utilities.contract import ModelFacts, TellsModelFacts
from utilities.digest import checksum, digest

CalibrationStep = Callable[[Any, int], None]


class PrunableModule(ResumableModule, TellsModelFacts):
    """A model made of a chain of blocks, with its metric, its ordinary training and its saved form."""

    model: nn.Module
    judge = "val/loss"
    """Name of the logged metric by which pruned models are compared; lower is better. Never one of test data."""
    reads_compressed = False
    """Whether the module loads directories with compressed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.calibration_step: CalibrationStep | None = None
        self.streamed: StreamedBlocks | None = None
        """Reads the blocks of a model that is larger than memory; None if the whole model is loaded."""
        self.discovered = ""
        """What was discovered of a model that is in no table."""
        self._architecture: Architecture | None = None

    @property
    def streams(self) -> bool:
        """Whether blocks are read when they are needed, which is known before the model is loaded."""
        return False

    @property
    @abstractmethod
    def family(self) -> str:
        """Key of the model in ARCHITECTURES; there may be no entry."""

    @property
    def architecture(self) -> Architecture:
        """Entry of the model's family in ARCHITECTURES, which only pruning needs, or what was discovered in its place.

        Raises:
            ValueError: If there is neither.
        """
        if self._architecture is None:
            self._architecture = self.find_architecture()
        return self._architecture

    @torch.inference_mode(False)  # whose tensors do not say whether they were changed in place
    @torch.no_grad()
    def find_architecture(self) -> Architecture:
        """Look the family up in ARCHITECTURES, or discover blocks and linears by running the model.

        Raises:
            ValueError: If neither works.
        """
        if self.family in ARCHITECTURES:
            return ARCHITECTURES[self.family]
        modes = {part: part.training for part in self.model.modules()}
        self.model.eval()
        try:
            found = self.discover()
        finally:
            for part, training in modes.items():
                part.training = training
        self.discovered = found.summary(len(find_blocks(self.model, found.architecture)))
        rank_zero_info(f"{self.family} is not in the table of families. Discovered: {self.discovered}")
        return found.architecture

    def discover(self) -> Discovery:
        """Find blocks and linears of a family without an entry by running the model, which is in eval mode.

        Raises:
            ValueError: If they are not found; always, unless a subclass knows what to run the model on.
        """
        raise without_entry(self.family)

    @property
    def metric_dtype(self) -> torch.dtype:
        """Dtype of sums of losses. Float32 sums would depend on which process adds what; MPS has nothing wider."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    @property
    def class_tokens(self) -> int:
        """Number of tokens from which classes are read, the first of a sample in the blocks; 0 without such tokens."""
        return 0

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """Full name -> block, in the order of the chain."""
        return find_blocks(self.model, self.architecture)

    def reading(self, block: str) -> AbstractContextManager:
        """Return a context in which a block has its weights, which are read for it if blocks are streamed."""
        return nullcontext() if self.streamed is None else self.streamed.reading(block)

    def block_stream(self) -> BlockStream:
        """Return an empty stream through the chain of blocks."""
        return BlockStream(list(self.blocks.values()), self.architecture.uniform)

    def linears(self, block: nn.Module) -> dict[str, PrunableLinear]:
        """Return name within the block -> prunable linear."""
        return find_linears(block, self.architecture, getattr(self.model, "config", None))

    def attention(self, block: nn.Module) -> nn.Module:
        """Return the attention module of a block."""
        return block.get_submodule(self.architecture.attention)

    def arm(self, calibration_step: CalibrationStep) -> None:
        """Let training steps call `calibration_step(batch, batch_idx)` from now on, without loss and optimizer."""
        self.calibration_step = calibration_step
        self.automatic_optimization = False

    def disarm(self) -> None:
        """Return to ordinary training."""
        self.calibration_step = None
        self.automatic_optimization = True

    def on_fit_start(self) -> None:
        """Turn off DDP's broadcast of buffers before every forward pass, since they are constants here."""
        if isinstance(wrapped := self.trainer.strategy.model, nn.parallel.DistributedDataParallel):
            wrapped.broadcast_buffers = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Return the loss of a batch; when armed, run the calibration step and return None."""
        if self.calibration_step is None:
            return self.training_loss(batch, batch_idx)
        self.calibration_step(batch, batch_idx)
        return None

    @abstractmethod
    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch in ordinary training."""

    @abstractmethod
    def calibration_forward(self, batch: Any) -> None:
        """Run the model on a batch, at least through its blocks, without cache or gradient; the output is not used."""

    @abstractmethod
    def sample_positions(self, batch: Any) -> Tensor:
        """Return the positions of the samples of a batch in the whole calibration set, (samples,), counted from 0."""

    def model_facts(self) -> ModelFacts:
        """Return facts about the model for data modules; none here."""
        return ModelFacts()

    def described(self) -> dict[str, Any]:
        """Return hyperparameters by name, and what was discovered, for reports."""
        return dict(self.hparams) | ({"discovered": self.discovered} if self.discovered else {})

    def identity(self) -> dict[str, str]:
        """Return digests, by name, of all that a pruning run starts from; a resumed run has to start from the same."""
        tensors = self.model.state_dict().items() if self.streamed is None else self.streamed.tensors()
        return {"model": digest(tensors), "stream": str(self.streams)}

    def checksum(self) -> str:
        """Return a checksum of the weights, to compare processes; of streamed blocks, one of the heads of the files."""
        return checksum(self.model.state_dict().values()) if self.streamed is None else self.streamed.checksum()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # Of `to`, `cpu` and the like: blocks that are not there stay where they are.
        with nullcontext() if self.streamed is None else self.streamed.aside():
            return super()._apply(*args, **kwargs)

    def sum_over_processes(self, value: float) -> float:
        """Sum a number over all processes."""
        return float(self.trainer.strategy.reduce(torch.tensor(float(value), device=self.device), reduce_op="sum"))

    def select_samples(self, batch: Any, samples: slice) -> Any:
        """Select samples of a batch; the first axis of all its tensors has to be the samples."""
        return apply_to_collection(batch, Tensor, lambda tensor: tensor[samples])

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the model so that its own library loads it again."""

    def load_arguments(self, directory: Path) -> dict[str, str]:
        """Return arguments of this class, as on a command line, that load what `save` wrote instead of the present model."""
        return {"model_name_or_path": str(directory)}

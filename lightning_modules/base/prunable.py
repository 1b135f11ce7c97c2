"""Base of everything that can be pruned block by block: owns the model and its chain of blocks, decides nothing.

Without a pruning callback the module trains like any other. A callback arms it by setting `calibration_step`; training
steps then hand their batch over, and there is no optimizer.
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_modules.base.resumable import ResumableModule
from lightning_modules.parts.architectures import Architecture, PrunableLinear, find_blocks, find_linears
from utilities.digest import digest

# What is logged at the end of an epoch comes from torchmetrics, which has added the processes up by then.
warnings.filterwarnings("ignore", message="It is recommended to use `self.log")

CalibrationStep = Callable[[Any, int], None]


class PrunableModule(ResumableModule):
    """A model made of a chain of blocks, with its metric, its ordinary training and its way to be saved."""

    model: nn.Module
    architecture: Architecture
    judge = "val/loss"
    """The logged metric, lower is better, by which a choice among pruned models may be made: never one of test data."""

    def __init__(self) -> None:
        super().__init__()
        self.calibration_step: CalibrationStep | None = None

    @property
    def metric_dtype(self) -> torch.dtype:
        """Of sums of losses: in float32 they would depend on which process adds what. MPS has nothing wider."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """The chain of blocks in order, by full name in the model."""
        return find_blocks(self.model, self.architecture)

    def linears(self, block: nn.Module) -> dict[str, PrunableLinear]:
        """The prunable linears of a block, by their name within it."""
        return find_linears(block, self.architecture)

    def attention(self, block: nn.Module) -> nn.Module:
        """The attention module of a block."""
        return block.get_submodule(self.architecture.attention)

    def arm(self, calibration_step: CalibrationStep) -> None:
        """From now on a training step calls `calibration_step(batch, batch_idx)`; no loss, no optimizer."""
        self.calibration_step = calibration_step
        self.automatic_optimization = False

    def disarm(self) -> None:
        """Back to ordinary training."""
        self.calibration_step = None
        self.automatic_optimization = True

    def on_fit_start(self) -> None:
        """In DDP: buffers of these models are constants. Sent before every forward, they would only let processes wait."""
        if isinstance(wrapped := self.trainer.strategy.model, nn.parallel.DistributedDataParallel):
            wrapped.broadcast_buffers = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """The loss, or a calibration step when armed."""
        if self.calibration_step is None:
            return self.training_loss(batch, batch_idx)
        self.calibration_step(batch, batch_idx)
        return None

    @abstractmethod
    def training_loss(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of ordinary training."""

    @abstractmethod
    def calibration_forward(self, batch: Any) -> None:
        """Run the model on a batch, at least through its blocks, without cache or gradient; the output is not used."""

    @abstractmethod
    def sample_positions(self, batch: Any) -> Tensor:
        """Positions of the samples of a batch in the whole calibration set, (samples,), counted from 0."""

    def identity(self) -> dict[str, str]:
        """What a pruning run starts from, as digests by name: a resumed run must start from the same."""
        return {"model": digest(self.model.state_dict().items())}

    def sum_over_processes(self, value: float) -> float:
        """The sum of a number over all processes."""
        return float(self.trainer.strategy.reduce(torch.tensor(float(value), device=self.device), reduce_op="sum"))

    def select_samples(self, batch: Any, samples: slice) -> Any:
        """Some samples of a batch; here one whose tensors all have the samples in front."""
        return apply_to_collection(batch, Tensor, lambda tensor: tensor[samples])

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the model so that its own library loads it again."""

    def load_arguments(self, directory: Path) -> dict[str, str]:
        """Arguments of this class, as on a command line, that load what `save` wrote in place of the present model."""
        return {"model_name_or_path": str(directory)}

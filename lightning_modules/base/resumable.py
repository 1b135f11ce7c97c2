"""Base of all modules: checkpoints hold the random state too, so that a resumed run draws the same numbers as a whole one.

Lightning saves weights, optimizers, loops and callbacks, but not the state that dropout, drop-path, augmentation and shuffling
draw from.
"""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from utilities.distributed import gathered

KEY = "random_state"


class ResumableModule(LightningModule):
    """Saves the random state of torch, numpy and Python in each process, and restores it when `fit` resumes."""

    def __init__(self) -> None:
        super().__init__()
        self._random_state: dict[str, Any] | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the random state of all processes."""
        checkpoint[KEY] = gathered(random_state(self.device))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the random state of this process when `fit` resumes with as many processes as before."""
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        states = checkpoint.get(KEY, [])
        if len(states) != self.trainer.world_size:
            rank_zero_warn(
                f"The checkpoint holds the random state of {len(states)} processes, this run has {self.trainer.world_size}: it "
                "goes on with other random numbers than without the interruption."
            )
            return
        self._random_state = states[self.trainer.global_rank]
        set_random_state(self._random_state, self.trainer.strategy.root_device)

    def on_train_epoch_start(self) -> None:
        """Restore the state again if the checkpoint was made before the end of its epoch.

        The trainer then ends that epoch and makes a second iterator for this one, and each of the two draws a number.
        """
        if self._random_state is not None and not self.trainer.fit_loop.is_resuming:
            set_random_state(self._random_state, self.device)
        self._random_state = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Forget the restored state."""
        self._random_state = None  # resumed within an epoch


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the generators of torch, numpy and Python, as tensors and numbers."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "python": random.getstate(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators of torch, numpy and Python to a state.

    Args:
        state: Result of `random_state`.
        device: Device whose generator is set, if it is a GPU.
    """
    torch.set_rng_state(state["torch"].cpu())
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)

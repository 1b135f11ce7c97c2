"""How many windows of text go through a block at a time, where the data module leaves it open (`batch_size: auto`)."""

import torch
from lightning.pytorch import Trainer

from callbacks.blockwise.processes import Processes
from lightning_modules.base.prunable import PrunableModule

DEFAULT = 8
MOST_TOKENS = 65536
"""More at a time are not faster, even through small blocks on a large GPU."""
SHARE = 0.1
"""Of the GPU's memory that a block's activations may take."""


def windows_at_a_time(module: PrunableModule, seq_len: int, num_windows: int, device: torch.device) -> int:
    """Windows whose activations in one block fit a share of the GPU: a power of two, so that processes share whole batches.

    From all of its memory, not what is free of it: the same run takes the same batches, bit by bit.

    Args:
        module: The model.
        seq_len: Tokens of a window.
        num_windows: Of this process.
        device: Where it runs; without a GPU, nothing is gained by more than `DEFAULT`.
    """
    if device.type != "cuda":
        return min(DEFAULT, num_windows)
    linears = list(module.linears(next(iter(module.blocks.values()))).values())
    features = sum(linear.in_features + 2 * linear.out_features for linear in linears)
    token = features * next(module.model.parameters()).element_size()
    tokens = min(MOST_TOKENS, SHARE * torch.cuda.get_device_properties(device).total_memory / token)
    most = min(max(int(tokens // seq_len), 1), num_windows)
    return 2 ** (most.bit_length() - 1)


def choose_batch_size(trainer: Trainer, module: PrunableModule, processes: Processes) -> None:
    """Tell the data module, where it leaves the choice open."""
    options = getattr(trainer.datamodule, "hparams", {})
    if options.get("batch_size") == "auto":
        windows = max(options["num_calibration"] // trainer.world_size, 1)
        chosen = windows_at_a_time(module, options["seq_len"], windows, trainer.strategy.root_device)
        trainer.datamodule.calibration_batch_size = min(processes.gather(chosen))

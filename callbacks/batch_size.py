"""How many windows of text go through a block at a time, where the data module leaves it open (`batch_size: auto`)."""

import torch

from lightning_modules.prunable import PrunableModule

DEFAULT = 8
MOST_TOKENS = 65536
"""More at a time are not faster, even through small blocks on a large GPU."""
SHARE = 0.1
"""Of the GPU's memory that a block's activations may take."""


def windows_at_a_time(module: PrunableModule, seq_len: int, num_windows: int, device: torch.device) -> int:
    """Windows whose activations in one block fit a share of the GPU, in batches of about equal size.

    From the GPU's whole memory, not what is free of it: the same run takes the same batches, bit by bit.

    Args:
        module: The model.
        seq_len: Tokens of a window.
        num_windows: Of this process.
        device: Where it runs; without a GPU, which gains nothing, it is `DEFAULT`.
    """
    if device.type != "cuda":
        return min(DEFAULT, num_windows)
    linears = list(module.linears(next(iter(module.blocks.values()))).values())
    features = sum(linear.in_features + 2 * linear.out_features for linear in linears)
    token = features * next(module.model.parameters()).element_size()
    tokens = min(MOST_TOKENS, SHARE * torch.cuda.get_device_properties(device).total_memory / token)
    most = min(max(int(tokens // seq_len), 1), num_windows)
    batches = -(-num_windows // most)
    return -(-num_windows // batches)

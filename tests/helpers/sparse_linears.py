"""Linears with zeros, on the GPU if there is one."""

import torch
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sparse_linear(dtype=torch.bfloat16, bias=True, inputs=64, outputs=48):
    """Make a linear with 60 % zeros at random."""
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias).to(DEVICE, dtype).requires_grad_(False)
    linear.weight[torch.rand(outputs, inputs, device=DEVICE) < 0.6] = 0
    return linear

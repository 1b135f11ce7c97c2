"""Digests of tensors: whether two processes, or two runs, hold the same bits."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors, as 64 hexadecimal digits.

    Args:
        tensors: Name and tensor, on any device; copied to the CPU one at a time.
    """
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        found.update(as_bytes(tensor).cpu().numpy())
    return found.hexdigest()


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as uint8, (bytes,); a view where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

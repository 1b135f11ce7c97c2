"""Digests and checksums of tensors: whether two runs, or two processes, hold the same bits."""

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


def checksum(tensors: Iterable[Tensor]) -> str:
    """A number of 64 bits for each tensor, made where it is: Σ xᵢ (2i + 1) over its words modulo 2⁶⁴, as hexadecimal digits.

    For accidents, not for enemies: any one changed word changes it, and it costs a GPU one look at the memory.
    """
    found = []
    for tensor in tensors:
        words = as_bytes(tensor)
        words = torch.nn.functional.pad(words, (0, -len(words) % 8)).view(torch.int64)
        found.append((words * torch.arange(1, 2 * len(words), 2, device=words.device)).sum())
    return ",".join(f"{number % 2**64:016x}" for number in torch.stack([x.cpu() for x in found]).tolist()) if found else ""


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as uint8, (bytes,); a view where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

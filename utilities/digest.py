"""Digests and checksums, which show whether two runs or processes hold the same bits and run the same code."""

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
SOURCES = ("callbacks", "datamodules", "functional", "lightning_modules", "utilities")
"""Packages whose code a pruning run depends on."""


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of tensors, as 64 hexadecimal digits.

    Args:
        tensors: Names and tensors, on any device; copied to the CPU one at a time.
    """
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        found.update(as_bytes(tensor).cpu().numpy().data)
    return found.hexdigest()


@cache
def source_digests() -> dict[str, str]:
    """Return path below the project's root -> SHA-256 of each Python file of `SOURCES`, read once per process."""
    files = sorted(path for package in SOURCES for path in (ROOT / package).rglob("*.py"))
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def source_digest() -> str:
    """Return one SHA-256 over `source_digests`."""
    return hashlib.sha256(repr(sorted(source_digests().items())).encode()).hexdigest()


def checksum(tensors: Iterable[Tensor]) -> str:
    """Return 64 bits per tensor as hexadecimal digits: Σ xᵢ (2i + 1) over its 64-bit words modulo 2⁶⁴.

    It is computed on the tensor's device and reads the memory once. It detects accidents, not attacks: any single changed word
    changes it.
    """
    found = []
    for tensor in tensors:
        words = as_bytes(tensor)
        words = torch.nn.functional.pad(words, (0, -len(words) % 8)).view(torch.int64)
        found.append((words * torch.arange(1, 2 * len(words), 2, device=words.device)).sum())
    return ",".join(f"{number % 2**64:016x}" for number in torch.stack([x.cpu() for x in found]).tolist()) if found else ""


def as_bytes(tensor: Tensor) -> Tensor:
    """View a tensor as uint8, (bytes,); a tensor that is not contiguous is copied."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

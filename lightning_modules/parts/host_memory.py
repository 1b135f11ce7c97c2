"""HostMemory: tensors that do not fit on a GPU together, in pinned host memory; each is fetched before its turn.

FileMemory keeps tensors that do not fit into host memory in files.
"""

import ctypes
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from utilities.digest import as_bytes


class HostMemory:
    """Tensors by key, which are read and replaced in the order of their keys, again and again.

    Copies run one after the other on a stream of their own, so a fetch sees what was put before. Reading a tensor starts to
    fetch the next one.

    Args:
        device: Device on which the tensors are used.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._stored: dict[int, Tensor] = {}
        self._fetched: dict[int, Tensor] = {}

    def put(self, key: int, value: Tensor) -> None:
        """Store a tensor, which must not be changed afterwards; shape and dtype are those of the first one of this key."""
        if key not in self._stored:
            self._stored[key] = torch.empty(value.shape, dtype=value.dtype, pin_memory=self._on_gpu)
        with self._copying():
            self._stored[key].copy_(value, non_blocking=True)
            if self._on_gpu:
                value.record_stream(self._stream)
        self._fetched[key] = value  # most likely it is read next

    def get(self, key: int) -> Tensor:
        """Return the tensor on the device."""
        if key not in self._fetched:
            self._fetch(key)
        if self._on_gpu:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        value, following = self._fetched[key], self._after(key)
        self._fetched = {k: v for k, v in self._fetched.items() if k in (key, following)}
        if following not in self._fetched:
            self._fetch(following)
        return value

    def clear(self) -> None:
        """Forget all tensors."""
        self._stored.clear()
        self._fetched.clear()

    def _after(self, key: int) -> int:
        keys = list(self._stored)
        return keys[(keys.index(key) + 1) % len(keys)]

    def _fetch(self, key: int) -> None:
        with self._copying():
            value = self._stored[key].to(self._device, non_blocking=True)
        if self._on_gpu:
            value.record_stream(torch.cuda.current_stream(self._device))
        self._fetched[key] = value

    def _copying(self):
        if not self._on_gpu:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)


class FileMemory:
    """Tensors by key in files, which take host memory only while they are used.

    Args:
        directory: Directory of the files, which is of no other use; made if it does not exist.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._kinds: dict[int, tuple[torch.Size, torch.dtype]] = {}
        directory.mkdir(parents=True, exist_ok=True)

    def put(self, key: int, value: Tensor) -> None:
        """Store a tensor of the host.

        Raises:
            OSError: If it cannot be written, as on a full disk.
        """
        self._kinds[key] = value.shape, value.dtype
        with self._path(key).open("wb") as file:
            file.write(as_bytes(value).numpy().data)

    def get(self, key: int) -> Tensor:
        """Return a copy of the tensor."""
        shape, dtype = self._kinds[key]
        found = torch.empty(shape, dtype=dtype)
        with self._path(key).open("rb") as file:
            file.readinto(as_bytes(found).numpy().data)
        return found

    def clear(self) -> None:
        """Remove all files."""
        self._kinds.clear()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _path(self, key: int) -> Path:
        return self._directory / f"{key:06d}.hidden"


def return_freed_memory() -> None:
    """Return freed memory to the system, where the C library is glibc, which else keeps what lies between what is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def free_memory() -> int:
    """Return the bytes of host memory that programs can still take, those of file caches included; 0 where it is not known."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        known = "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {})
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 0

"""Shards: the tensors of a model in safetensors files, read one at a time; files are written whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from utilities.safe_load import brief

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATING = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CHUNK = 2**20
"""Bytes of a file that are digested at a time."""


class Shards:
    """The tensors of some safetensors files, by name. Making it reads only the heads of the files.

    Args:
        files: The files, such as those of `find_shards`.

    Raises:
        ValueError: If a file is damaged or missing.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        for path in files:
            self._read_head(path)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    @property
    def directory(self) -> Path:
        """Directory of the files."""
        return next(iter(self._files.values())).parent

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the first tensor of floating point numbers, None without one."""
        return next((FLOATING[found] for found in self._dtypes.values() if found in FLOATING), None)

    def heads(self) -> str:
        """Return names, shapes and dtypes of all tensors, and sizes of the files, as one SHA-256."""
        tensors = [(name, self._shapes[name], self._dtypes[name]) for name in sorted(self._files)]
        sizes = sorted((path.name, path.stat().st_size) for path in set(self._files.values()))
        return hashlib.sha256(repr((tensors, sizes)).encode()).hexdigest()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._shapes[name]

    def read(self, names: Sequence[str], dtype: torch.dtype | None = None) -> list[Tensor]:
        """Read some tensors; each file is opened once.

        Args:
            names: Their names.
            dtype: Dtype that they get; as stored when None.

        Returns:
            The tensors in this order, on the host, in memory of their own: the files may change or vanish afterwards.
        """
        found: dict[str, Tensor] = {}
        for path in dict.fromkeys(self._files[name] for name in names):
            with safe_open(path, "pt") as file:
                for name in (name for name in names if self._files[name] == path):
                    found[name] = self._content(file, name, dtype)
        return [found[name] for name in names]

    def _content(self, file: Any, name: str, dtype: torch.dtype | None) -> Tensor:
        """Return a tensor of an open file, in memory of its own."""
        return file.get_tensor(name).to(dtype=dtype, copy=True)

    def _note(self, path: Path, file: Any) -> None:
        """Note the tensors of an open file."""
        for name in file.keys():  # noqa: SIM118  (this is no dict)
            part = file.get_slice(name)
            self._files[name], self._shapes[name] = path, tuple(part.get_shape())
            self._dtypes[name] = part.get_dtype()

    def _read_head(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                self._note(path, file)
        except Exception as error:  # a damaged file may make the reader raise anything
            raise ValueError(
                f"Argument `model_name_or_path`: {path} cannot be read ({brief(error)}). Get the file again."
            ) from error


def find_shards(directory: Path) -> list[Path]:
    """Return the files that hold the weights in a directory.

    Raises:
        ValueError: If there is neither model.safetensors nor an index, or the index is damaged.
    """
    found = files_of(directory, SINGLE)
    if found is None:
        pickled = [path.name for path in sorted(directory.glob("pytorch_model*.bin"))]
        raise ValueError(
            f"Argument `stream` = True expected safetensors in `model_name_or_path`, but {str(directory)!r} has "
            f"{f'pickled weights, {pickled[0]}' if pickled else f'neither {SINGLE} nor {INDEX}'}. Load it with transformers "
            "and write it with `save_pretrained` on a machine that holds it, or leave `stream` out."
        )
    return found


def files_of(directory: Path, single: str) -> list[Path] | None:
    """Return the files of a set of shards: one of this name, or those that its index lists; None if there is neither.

    Raises:
        ValueError: If the index is damaged.
    """
    index = directory / f"{single}.index.json"
    if (directory / single).is_file():
        return [directory / single]
    if not index.is_file():
        return None
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [directory / Path(file).name for file in sorted(files)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"Argument `model_name_or_path`: {index} is damaged ({brief(error)}). Get the file again.") from error


def write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: tuple[str, str] = ("format", "pt")) -> str:
    """Write tensors to a file, under another name first, flush it to the disk and rename it.

    Args:
        path: The file.
        tensors: Tensors by name.
        metadata: Name and text that the head of the file holds; one only, since safetensors writes several in any order.

    Returns:
        SHA-256 of the file, 64 hexadecimal digits.

    Raises:
        OSError: If it cannot be written, as on a full disk; a file of that name is unchanged.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        found = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(found, partial, dict([metadata]))
        _flush(partial)
        digest = digest_of_file(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush(path.parent)
    return digest


def digest_of_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits; it is read part by part."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            found.update(part)
    return found.hexdigest()


def write_index(directory: Path, files: Mapping[str, str], metadata: Mapping[str, Any], name: str = INDEX) -> None:
    """Write the index that transformers looks for beside several shards.

    Args:
        directory: Directory of the shards.
        files: Tensor -> name of its file.
        metadata: Facts on all tensors, such as total_size, their bytes.
        name: Name of the index.
    """
    write_text(directory / name, json.dumps({"metadata": metadata, "weight_map": dict(sorted(files.items()))}, indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a file of text whole or not at all, and flush it to the disk."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(content, encoding="utf-8")
    _flush(partial)
    os.replace(partial, path)
    _flush(path.parent)


def give_second_name(file: Path, name: Path) -> None:
    """Give a file a second name, so that it takes no more space; copy it where the disk has no links, or is another one."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)
        _flush(name)


def _flush(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Compressed directories: the matrices of a model with zeros as masks and values, in place of transformers' own files.

    compressed.json              {"format": "bitmap", "version": 1}
    compressed.safetensors       all tensors; or compressed-00001-of-00003.safetensors, … and compressed.safetensors.index.json
    config.json, …               as in a plain directory

A matrix `<name>` that gets smaller is replaced by `<name>.mask`, uint8, and `<name>.values` (functional/sparse/bitmap.py): a
bit for every weight, and the weights that are not zero, row after row as the matrix is stored. Of a tensor of more axes, such
as experts, all but the last are its rows. Its shape is in the head of its file, under `bitmap`: JSON of `<name>` -> shape. All
other tensors are stored as they are. What comes back has the same bits but for negative zeros, which are positive then.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from functional.sparse import compress, compressed_bytes, count_kept, decompress
from lightning_modules.parts.shards import (
    FLOATING,
    INDEX,
    SINGLE,
    Shards,
    files_of,
    find_shards,
    write_index,
    write_shard,
    write_text,
)
from utilities.safe_load import brief

MARK = "compressed.json"
FORMAT = {"format": "bitmap", "version": 1}
COMPRESSED = "compressed.safetensors"
COMPRESSED_INDEX = f"{COMPRESSED}.index.json"
SHAPES = "bitmap"
"""Key of the shapes in the head of a file."""


class CompressedShards(Shards):
    """The tensors of a compressed directory by their own names; masks and values are turned back when a matrix is read."""

    def __init__(self, files: list[Path]) -> None:
        self._compressed: set[str] = set()
        super().__init__(files)

    def _note(self, path: Path, file: Any) -> None:
        super()._note(path, file)
        for name, shape in json.loads((file.metadata() or {}).get(SHAPES, "{}")).items():
            mask, values = f"{name}.mask", f"{name}.values"
            if self.shape(mask) != (math.prod(shape[:-1]), -(-shape[-1] // 8)):
                raise ValueError(f"{mask} has not the shape of a matrix {shape}")
            if self._dtypes[mask] != "U8" or self._dtypes[values] not in FLOATING:
                raise ValueError(
                    f"{mask} and {values} expected U8 and floating point but have {self._dtypes[mask]} and "
                    f"{self._dtypes[values]}"
                )
            self._files[name], self._shapes[name], self._dtypes[name] = path, tuple(shape), self._dtypes[values]
            for part in (mask, values):
                del self._files[part], self._shapes[part], self._dtypes[part]
            self._compressed.add(name)
        masked = [name.removesuffix(".mask") for name in self._files if name.endswith(".mask")]
        if left := [name for name in masked if f"{name}.values" in self._files]:
            raise ValueError(f"the head of the file lacks the shape of {left[0]}")

    def _content(self, file: Any, name: str, dtype: torch.dtype | None) -> Tensor:
        if name not in self._compressed:
            return super()._content(file, name, dtype)
        mask, values, shape = file.get_tensor(f"{name}.mask"), file.get_tensor(f"{name}.values"), self.shape(name)
        if count_kept(mask) != values.numel():
            raise ValueError(
                f"Argument `model_name_or_path`: {self._files[name]} is damaged: {name} has {values.numel()} values for "
                f"{count_kept(mask)} bits. Get the file again."
            )
        return decompress(mask, values, math.prod(shape[:-1]), shape[-1]).view(shape).to(dtype=dtype)


def is_compressed(directory: Path) -> bool:
    """Return whether a directory holds compressed weights, of a format that this version reads.

    Raises:
        ValueError: If the format is another, or plain weights lie beside them.
    """
    mark = directory / MARK
    if not mark.is_file():
        return False
    try:
        found = json.loads(mark.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if found != FORMAT:
        raise ValueError(
            f"Argument `model_name_or_path`: {mark} expected to hold {json.dumps(FORMAT)} but has {found!r}. Read it with the "
            "version of this project that wrote it, or get the file again."
        )
    if plain := [name for name in (SINGLE, INDEX) if (directory / name).is_file()]:
        raise ValueError(
            f"Argument `model_name_or_path`: {str(directory)!r} has compressed weights and {plain[0]}, of which one is of an "
            f"earlier run. Remove {plain[0]} and its shards, or {MARK} and compressed*.safetensors*."
        )
    return True


def open_shards(directory: Path) -> Shards:
    """Return the tensors of a directory, compressed or plain.

    Raises:
        ValueError: If it has neither, or a file is damaged or missing.
    """
    if not is_compressed(directory):
        return Shards(find_shards(directory))
    return CompressedShards(_compressed_files(directory))


def compress_directory(directory: Path) -> None:
    """Replace the plain files of a model's weights by compressed ones, file by file.

    Args:
        directory: What `save_pretrained` has written; nobody reads it meanwhile.
    """
    metadata, files = _metadata_of(directory / INDEX), {}
    for path in find_shards(directory):
        written = path.with_name(path.name.replace("model", "compressed", 1))
        tensors, shapes = {}, {}
        for name, tensor in _tensors_of(path):
            found = _compressed(tensor)
            tensors |= {name: tensor} if found is None else {f"{name}.mask": found[0], f"{name}.values": found[1]}
            if found is not None:
                shapes[name] = list(tensor.shape)
        write_shard(written, tensors, (SHAPES, json.dumps(shapes)))
        files |= dict.fromkeys(tensors, written.name)
        path.unlink()
    if (directory / INDEX).is_file():
        write_index(directory, files, metadata, COMPRESSED_INDEX)
        (directory / INDEX).unlink()
    write_text(directory / MARK, json.dumps(FORMAT) + "\n")


def expand_weights(directory: Path, output: Path) -> None:
    """Write the weights of a compressed directory as the plain files that they were made of.

    Args:
        directory: The compressed directory.
        output: Existing directory of the plain files.

    Raises:
        ValueError: If a file is damaged or missing.
    """
    files = {}
    for path in _compressed_files(directory):
        shards = CompressedShards([path])
        written = output / path.name.replace("compressed", "model", 1)
        write_shard(written, dict(zip(shards.names, shards.read(shards.names), strict=True)))
        files |= dict.fromkeys(shards.names, written.name)
    if (directory / COMPRESSED_INDEX).is_file():
        write_index(output, files, _metadata_of(directory / COMPRESSED_INDEX))


def remove_other_form(directory: Path, compressed: bool) -> None:
    """Remove the weights of an earlier run that a directory has in the other form.

    Args:
        directory: The directory.
        compressed: Whether its present weights are the compressed ones.
    """
    single = SINGLE if compressed else COMPRESSED
    for path in [*(files_of(directory, single) or ()), directory / f"{single}.index.json"]:
        path.unlink(missing_ok=True)
    if not compressed:
        (directory / MARK).unlink(missing_ok=True)


def _compressed_files(directory: Path) -> list[Path]:
    """Return the files of a compressed directory's weights."""
    files = files_of(directory, COMPRESSED)
    if not files:
        raise ValueError(
            f"Argument `model_name_or_path`: {str(directory)!r} has {MARK} but neither {COMPRESSED} nor {COMPRESSED_INDEX}. "
            "Get the missing files."
        )
    return files


def _compressed(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return mask and values of a tensor; None if it would not get smaller."""
    if tensor.ndim < 2 or tensor.dtype not in FLOATING.values() or not tensor.numel():
        return None
    matrix = tensor.flatten(0, -2)
    if compressed_bytes(*matrix.shape, int(torch.count_nonzero(matrix)), tensor.itemsize) >= tensor.nbytes:
        return None
    found = compress(matrix)
    return found.mask, found.values


def _tensors_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield name and content of the tensors of a file, one by one."""
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  (this is no dict)
            yield name, file.get_tensor(name)


def _metadata_of(index: Path) -> Mapping[str, Any]:
    """Return what an index says of all tensors; nothing without one."""
    if not index.is_file():
        return {}
    try:
        return json.loads(index.read_text(encoding="utf-8")).get("metadata", {})
    except (ValueError, AttributeError) as error:
        raise ValueError(f"Argument `model_name_or_path`: {index} is damaged ({brief(error)}). Get the file again.") from error

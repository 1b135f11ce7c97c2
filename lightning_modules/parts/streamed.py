"""StreamedBlocks: a language model whose blocks stay in their shards and are read when they are needed.

The skeleton has no weights (device meta) but whole buffers. Embeddings, final norm and head are read once; a block is read,
used and freed again. A block that runs while it is not there reads itself for its own forward pass. Once a block has been
pruned, it is read from a file of its own.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.parts.compressed_files import open_shards
from lightning_modules.parts.host_memory import return_freed_memory
from lightning_modules.parts.shards import Shards, give_second_name, write_index, write_shard
from lightning_modules.parts.stored import Conversion, StoredTensors
from utilities.digest import checksum

META, HOST = torch.device("meta"), torch.device("cpu")


class StreamedBlocks:
    """Reads and frees the blocks of a model; everything outside them is read when this is made.

    Args:
        model: Skeleton of the model: parameters without content, buffers with it.
        blocks: Full name -> block.
        shards: Tensors of the checkpoint.

    Raises:
        ValueError: If the shards lack a weight of the model, or hold two where it ties one.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module], shards: Shards) -> None:
        self.blocks = dict(blocks)
        """Full name -> block, in their order."""
        self._model, self._conversion = model, Conversion(model)
        self._stored = self._tensors_in(shards)
        self._pruned: dict[str, tuple[Path, StoredTensors]] = {}
        """Block -> file of its pruned weights."""
        self._check()
        self._conversion.remember_used()
        self._read_others()
        for name, block in self.blocks.items():
            block.forward = self._reading_forward(name, block.forward)

    def hold(self, names: Iterable[str]) -> None:
        """Free all blocks but these, and then read those of these that are not there."""
        names = list(names)
        for name in self.blocks:
            if name not in names:
                self._free(name)
        return_freed_memory()
        for name in names:
            if not self._is_there(name):
                self._read(name)

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Let a block be there within the context; it is freed afterwards unless it was there before."""
        if self._is_there(name):
            yield
            return
        try:
            self._read(name)
            yield
        finally:
            self._free(name)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the blocks out of the model within the context; what has no content cannot be moved."""
        path, _, name = next(iter(self.blocks)).rpartition(".")[0].rpartition(".")
        parent = self._model.get_submodule(path)
        blocks = parent._modules[name]
        parent._modules[name] = nn.ModuleList()
        try:
            yield
        finally:
            parent._modules[name] = blocks

    def as_stored(self, name: str) -> dict[str, Tensor]:
        """Return the present tensors of a block, which has to be there, by their names in files, in host memory."""
        return {full: tensor.to(HOST) for full, tensor in self._conversion.revert(self._tensors(name)).items()}

    def replace(self, name: str, path: Path, read: bool) -> None:
        """Read a block from another file from now on.

        Args:
            name: Full name of the block.
            path: The file, which holds what `as_stored` has returned.
            read: Whether it is read at once; if not, the block holds the same weights already.
        """
        self._pruned[name] = path, self._tensors_in(Shards([path]))
        if read:
            self._free(name)
            self._read(name)

    def checksum(self, name: str | None = None) -> str:
        """Return a checksum of the present weights of a block; without a name of all that is there, and of the files' heads."""
        if name is not None:
            return checksum(self._tensors(name).values())
        return f"{self._stored.shards.heads()} {checksum(self._others().values())}"

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and content of all tensors of the checkpoint, read one by one, in the dtype of the model."""
        for name, tensor in self._model.state_dict().items():
            yield next(self._stored.read([name], HOST), (name, tensor))

    def save(self, directory: Path) -> None:
        """Write config and shards: a file for each block, and one for the rest. Those of pruned blocks are not copied."""
        _save_config(self._model, directory)
        files: dict[str, str] = {}
        size, names = 0, [*self.blocks, ""]
        for number, name in enumerate(names, 1):
            file = directory / f"model-{number:05d}-of-{len(names):05d}.safetensors"
            size += sum(tensor.nbytes for tensor in (self._tensors(name) if name else self._others()).values())
            if name in self._pruned:
                give_second_name(self._pruned[name][0], file)
            elif name:
                with self.reading(name):
                    write_shard(file, self._conversion.revert(self._tensors(name)))
            else:
                write_shard(file, self._conversion.revert(self._others()))
            files |= dict.fromkeys(Shards([file]).names, file.name)
        write_index(directory, files, {"total_size": size})

    def move_to(self, directory: Path) -> None:
        """Read all blocks from what `save` has written, and free them."""
        self._stored = self._tensors_in(open_shards(directory))
        self.forget_pruned()

    def forget_pruned(self) -> None:
        """Return to the weights of the checkpoint, and free all blocks."""
        self._pruned = {}
        self.hold(())

    def _reading_forward(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        # No hook: a block whose forward BlockStream has replaced, to record its arguments, must not be read.
        @functools.wraps(forward)
        def read_and_run(*args: Any, **kwargs: Any) -> Any:
            with self.reading(name):
                return forward(*args, **kwargs)

        return read_and_run

    def _is_there(self, name: str) -> bool:
        return not any(parameter.is_meta for parameter in self.blocks[name].parameters())

    @torch.inference_mode(False)  # what is read in a validation may be pruned later
    def _read(self, name: str) -> None:
        device = self._model.get_input_embeddings().weight.device
        stored = self._pruned[name][1] if name in self._pruned else self._stored
        owners = {full: (owner, key) for owner, key, full in places(self.blocks[name], name)}
        for full, found in stored.read(owners, device):
            owner, key = owners[full]
            if key in owner._parameters:
                owner._parameters[key] = _like(owner._parameters[key], found)
            else:
                owner._buffers[key] = found
        for module in self.blocks[name].modules():
            module._buffers.update({key: buffer.to(device) for key, buffer in module._buffers.items() if buffer is not None})

    @torch.inference_mode(False)
    def _free(self, name: str) -> None:
        for module in self.blocks[name].modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    module._parameters[key] = _like(parameter, torch.empty_like(parameter, device=META))

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """Return full name -> present tensor of a block."""
        return {full: _value(owner, key) for owner, key, full in places(self.blocks[name], name)}

    def _others(self) -> dict[str, Tensor]:
        """Return what is outside the blocks; of tied weights the first, as transformers does."""
        found: dict[int, tuple[str, Tensor]] = {}
        with self.aside():
            for owner, key, full in places(self._model):
                found.setdefault(id(_value(owner, key)), (full, _value(owner, key)))
        return dict(found.values())

    def _read_others(self) -> None:
        """Read what is outside the blocks; what is tied stays one."""
        with self.aside():
            outside = [(owner, key, full, _value(owner, key)) for owner, key, full in places(self._model)]
        read: dict[int, Tensor] = {}
        values = {full: value for _, _, full, value in outside}
        # What is not there is tied to what is, as `_check` has found, or a buffer that has its value.
        for full, found in self._stored.read(values, HOST):
            value = values[full]
            if not torch.equal(read.setdefault(id(value), found), found):
                raise ValueError(
                    f"Argument `stream` = True: {type(self._model).__name__} ties {full} to another weight, but the shards in "
                    f"{str(self._stored.shards.directory)!r} hold both, and they differ. Leave `stream` out."
                )
        for owner, key, _, value in outside:
            if key in owner._parameters:
                owner._parameters[key] = read[id(value)] = _like(value, read[id(value)])
            else:
                owner._buffers[key] = read.get(id(value), value)

    def _tensors_in(self, shards: Shards) -> StoredTensors:
        return StoredTensors(self._conversion, shards, self._model.state_dict())

    def _check(self) -> None:
        """Check, from the heads of the files, that they hold every parameter under its name and in its shape."""
        names: dict[int, list[str]] = {}
        for owner, key, full in places(self._model):
            if key in owner._parameters:
                names.setdefault(id(owner._parameters[key]), []).append(full)
        shapes = {full: tuple(_value(owner, key).shape) for owner, key, full in places(self._model)}
        lacking = []
        for tied in names.values():
            stored = [name for name in tied if name in self._stored]
            if not stored or any(self._stored.shape(name) != shapes[tied[0]] for name in stored):
                lacking.append(tied[0])
        if lacking:
            raise ValueError(
                f"Argument `stream` = True expected shards with the names and shapes of {type(self._model).__name__}, but "
                f"those in {str(self._stored.shards.directory)!r} lack {len(lacking)} of its {len(names)} weights, such as "
                f"{lacking[0]}. "
                "Get the missing files, or leave `stream` out."
            )


def places(module: nn.Module, prefix: str = "") -> Iterator[tuple[nn.Module, str, str]]:
    """Yield owner, key and full name of every parameter, and of every buffer that is saved; of what is tied each place."""
    for path, owner in module.named_modules(prefix=prefix, remove_duplicate=False):
        saved = [key for key in owner._buffers if key not in owner._non_persistent_buffers_set]
        for key in (*owner._parameters, *saved):
            if _value(owner, key) is not None:
                yield owner, key, f"{path}.{key}" if path else key


def _value(owner: nn.Module, key: str) -> Tensor:
    return owner._parameters[key] if key in owner._parameters else owner._buffers[key]


def _like(parameter: Tensor, content: Tensor) -> nn.Parameter:
    """Return a parameter with other content; products round by whether it may need a gradient, so that stays as it is."""
    return content if isinstance(content, nn.Parameter) else nn.Parameter(content, parameter.requires_grad)


def _save_config(model: nn.Module, directory: Path) -> None:
    """Write what `save_pretrained` of transformers writes beside the weights."""
    model.config.dtype, model.config.architectures = str(model.dtype).removeprefix("torch."), [type(model).__name__]
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)

"""Load a language model whose blocks stay in their shards, and refuse what cannot be streamed before a weight is read."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_modules.parts.adapters import CONFIG
from lightning_modules.parts.architectures import ARCHITECTURES, find_blocks
from lightning_modules.parts.compressed_files import open_shards
from lightning_modules.parts.discovery import Discovery, chain_of, discover
from lightning_modules.parts.language_models import keep_soft_cap, loading, read_config
from lightning_modules.parts.shards import Shards
from lightning_modules.parts.streamed import HOST, META, StreamedBlocks, places
from lightning_modules.parts.vision_language import auto_class
from utilities.contract import data_of
from utilities.distributed import need_whole_weights
from utilities.hub import resolve_model_path

FILES = ["config.json", "generation_config.json", CONFIG, "model*.safetensors", "model.safetensors.index.json", "compressed*"]
"""Files of a repository that streaming reads."""
CONVERT = "Load it with transformers and write it with `save_pretrained` on a machine that holds it, or leave `stream` out."


def load_streamed(path: str, dtype: str, attn_implementation: str | None) -> tuple[nn.Module, StreamedBlocks]:
    """Load all weights but those of the blocks.

    Args:
        path: A hub id or a directory.
        dtype: Name of a dtype, or auto for that of the checkpoint.
        attn_implementation: Attention of transformers, which chooses when None.

    Returns:
        The model, and what reads its blocks.

    Raises:
        ValueError: If the model cannot be loaded, or not be streamed.
    """
    from transformers import GenerationConfig

    directory, config = _directory_of(path), read_config(path)
    _check_config(path, config)
    shards = open_shards(directory)
    options: dict[str, Any] = {"dtype": _dtype_of(dtype, config, shards)}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with loading(path), META:
        model = auto_class(str(directory), {}).from_config(config, **options).eval()
    _widen(model, options["dtype"])
    _make_buffers(model, model)
    keep_soft_cap(model, attn_implementation)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model, StreamedBlocks(model, _blocks_of(model), shards)


def check_stage(trainer: Any, prunes: bool) -> None:
    """Check that a stage of a trainer can do with blocks that are read one by one.

    Args:
        trainer: The trainer, or None without one.
        prunes: Whether a pruning callback has armed the module.

    Raises:
        ValueError: If it cannot.
    """
    if trainer is None:
        return
    need_whole_weights(trainer, "`model.stream` = True")
    stage, settings = trainer.state.fn, data_of(trainer).facts().settings
    if stage == TrainerFn.PREDICTING:
        raise ValueError(
            "Argument `stream` = True expected fit with BlockwisePruning, validate or test but got predict, which would read "
            "the whole model for every token. Leave `stream` out, on a machine that holds the model."
        )
    if stage == TrainerFn.FITTING and not prunes:
        raise ValueError(
            "Argument `stream` = True expected fit with BlockwisePruning, validate or test but got fit without that callback: "
            "training needs all weights. Add BlockwisePruning to trainer.callbacks, or leave `stream` out."
        )
    if str(trainer.precision).endswith("-true") and trainer.precision != "32-true":
        raise ValueError(
            f"Argument `trainer.precision` expected 32-true or a mixed one with `stream` = True but got {trainer.precision}, "
            "which changes weights that are not there. Set `model.dtype` instead."
        )
    file = settings.get("self_file")
    if settings.get("source") == "self" and not (file and Path(file).is_file()):
        raise ValueError(
            "Argument `source` expected a text, or self with a `self_file` that is there, with `stream` = True, but got self: "
            "to write, the model would be read once for every token. Give a text, or windows that were written elsewhere."
        )


def discover_streamed(model: nn.Module, run_model: Callable[[], Tensor], model_type: str) -> Discovery:
    """Find the blocks and linears of a model whose blocks are read when they run.

    Args:
        model: The model.
        run_model: Runs it on one window and returns its logits, (1, tokens, vocabulary).
        model_type: Its name, for errors.

    Raises:
        ValueError: If they cannot be verified.
    """
    try:
        return discover(model, run_model, model_type, streamed=True)
    except ValueError as error:
        raise ValueError(
            f"Argument `stream` = True expected a model whose blocks run one by one. {error} Without `stream` it can be "
            "evaluated."
        ) from error


def _directory_of(path: str) -> Path:
    """Return the directory of the shards; those of a hub id are downloaded unless the cache has them."""
    from huggingface_hub import snapshot_download

    name, arguments = resolve_model_path(path)
    if "gguf_file" in arguments:
        raise ValueError(
            f"Argument `stream` = True expected a directory or a hub id with safetensors but got the GGUF file {path!r}, whose "
            f"weights are quantised. {CONVERT}"
        )
    if not Path(name).is_dir():
        with loading(path):
            name = snapshot_download(name, allow_patterns=FILES)
    if (Path(name) / CONFIG).is_file():
        raise ValueError(
            f"Argument `stream` = True expected a model without adapters, but {str(name)!r} has {CONFIG}. Merge them first "
            "(callbacks.LoRA with `merge`), or leave `stream` out."
        )
    return Path(name)


def _check_config(path: str, config: Any) -> None:
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"Argument `stream` = True expected plain weights, but those of {path!r} are quantised (quantization_config). Give "
            "a checkpoint in float32, bfloat16 or float16."
        )


def _blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return full name -> block, from the table or as discovery takes them; it verifies them once they can be read."""
    model_type = model.config.model_type
    if model_type in ARCHITECTURES:
        return find_blocks(model, ARCHITECTURES[model_type])
    path, blocks = chain_of(model, model_type)
    return {f"{path}.{index}": block for index, block in enumerate(blocks)}


def _widen(model: nn.Module, dtype: torch.dtype) -> None:
    """Let weights be float32 that transformers never has in half precision, as `from_pretrained` does."""
    patterns = [name.replace("*", ".*") for name in model._get_dtype_plan(dtype)]
    for owner, key, full in places(model):
        if any(re.search(pattern, full) for pattern in patterns):
            kind = owner._parameters if key in owner._parameters else owner._buffers
            wide = torch.empty_like(kind[key], dtype=torch.float32)
            kind[key] = nn.Parameter(wide, kind[key].requires_grad) if kind is owner._parameters else wide


@torch.no_grad()
def _make_buffers(module: nn.Module, model: nn.Module) -> None:
    """Give buffers their content, which no file has of most, as `from_pretrained` does.

    Args:
        module: Part of a model.
        model: Innermost model of transformers that it belongs to, which knows how its parts begin.
    """
    model = module if hasattr(module, "_init_weights") else model
    found = {key: buffer for key, buffer in module._buffers.items() if buffer is not None}
    for key, buffer in found.items():  # NaN, so that it is seen if one is filled nowhere
        module._buffers[key] = torch.full_like(buffer, math.nan if buffer.is_floating_point() else 0, device=HOST)
    if found:
        model._init_weights(module)
    for part in module.children():
        _make_buffers(part, model)


def _dtype_of(dtype: str, config: Any, shards: Shards) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    return config.dtype or shards.dtype or torch.float32

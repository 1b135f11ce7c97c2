"""Load causal language models and tokenizers of transformers, with errors that name the argument to blame."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_modules.parts.adapters import CONFIG, has_adapters
from lightning_modules.parts.compressed_files import is_compressed, open_shards
from lightning_modules.parts.vision_language import auto_class
from utilities.hub import has_tokenizer, resolve_model_path
from utilities.safe_load import brief


def read_config(path: str) -> Any:
    """Read the configuration of a model, before its weights, which may take minutes.

    Args:
        path: A hub id, a directory, a .gguf file, or package://<python package>/<file>.

    Raises:
        ValueError: If it cannot be loaded.
    """
    from transformers import AutoConfig

    name, arguments = resolve_model_path(path)
    with loading(path):
        return AutoConfig.from_pretrained(name, **arguments)


def load_model(path: str, dtype: str, attn_implementation: str | None) -> nn.Module:
    """Load a model with its weights as plain tensors, and add adapters beside them; no object is unpickled.

    Args:
        path: Same as in `read_config`.
        dtype: Name of a dtype, or auto for that of the checkpoint (float32 for GGUF).
        attn_implementation: Attention of transformers, which chooses when None.

    Raises:
        ValueError: If the model cannot be loaded, or its scores have a soft cap that the given attention would leave out.
    """
    name, arguments = resolve_model_path(path)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    if "gguf_file" in arguments:
        rank_zero_info(f"Dequantising {arguments['gguf_file']}.")
        options |= _dequantised(dtype)
    elif Path(name).is_dir():
        has_adapters(name)
        if is_compressed(Path(name)):
            return _load_compressed(path, Path(name), dtype, attn_implementation)
        options["use_safetensors"] = True  # not for hub ids: OPT has only pickled weights there
    with loading(path):
        model = auto_class(name, arguments).from_pretrained(name, **arguments, **options, weights_only=True)
    keep_soft_cap(model, attn_implementation)
    return model


def _load_compressed(path: str, directory: Path, dtype: str, attn_implementation: str | None) -> nn.Module:
    """Load a model whose weights are compressed in a directory, as `load_model` does; they are dense afterwards."""
    from transformers import GenerationConfig

    if (directory / CONFIG).is_file():
        raise ValueError(
            f"Argument `model_name_or_path`: {path!r} has adapters ({CONFIG}) beside compressed weights. Write a plain "
            f"directory with `python -m lightning_modules.expand {path} OUT`, and give that one."
        )
    shards, config = open_shards(directory), read_config(path)
    weights = dict(zip(shards.names, shards.read(shards.names), strict=True))
    with loading(path):
        with torch.device("meta"):
            cls = type(auto_class(str(directory), {}).from_config(config))
        options = {"dtype": dtype, "attn_implementation": attn_implementation}
        model, found = cls.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True, **options)
        if (directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"Argument `model_name_or_path`: the compressed weights in {path!r} lack {len(missing)} of the model's tensors "
            f"({missing[0]}), which would be random. Get the files again."
        )
    model.name_or_path = model.config.name_or_path = str(directory)  # as `from_pretrained` notes a path
    keep_soft_cap(model, attn_implementation)
    return model


def load_tokenizer(path: str) -> Any | None:
    """Load the tokenizer beside a model; None for a directory without one.

    Args:
        path: Same as in `read_config`.

    Raises:
        ValueError: If it cannot be loaded.
    """
    from transformers import AutoTokenizer

    name, arguments = resolve_model_path(path)
    if not has_tokenizer(name, arguments):
        return None
    with loading(path):
        return AutoTokenizer.from_pretrained(name, **arguments)


def keep_soft_cap(model: nn.Module, attn_implementation: str | None) -> None:
    """Switch Gemma-2 to eager attention: sdpa has no soft cap, which newer transformers refuses and 5.10 ignores silently."""
    config = model.config.get_text_config()
    if not getattr(config, "attn_logit_softcapping", None) or config._attn_implementation != "sdpa":
        return
    if attn_implementation is not None:
        raise ValueError(
            f"Argument `attn_implementation` = {attn_implementation!r} leaves out the soft cap of the attention scores that "
            f"{type(model).__name__} has. Give eager, or leave it out."
        )
    model.set_attn_implementation("eager")


def check_given(model: nn.Module, dtype: str, attn_implementation: str | None, stream: bool) -> None:
    """Check that a model in memory is one of transformers, and that no argument says how to load it.

    Raises:
        ValueError: If it is not, or one does.
    """
    if not hasattr(model, "generate") or not hasattr(getattr(model, "config", None), "model_type"):
        raise ValueError(
            f"Argument `model_name_or_path` expected a path, or a causal language model of transformers, but got a "
            f"{type(model).__name__}."
        )
    arguments = ("dtype", dtype, "auto"), ("attn_implementation", attn_implementation, None), ("stream", stream, False)
    for name, value, default in arguments:
        if value != default:
            raise ValueError(
                f"Argument `{name}` = {value!r} says how a model is loaded, but `model_name_or_path` is a model in memory. "
                "Leave it out."
            )


@contextmanager
def loading(path: str) -> Iterator[None]:
    """Raise errors of libraries again, with the argument to blame."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, the hub client and the readers of files share no base class below this one
        raise ValueError(
            f"Argument `model_name_or_path`: no model could be loaded from {path!r} ({brief(error)}). Give a hub id, a local "
            "directory, a .gguf file, or package://<python package>/<file> with config, tokenizer and weights (safetensors); a "
            "hub id needs a connection or a filled cache."
        ) from error


def _dequantised(dtype: str) -> dict[str, Any]:
    """Return options of ``from_pretrained`` that turn GGUF blocks into plain weights."""
    import transformers

    options: dict[str, Any] = {"dtype": "float32" if dtype == "auto" else dtype}
    if hasattr(transformers, "GgufConfig"):  # from 5.23 on, weights stay quantised without it
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return options

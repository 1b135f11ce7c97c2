"""Causal language models and tokenizers of transformers, loaded so that an error names the argument to blame."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_modules.parts.adapters import has_adapters
from utilities.hub import has_tokenizer, resolve_model_path
from utilities.safe_load import brief


def read_config(path: str) -> Any:
    """Configuration of a model, which is read before its weights: those of a large model take minutes.

    Args:
        path: A hub id, a directory, a .gguf file, or package://<python package>/<file>.

    Raises:
        ValueError: If there is none to be had.
    """
    from transformers import AutoConfig

    name, arguments = resolve_model_path(path)
    with _loading(path):
        return AutoConfig.from_pretrained(name, **arguments)


def load_model(path: str, dtype: str, attn_implementation: str | None) -> nn.Module:
    """Weights as plain tensors, adapters beside them added; no pickled object is made.

    Args:
        path: As for `read_config`.
        dtype: auto (what the checkpoint holds; float32 for GGUF) or the name of a dtype.
        attn_implementation: As in transformers; its own choice when None.

    Raises:
        ValueError: If the model cannot be loaded, or sdpa is asked for where it would leave out the soft cap of its scores.
    """
    from transformers import AutoModelForCausalLM

    name, arguments = resolve_model_path(path)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    if "gguf_file" in arguments:
        rank_zero_info(f"Dequantising {arguments['gguf_file']}.")
        options |= _dequantised(dtype)
    elif Path(name).is_dir():
        has_adapters(name)
        options["use_safetensors"] = True  # on the hub, OPT has pickled weights only: of these, tensors and nothing else
    with _loading(path):
        model = AutoModelForCausalLM.from_pretrained(name, **arguments, **options, weights_only=True)
    _keep_soft_cap(model, attn_implementation)
    return model


def load_tokenizer(path: str) -> Any | None:
    """Tokenizer that lies beside a model; None for a directory without one.

    Args:
        path: As for `read_config`.

    Raises:
        ValueError: If it cannot be loaded.
    """
    from transformers import AutoTokenizer

    name, arguments = resolve_model_path(path)
    if not has_tokenizer(name, arguments):
        return None
    with _loading(path):
        return AutoTokenizer.from_pretrained(name, **arguments)


def _keep_soft_cap(model: nn.Module, attn_implementation: str | None) -> None:
    """Compute Gemma-2 eagerly: sdpa has no soft cap, which newer transformers refuses and 5.10 ignores without a word."""
    config = model.config
    if not getattr(config, "attn_logit_softcapping", None) or config._attn_implementation != "sdpa":
        return
    if attn_implementation is not None:
        raise ValueError(
            f"Argument `attn_implementation` = {attn_implementation!r} leaves out the soft cap of the attention scores that "
            f"{type(model).__name__} has. Give eager, or leave it out."
        )
    model.set_attn_implementation("eager")


@contextmanager
def _loading(path: str) -> Iterator[None]:
    """Name the argument to blame for what a library reports."""
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
    """Options of ``from_pretrained`` that turn GGUF blocks into plain weights."""
    import transformers

    options: dict[str, Any] = {"dtype": "float32" if dtype == "auto" else dtype}
    if hasattr(transformers, "GgufConfig"):  # since 5.23 weights stay quantised otherwise; before, they never did
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return options

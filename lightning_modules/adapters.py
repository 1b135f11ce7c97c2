"""Adapters of peft that lie beside a model in its directory, as callbacks.LoRA with `merge: none` writes them."""

from pathlib import Path

from torch import nn

from functional.extras import require

CONFIG = "adapter_config.json"


def has_adapters(path: str) -> bool:
    """Whether a directory, if it is one, holds adapters: transformers adds them by itself, but leaves them out without peft.

    Raises:
        ModuleNotFoundError: If it does, but peft is not installed.
    """
    if not (Path(path).expanduser() / CONFIG).is_file():
        return False
    require("lora", "peft")
    return True


def add_adapters(model: nn.Module, path: str) -> None:
    """Add the adapters of a directory to a model, in place."""
    from peft import PeftModel

    PeftModel.from_pretrained(model, Path(path).expanduser())

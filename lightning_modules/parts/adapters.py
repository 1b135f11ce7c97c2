"""Load adapters of peft from a model's directory, where callbacks.LoRA with `merge: none` writes them."""

from pathlib import Path

from torch import nn

from utilities.extras import require
from utilities.safe_load import brief, weights_only

CONFIG = "adapter_config.json"


def has_adapters(path: str) -> bool:
    """Return whether a path is a directory that holds adapters.

    Transformers adds them by itself, but silently leaves them out without peft.

    Raises:
        ModuleNotFoundError: If there are adapters but peft is not installed.
    """
    if not (Path(path).expanduser() / CONFIG).is_file():
        return False
    require("lora", "peft")
    return True


def add_adapters(model: nn.Module, path: str) -> None:
    """Add the adapters of a directory to a model, in place, without unpickling objects.

    Raises:
        ValueError: If the adapters do not fit the model or cannot be read.
    """
    from peft import PeftModel

    try:
        with weights_only():
            PeftModel.from_pretrained(model, Path(path).expanduser())
    except Exception as error:  # peft, safetensors and torch share no base class below this one
        raise ValueError(
            f"Argument `model_name_or_path`: the adapters in {path!r} cannot be added to its model ({brief(error)}). Write the "
            f"directory again, or remove its {CONFIG} to use the model without them."
        ) from error

"""Vision-language models of transformers, whose text tower is pruned like a language model: their class and processor."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from utilities.hub import resolve_model_path

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json")
"""Files beside the weights that say how images and prompts become inputs; those of the tokenizer aside."""


def auto_class(name: str, arguments: dict[str, str]) -> Any:
    """Return the class of transformers that loads a model as a language model, with its vision tower if it has one.

    Args:
        name: Hub id or directory.
        arguments: Names a .gguf file in it, or nothing.
    """
    import transformers

    if arguments:  # a .gguf file holds a language model, and its configuration takes long to read
        return transformers.AutoModelForCausalLM
    config = transformers.AutoConfig.from_pretrained(name)
    if is_vision_language(config) and type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText  # AutoModelForCausalLM would load some of them without vision tower
    return transformers.AutoModelForCausalLM


def is_vision_language(config: Any) -> bool:
    """Return whether the text tower is one of several parts of a model.

    Args:
        config: Configuration of the model.
    """
    return config.get_text_config() is not config


def copy_processor(config: Any, path: str, directory: Path) -> None:
    """Copy the processor of a vision-language model beside its saved weights; other models have none.

    Args:
        config: Configuration of the model.
        path: Where the model was loaded from: a hub id or a directory; empty for a model in memory.
        directory: Existing directory.
    """
    if not path or not is_vision_language(config):
        return
    name, _ = resolve_model_path(path)
    for file in PROCESSOR_FILES:
        if (found := _file_of(name, file)) is not None:
            shutil.copyfile(found, directory / file)


def _file_of(name: str, file: str) -> Path | None:
    """Return a file of a directory or hub id; None if it has none of this name."""
    if Path(name).is_dir():
        return Path(name, file) if Path(name, file).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with suppress(EntryNotFoundError):
        return Path(hf_hub_download(name, file))
    return None

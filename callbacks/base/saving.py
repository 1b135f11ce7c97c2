"""Write a model as its own library's files, or compressed: `save_compressed` of SaveModel and BlockwisePruning."""

from pathlib import Path

from lightning_modules.base.prunable import PrunableModule
from lightning_modules.parts.compressed_files import compress_directory


def save_model(module: PrunableModule, directory: Path, compressed: bool) -> None:
    """Write a model into a directory that nobody reads yet.

    Args:
        module: Module of the model.
        directory: Existing directory.
        compressed: Whether weights are stored as masks and values.
    """
    module.save(directory)
    if compressed:
        compress_directory(directory)


def check_compressed(module: PrunableModule, save_compressed: bool, push_to_hub: str | None) -> None:
    """Check that what is saved compressed can be loaded again.

    Args:
        module: Module of the run.
        save_compressed: Whether weights are stored as masks and values.
        push_to_hub: Repository that the directory is uploaded to, or None.

    Raises:
        ValueError: If it cannot.
    """
    if not isinstance(save_compressed, bool):
        raise ValueError(f"Argument `save_compressed` expected true or false but got {save_compressed!r}.")
    if save_compressed and not module.reads_compressed:
        raise ValueError(
            f"Argument `save_compressed` = True expected a CausalLM, which loads compressed weights, but got "
            f"{type(module).__name__}. Leave it out."
        )
    if save_compressed and push_to_hub is not None:
        raise ValueError(
            f"Argument `save_compressed` = True writes files that no other library reads, but `push_to_hub` = {push_to_hub!r} "
            "publishes them. Leave one of them out."
        )


def how_stored(compressed: bool) -> str:
    """Say in a model card how zeros are stored."""
    if compressed:
        return (
            "Zeros are not stored: this project loads the directory, and `python -m lightning_modules.expand DIR OUT` turns it "
            "into a plain one for other libraries."
        )
    return "It loads as the dense model does, and zeros are stored like other weights, so the files are as large."

"""Uploads a finished directory to the Hugging Face hub: checked before a run starts, done once its result is on disk."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token, is_offline_mode
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from callbacks.base.model_card import is_repository
from utilities.reporting import shown_path
from utilities.safe_load import brief


def check_repository(name: str | None) -> None:
    """Raise a ValueError unless a value of `push_to_hub` is None or has the form owner/name."""
    if name is not None and not (name.count("/") == 1 and is_repository(name)):
        raise ValueError(
            f"Argument `push_to_hub` expected owner/name of a repository on the hub, of letters, digits, '-', '_' and '.', but "
            f"got {name!r}. Correct it, or leave it out."
        )


def check_access(trainer: Trainer, name: str | None) -> None:
    """Raise a ValueError in all processes if the first one could not upload to a repository.

    Args:
        trainer: Trainer whose processes are connected.
        name: Repository, owner/name; None where nothing is uploaded.
    """
    if name is None:
        return
    problem = None
    if is_offline_mode():
        problem = "HF_HUB_OFFLINE is set. Unset it"
    elif get_token() is None:
        problem = "there is no token for it. Run `hf auth login`, or set HF_TOKEN"
    problem = trainer.strategy.broadcast(problem)  # that of the first process, which uploads
    if problem is not None:
        raise ValueError(f"Argument `push_to_hub` = {name!r} needs the hub, but {problem}; or leave `push_to_hub` out.")


def upload(directory: Path, name: str) -> None:
    """Upload a directory that is complete; call it in one process.

    A repository that does not exist is created as a private one: what has been public cannot be taken back, and the licence of
    the base model or of the data may forbid it. It can be made public on its page on the hub.

    Args:
        directory: Directory whose files are all uploaded.
        name: Repository, owner/name.

    Raises:
        RuntimeError: If the upload fails. The directory stays as it is, and the message has the command that uploads it.
    """
    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=directory, commit_message="Upload model and model card")
    except Exception as error:  # the hub client, the HTTP client and the disk share no base class below this one
        command = shlex.join(["hf", "upload", name, shown_path(directory), ".", "--private"])
        raise RuntimeError(
            f"The model is complete in {shown_path(directory)}, but it could not be uploaded to {name} ({brief(error)}). Run "
            f"`{command}` to upload it."
        ) from error
    rank_zero_info(f"Model uploaded to {address}.")

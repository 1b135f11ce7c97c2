"""Windows that the model writes itself (`source: self`), in all processes, kept in a file if the settings name one.

The file is safetensors: `windows`, int64, (number, seq_len), with the settings that they were written with as metadata.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utilities.contract import WINDOWS_OF_A_BATCH, WritesText, writer_of
from utilities.distributed import Processes, need_whole_weights
from utilities.safe_load import brief

SELF = "self"
FORMAT = "windows written by the model"


class SelfWindows:
    """Calibration and held-out windows of one data module, written by the model.

    Args:
        path: File of the windows, or None.
        seq_len: Number of tokens of a window.
        num_calibration: Number of calibration windows.
        num_heldout: Number of held-out windows, which come after them.
        tests: Whether the held-out windows are the test windows too, since there is no other text for them.
    """

    def __init__(self, path: str | None, seq_len: int, num_calibration: int, num_heldout: int, tests: bool) -> None:
        self._path, self._tests = None if path is None else Path(path), tests
        self._settings = {"seq_len": seq_len, "num_calibration": num_calibration, "num_heldout": num_heldout}

    def check(self, stage: str) -> None:
        """Check that a stage has windows to come.

        Args:
            stage: Stage of the trainer; only `fit` may come before the file.

        Raises:
            ValueError: If there is no file in another stage than `fit`, or nothing is held out to test on.
        """
        if stage == "test" and not self._settings["num_heldout"]:
            raise ValueError("Argument `test_source` is null and `num_heldout` is 0: there is no text to test on.")
        if stage != "fit" and not self._is_on_file():
            raise ValueError(
                f"Argument `source` = self: {TrainerFn(stage).value} reads what `fit` has written, but `self_file` = "
                f"{None if self._path is None else str(self._path)!r} is no file. Name the one that `fit` wrote; or give a "
                "text, since what a pruned model writes says little about it."
            )

    def windows(self, trainer: Trainer, drawn: dict[str, int]) -> dict[str, Tensor]:
        """Read the windows or, if they are not on file, let the model of a trainer write them.

        The first process reads and saves; all of them write.

        Args:
            trainer: The trainer, whose model is loaded.
            drawn: Seed, and size of the vocabulary, by name.

        Returns:
            Part -> windows, (number, seq_len), the same in all processes.

        Raises:
            ValueError: If the file holds something else, or windows of other settings, or the trainer's module writes no text.
            ProcessFailedError: If another process failed.
        """
        need_whole_weights(trainer, "`source` = self")
        processes, settings = Processes(trainer.global_rank, trainer.world_size), self._settings | drawn
        if processes.first_of(self._is_on_file):
            return self._parts(processes.first_of(lambda: read_windows(self._path, settings)))
        number = settings["num_calibration"] + settings["num_heldout"]
        windows = write_together(processes, writer_of(trainer), number, settings["seq_len"], settings["seed"])
        if self._path is not None:
            processes.in_first(lambda: save_windows(self._path, windows, settings))
        return self._parts(windows)

    def _is_on_file(self) -> bool:
        return self._path is not None and self._path.is_file()

    def _parts(self, windows: Tensor) -> dict[str, Tensor]:
        number = self._settings["num_calibration"]
        parts = {"calibration": windows[:number], "heldout": windows[number:]}
        return parts | ({"test": windows[number:]} if self._tests else {})


def write_together(processes: Processes, writer: WritesText, number: int, seq_len: int, seed: int) -> Tensor:
    """Let each process write its share of the batches: batch i is written by process i modulo their number.

    They meet after each round of batches, so that none waits for another longer than a batch takes.

    Args:
        processes: Processes of the run.
        writer: Module of this process.
        number: Number of windows.
        seq_len: Number of tokens of a window.
        seed: Seed.

    Returns:
        Tokens, (number, seq_len), the same in all processes, whatever their number.

    Raises:
        Exception: The error of the writer, in processes where it failed.
        ProcessFailedError: In the others.
    """
    batches, written = -(-number // WINDOWS_OF_A_BATCH), []
    for first in range(0, batches, processes.size):
        batch = first + processes.rank

        def work(batch: int = batch) -> Tensor | None:
            return writer.write_batch(batch, number, seq_len, seed) if batch < batches else None

        written += [windows for windows in processes.gather(processes.together(work)) if windows is not None]
        rank_zero_info(f"The model has written {sum(map(len, written))} of {number} windows.")
    return torch.cat(written)


def read_windows(path: Path, wanted: dict[str, Any]) -> Tensor:
    """Read windows from a file.

    Args:
        path: The file.
        wanted: Settings, by name, that the windows must have been written with.

    Raises:
        ValueError: If the file holds something else, or windows of other settings.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata, windows = file.metadata() or {}, file.get_tensor("windows")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"Argument `self_file`: {path} holds no windows that a model has written ({brief(error)}). Delete it, or name "
            "another."
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"Argument `self_file`: {path} was written by another program. Name another file.")
    found = json.loads(metadata["settings"])
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"Argument `self_file`: the windows in {path} were written with {name} = {found.get(name)!r}, but it is "
                f"{value!r} now. Delete the file, name another, or go back to that setting."
            )
    return windows


def save_windows(path: Path, windows: Tensor, settings: dict[str, Any]) -> None:
    """Write windows and their settings, all or nothing.

    Args:
        path: The file.
        windows: Tokens, (number, seq_len), int64.
        settings: Settings by name, plain values.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    metadata = {"format": FORMAT, "settings": json.dumps(settings)}
    save_file({"windows": windows.to(torch.int64).contiguous()}, new, metadata=metadata)
    os.replace(new, path)


def check_self(source: object, test_source: object, sampling: str, self_file: str | None) -> None:
    """Check the settings of a data module that belong to `source: self`, or do not.

    Args:
        source: `source`.
        test_source: `test_source`.
        sampling: `sampling`.
        self_file: `self_file`.

    Raises:
        ValueError: If they do not fit each other.
    """
    others = test_source if isinstance(test_source, list) else [test_source]
    if SELF in others or (isinstance(source, list) and SELF in source):
        raise ValueError("Argument `source` = self expected to stand alone, and not to be a `test_source`. Give a text there.")
    if source == SELF and sampling != "joined":
        raise ValueError(f"Argument `sampling` = {sampling!r} draws from documents, which `source` = self lacks. Leave it out.")
    if source != SELF and self_file is not None:
        raise ValueError(f"Argument `self_file` = {self_file!r} belongs to `source: self`. Leave it out, or set that source.")

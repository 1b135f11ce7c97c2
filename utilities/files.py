"""Write directories and files whole or not at all, whatever happens to the writing process."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

log = logging.getLogger(__name__)

MIB = 2**20


class OutputDirectory:
    """A directory that one run at a time replaces as a whole.

    Beside the target, `.<name>.lock` is held from `open` to `close`; the system releases it if the process dies.
    `.<name>.partial` has temporary files; while the result is written, the new directory and, between two renames, the old one.

    Args:
        path: The target; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()  # a link stays a link
        self._scratch = self.path.with_name(f".{self.path.name}.partial")
        self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))

    def open(self) -> None:
        """Lock the directory for this run, and remove the remains of a dead run.

        Raises:
            ValueError: If its parent cannot be written or another run uses the directory.
        """
        check_writable(self.path)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"Argument `output_dir` = {str(self.path)!r} is in use by another run. Wait for it, or choose another "
                "directory."
            ) from error
        self._clear_scratch()

    @property
    def scratch(self) -> Path:
        """Directory for temporary files of the run, which may not exist yet; removed by `publish`, `close` and the next run."""
        return self._scratch

    def publish(self, write: Callable[[Path], None]) -> None:
        """Replace the directory by a new one. After an error the old one is unchanged and nothing else is left.

        Args:
            write: Writes the content into an empty directory.

        Raises:
            OSError: If it cannot be written, as on a full disk; the message names the directory.
        """
        new, old = self._scratch / "new", self._scratch / "old"
        try:
            new.mkdir(parents=True)
            write(new)
            if self.path.exists():
                os.replace(self.path, old)
            put_in_place(new, self.path)
        except (OSError, SafetensorError) as error:  # safetensors raises its own on a full disk
            self._clear_scratch()
            reason = getattr(error, "strerror", None) or error
            raise OSError(
                f"{self.path} could not be written ({reason}); what was there is unchanged. Make room and start the same "
                "command again."
            ) from error
        except BaseException:
            self._clear_scratch()
            raise
        shutil.rmtree(self._scratch)

    def close(self) -> None:
        """Release the directory for other runs, and remove temporary files."""
        if self._lock.is_locked:
            self._clear_scratch()
        self._lock.release()

    def _clear_scratch(self) -> None:
        """Remove a half-written directory; move one that was set aside but not replaced back to its place."""
        old = self._scratch / "old"
        if old.exists() and not self.path.exists():
            os.replace(old, self.path)
            log.warning("A run died while it replaced %s: the earlier directory is back in its place.", self.path)
        shutil.rmtree(self._scratch, ignore_errors=True)  # another process may be removing its own files


def put_in_place(new: Path, path: Path) -> None:
    """Give a finished directory its name."""
    os.replace(new, path)


def check_writable(path: Path) -> None:
    """Make the parent of `path`, and check that files can be written there.

    Raises:
        ValueError: If they cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"Argument `output_dir` = {str(path)!r} cannot be written ({error.strerror}). Choose another directory, or make "
            f"{str(path.parent)!r} writable."
        ) from error


def check_space(directory: Path, needed: int, what: str) -> None:
    """Check that a disk has enough free space.

    Args:
        directory: Directory on that disk, which may not exist yet.
        needed: Number of bytes.
        what: Name of the content, for the error.

    Raises:
        ValueError: If fewer bytes are free.
    """
    found = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(found).free
    if free < needed:
        raise ValueError(
            f"{what} needs {needed / MIB:,.0f} MiB in {str(directory)!r}, but the disk has {free / MIB:,.0f} MiB free. Make "
            "room, or choose another `output_dir`."
        )


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file by renaming, so that a reader finds the old file or the new one, never a part.

    Each process writes a file of its own first: of two that share a name, one could rename what the other has half written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def move_files(source: Path, target: Path) -> None:
    """Move every file of a directory into another one on the same disk, replacing files of the same name."""
    for file in sorted(source.iterdir()):
        os.replace(file, target / file.name)

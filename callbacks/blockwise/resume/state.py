"""PruningState: finished blocks on disk, so that the same command continues a dead run after them.

    fingerprint.json     fingerprint of the run; a run with another one is refused
    00007.safetensors    block 7: its pruned weights, its record, the random state, and a SHA-256 of all of it
    shards/              pruned blocks of a model that is streamed, whose weights are in no other file
    lock                 held while a process uses the directory; the system releases it when the process dies

Files are written under another name, flushed to disk and renamed, so that each is whole or absent. A block takes the space of
its own weights, not of the model's.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from callbacks.blockwise.resume.fingerprint import Fingerprint
from utilities.digest import digest

log = logging.getLogger(__name__)

FINGERPRINT = "fingerprint.json"


class PruningState:
    """The finished blocks of one run in a directory.

    Args:
        directory: Directory of the files; made if it does not exist.
        check: Checks what is kept of a block in another file, given its number and content; raises ValueError.
    """

    def __init__(self, directory: Path, check: Callable[[int, Mapping[str, Any]], None] | None = None) -> None:
        self.directory = directory.expanduser().resolve()
        self.is_open = False
        """Whether the directory is this run's: locked, with its fingerprint."""
        self._lock = FileLock(self.directory / "lock")
        self._check = check

    def open(self, fingerprint: Fingerprint) -> int:
        """Lock the directory for this run and count the blocks that are finished.

        If a file is damaged, a warning names it, and its block and those after it are pruned again.

        Args:
            fingerprint: Fingerprint of this run.

        Returns:
            Number of finished blocks.

        Raises:
            ValueError: If another process uses the directory, it cannot be written, or its blocks belong to a run with
                another fingerprint.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"Another pruning run is using {self.directory}. Wait for it, or give this run another `output_dir` or logger."
            ) from error
        except OSError as error:
            raise ValueError(
                f"Finished blocks cannot be kept in {self.directory} ({error.strerror or error}). Choose another "
                "`output_dir` or logger, or `resume: false`, which keeps nothing."
            ) from error
        for partial in self.directory.glob("*.partial"):
            partial.unlink()
        try:
            self._check_fingerprint(fingerprint)
        except BaseException:
            self.close()
            raise
        self.is_open = True
        return self._verified()

    def write(self, index: int, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        """Keep a finished block.

        Args:
            index: Number of the step over all rounds.
            tensors: Tensors by name.
            content: Values that JSON can hold.

        Raises:
            OSError: If it cannot be written, as on a full disk; blocks that were kept before are unchanged.
        """
        from safetensors.torch import save

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        text = json.dumps(content)
        metadata = {"content": text, "sha256": _checksum(tensors, text)}
        try:
            _write(self._path(index), save(tensors, metadata))
        except OSError as error:
            raise OSError(
                f"Block {index} could not be kept in {self.directory} ({error.strerror or error}). Make room there and start "
                "the same command again: it goes on with this block. `resume: false` keeps nothing."
            ) from error

    def read(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read tensors and content of a finished block.

        Raises:
            ValueError: If the file is damaged.
        """
        from safetensors import safe_open

        path = self._path(index)
        try:
            with safe_open(path, "pt") as file:
                metadata, names = file.metadata(), file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
            whole = metadata["sha256"] == _checksum(tensors, metadata["content"])
            content = json.loads(metadata["content"])
        except Exception as error:  # a damaged file may make the reader raise anything
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}).") from error
        if not whole:
            raise ValueError(f"{path} is damaged: its SHA-256 is another.")
        return tensors, content

    def remove(self) -> None:
        """Delete everything, once the run has ended well.

        The fingerprint goes first: if the deletion is interrupted, the blocks that are left belong to no run.
        """
        (self.directory / FINGERPRINT).unlink(missing_ok=True)
        self.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def close(self) -> None:
        """Release the directory."""
        self._lock.release()
        self.is_open = False

    def _path(self, index: int) -> Path:
        return self.directory / f"{index:05d}.safetensors"

    def _check_fingerprint(self, fingerprint: Fingerprint) -> None:
        path = self.directory / FINGERPRINT
        try:
            known = Fingerprint.from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            known = None if any(self.directory.glob("*.safetensors")) else fingerprint
        except ValueError:
            known = None
        if known is None:
            log.warning("%s is damaged or missing: all blocks are pruned again.", path)
            self._forget(0)
            path.unlink(missing_ok=True)
            known = fingerprint
        if differing := fingerprint.differences(known):
            raise ValueError(
                f"{self.directory} holds an unfinished pruning run that was started differently: {'; '.join(differing)}. Start "
                "it as it was, remove that directory to begin anew, or give this run another `output_dir` or `resume: false`."
            )
        if known != fingerprint or not path.exists():
            self._write_fingerprint(fingerprint)

    def _write_fingerprint(self, fingerprint: Fingerprint) -> None:
        try:
            _write(self.directory / FINGERPRINT, json.dumps(fingerprint.as_json(), indent=2).encode())
        except OSError as error:
            raise OSError(
                f"Finished blocks cannot be kept in {self.directory} ({error.strerror or error}). Make room there and start "
                "the same command again, or give `resume: false`, which keeps nothing."
            ) from error

    def _verified(self) -> int:
        """Count the blocks, from the first on, whose files are whole."""
        count = 0
        while self._path(count).exists():
            try:
                _, content = self.read(count)
                if self._check is not None:
                    self._check(count, content)
            except ValueError as error:
                log.warning("%s Block %d and those after it are pruned again.", error, count)
                break
            count += 1
        self._forget(count)
        return count

    def _forget(self, first: int) -> None:
        for path in self.directory.glob("*.safetensors"):
            if not path.stem.isdigit() or int(path.stem) >= first:
                path.unlink()


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    found = hashlib.sha256(text.encode())
    found.update(digest(sorted(tensors.items())).encode())
    return found.hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, and flush it to the disk."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)

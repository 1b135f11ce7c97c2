"""Tell the failure of a run in one sentence, once for all processes, or with a traceback for whoever asks for it.

python train.py … --debug        or the environment variable D2PRUNE_DEBUG=1
"""

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException

from utilities.command_line import one_line
from utilities.distributed import ProcessFailedError

DEBUG = "D2PRUNE_DEBUG"
EXPLAINED = (MisconfigurationException, ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError)
"""Errors whose message says what to do. Others are defects, for which the traceback is more useful."""
FAILED = "failed"
"""Key of the number of processes that have failed."""
PATIENCE = timedelta(seconds=30)
"""Time for which the first process keeps its store for others that fail, and for which others wait for that store."""


@contextmanager
def failures_in_one_sentence() -> Iterator[None]:
    """Print an error of the block as one sentence on stderr and exit with 1; with `--debug` let it pass.

    `--debug` is taken off the command line, and handed on to processes that this one starts.
    """
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        os.environ[DEBUG] = "1"
    try:
        yield
    except EXPLAINED as error:
        if os.environ.get(DEBUG):
            raise
        message = one_line(str(error)) or type(error).__name__
        told_by_another = isinstance(error, ProcessFailedError)
        if _is_first_to_say(message) and not told_by_another:
            print(f"error: {message} (`--debug` shows where.)", file=sys.stderr, flush=True)
        _wait_for_others()
        sys.exit(1)


def _is_first_to_say(message: str) -> bool:
    """Return whether no other process of this run has printed a message.

    Connected processes ask the store of the first one. Before they are connected, all read the same files and settings, so one
    process of each machine speaks for all.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return int(os.environ.get("LOCAL_RANK", 0)) == 0
    key = f"said:{hashlib.sha256(message.encode()).hexdigest()}"
    with suppress(Exception):  # the first process may be gone with its store; a message twice is better than none
        store = _store()
        first = store.add(key, 1) == 1
        store.add(FAILED, 1)
        return first
    return True


def _wait_for_others() -> None:
    """Keep the store of the first process until all have failed; without it each would print the message."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() > 0:
        return
    with suppress(Exception):
        store, end = _store(), time.monotonic() + PATIENCE.total_seconds()
        while store.add(FAILED, 0) < dist.get_world_size() and time.monotonic() < end:
            time.sleep(0.05)


def _store() -> dist.TCPStore:
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=PATIENCE)

"""Report on a run: versions and hardware, TensorBoard scalars, one table on the terminal."""

import os
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from utilities.digest import source_digest

GIB = 2**30


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, the digest of this project's sources, and hardware, which every reported number depends on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {name: version(name) for name in ("lightning", "transformers")},
        "sources": source_digest(),
        "hardware": gpu or f"{os.cpu_count()} CPU cores ({platform.machine()})",
    }


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory in GiB: allocated on the GPU since the last reset, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def python_command() -> str:
    """Return this interpreter as a user in the working directory would type it."""
    return shown_path(Path(sys.executable))


def shown_path(path: Path) -> str:
    """Return a path as a user in the working directory would type it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def log_scalars(loggers: list[Any], values: dict[str, float], step: int) -> None:
    """Log to each of Lightning's loggers at a given step, since the trainer's step stays at 0 under manual optimisation.

    Args:
        loggers: Loggers of the trainer.
        values: Tag -> value.
        step: Step to log at.
    """
    for logger in loggers:
        logger.log_metrics(values, step=step)


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Print a table without borders, as wide as its longest row, so that its commands can be copied whole."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.width = max(console.width, sum(max(map(len, column)) for column in zip(*rows, strict=True)) + 4)
    console.print()
    console.print(table, soft_wrap=True)

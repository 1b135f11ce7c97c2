"""What a pruning run leaves for its reader: pruning.json, TensorBoard scalars by block, one table at the end."""

import json
import os
import platform
import resource
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from rich.console import Console
from rich.table import Table
from typing_extensions import Self

GIB = 2**30


@dataclass
class LinearRecord:
    """One pruned linear. Error and norm: Σ ‖(W − Ŵ) x‖² and Σ ‖W x‖² over the calibration tokens."""

    method: str
    error: float
    norm: float
    zeros: int
    weights: int
    damping: float | None

    @property
    def relative_error(self) -> float:
        return self.error / self.norm if self.norm else 0.0

    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights


@dataclass
class BlockRecord:
    """One pruned block; times in seconds, memory in GiB."""

    name: str
    seconds_statistics: float = 0.0
    seconds_solve: float = 0.0
    peak_memory_gib: float = 0.0
    linears: dict[str, LinearRecord] = field(default_factory=dict)
    seconds_rule: float = 0.0
    choice: str | None = None
    """What the update rule gave q, k and v."""
    update_shares: dict[str, float] = field(default_factory=dict)
    """Role -> share of the weight update that the projection took."""
    candidates: list[dict[str, Any]] = field(default_factory=list)
    outlier_ratios: dict[str, float] = field(default_factory=dict)
    attention: dict[str, float] = field(default_factory=dict)
    """Measures of the attention against the dense model's, from AttentionProbe."""
    allocation: dict[str, float] = field(default_factory=dict)
    """The share of zeros that the block was given, and what it was read off; empty where all blocks have the same."""

    @property
    def seconds(self) -> float:
        return self.seconds_statistics + self.seconds_solve + self.seconds_rule

    @property
    def relative_error(self) -> float:
        """Mean over the linears; a sum would show little but those few whose outputs are huge."""
        errors = [linear.relative_error for linear in self.linears.values()]
        return sum(errors) / len(errors) if errors else 0.0

    @property
    def sparsity(self) -> float:
        return sparsity_of([self])

    def scalars(self) -> dict[str, float]:
        """TensorBoard tags and values."""
        values = {
            "block/relative_error": self.relative_error,
            "block/sparsity": self.sparsity,
            "block/seconds_statistics": self.seconds_statistics,
            "block/seconds_solve": self.seconds_solve,
            "block/peak_memory_gib": self.peak_memory_gib,
        }
        for name, linear in self.linears.items():
            values[f"relative_error/{name}"] = linear.relative_error
            values[f"sparsity/{name}"] = linear.sparsity
            if linear.damping is not None:
                values[f"damping/{name}"] = linear.damping
        values |= {f"attention/{name}": value for name, value in self.attention.items()}
        values |= {f"allocation/{name}": value for name, value in self.allocation.items()}
        values |= {f"update_share/{role}": share for role, share in self.update_shares.items()}
        values |= {f"outlier_ratio/{role}": ratio for role, ratio in self.outlier_ratios.items()}
        if self.attention:
            values["block/seconds_rule"] = self.seconds_rule
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From `dataclasses.asdict` of a record."""
        return cls(**values | {"linears": {name: LinearRecord(**linear) for name, linear in values["linears"].items()}})

    def as_json(self) -> dict[str, Any]:
        linears = {
            name: asdict(linear) | {"relative_error": linear.relative_error, "sparsity": linear.sparsity}
            for name, linear in self.linears.items()
        }
        derived = {"relative_error": self.relative_error, "sparsity": self.sparsity, "seconds": self.seconds}
        return asdict(self) | derived | {"linears": linears}


def sparsity_of(records: list[BlockRecord]) -> float:
    """Share of zeros over all pruned linears."""
    linears = [linear for record in records for linear in record.linears.values()]
    weights = sum(linear.weights for linear in linears)
    return sum(linear.zeros for linear in linears) / weights if weights else 0.0


def peak_memory_gib(device: torch.device) -> float:
    """Most memory so far: allocated on the GPU since the last reset, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, to stand beside every number."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {name: version(name) for name in ("lightning", "transformers")},
        "hardware": gpu or f"{os.cpu_count()} CPU cores ({platform.machine()})",
    }


def python_command() -> str:
    """This interpreter as a user in the working directory would type it."""
    executable = Path(sys.executable)
    return str(executable.relative_to(Path.cwd()) if executable.is_relative_to(Path.cwd()) else executable)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Written beside its target and renamed: a reader finds the old file or the new one, never a part."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(partial, path)


def log_scalars(loggers: list[Logger], values: dict[str, float], step: int) -> None:
    """To every logger, at a step of our own: with manual optimization the trainer's would stay at 0."""
    for logger in loggers:
        logger.log_metrics(values, step=step)


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """One table on the terminal, without borders and as wide as its longest row: commands in it can be copied whole."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.width = max(console.width, sum(max(map(len, column)) for column in zip(*rows, strict=True)) + 4)
    console.print()
    console.print(table, soft_wrap=True)

"""Fingerprint of a pruning run: all that its result depends on, by name, as short texts. Two that differ are two runs."""

import platform
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from callbacks.blockwise.processes import Processes
from callbacks.blockwise.settings import PruningSettings
from lightning_modules.base.prunable import PrunableModule
from utilities.digest import digest

PACKAGES = ("torch", "lightning", "transformers", "timm", "d2prune")


def digests_of(trainer: Trainer, processes: Processes, rule_batches: Iterable[Any]) -> dict[str, str]:
    """What is read: the calibration data, of which each process reads its own share, and what the update rule has beside it."""
    return {
        "calibration": " ".join(processes.gather(digest_of_batches(trainer.train_dataloader))),
        "rule_source": processes.from_first(digest_of_batches(rule_batches)),
    }


def circumstances_of(
    module: PrunableModule, settings: PruningSettings, trainer: Trainer, processes: Processes
) -> dict[str, str]:
    """Settings, processes, device and versions."""
    found = {f"settings.{name}": repr(value) for name, value in asdict(settings).items()}
    found |= {f"version.{name}": _version(name) for name in PACKAGES} | {"version.python": platform.python_version()}
    device = torch.cuda.get_device_name(module.device) if module.device.type == "cuda" else module.device.type
    return found | {"processes": str(processes.size), "device": device, "precision": str(trainer.precision)}


def digest_of_batches(batches: Iterable[Any]) -> str:
    """Digest of all tensors of all batches, in order."""

    def tensors():
        for number, batch in enumerate(batches):
            found: list[Tensor] = []
            apply_to_collection(batch, Tensor, found.append)
            yield from ((f"{number}.{position}", tensor) for position, tensor in enumerate(found))

    return digest(tensors())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"

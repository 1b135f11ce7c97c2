"""Fingerprint of a pruning run: everything that its result depends on, by name. Only a run with the same one is continued.

`binding` entries have to be equal. `described` entries are the settings as the user gave them; they explain why a digest
differs but need not be equal themselves, since the same text may lie under another path.
"""

import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from typing_extensions import Self

from callbacks.blockwise.settings import PruningSettings
from lightning_modules.base.prunable import PrunableModule
from utilities.contract import data_of
from utilities.digest import digest, source_digests
from utilities.distributed import Processes

PACKAGES = ("torch", "lightning", "transformers", "timm", "d2prune")
EXPLAINED_BY = {
    "model": ("model.", "the weights"),
    "tokenizer": ("model.", "the tokenizer"),
    "calibration": ("data.", "the calibration data"),
    "rule source": ("data.", "the windows of the update rule"),
}
"""Digest -> prefix of the settings that it follows from, and a name for its content."""


@dataclass(frozen=True)
class Fingerprint:
    """Entries by name, as short texts."""

    binding: dict[str, str]
    described: dict[str, str]

    def as_json(self) -> dict[str, dict[str, str]]:
        """Return the content for a file."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """Make a fingerprint from the content of a file.

        Raises:
            ValueError: If it is not what `as_json` returns.
        """
        parts = [content.get(name) for name in ("binding", "described")] if isinstance(content, dict) else [None]
        if not all(isinstance(part, dict) and all(isinstance(value, str) for value in part.values()) for part in parts):
            raise ValueError("This is not the fingerprint of a pruning run.")
        return cls(*parts)

    def differences(self, other: Self) -> list[str]:
        """Describe the differences from the fingerprint `other` in words; there are none if the runs are the same."""
        names = [name for name in sorted(self.binding.keys() | other.binding.keys()) if self._differs(other, name)]
        found = []
        for name in names:
            before, now = other.binding.get(name), self.binding.get(name)
            if name.startswith("source "):
                found.append(f"the code of {name.removeprefix('source ')} has changed")
            elif name in EXPLAINED_BY:
                found += self._why(other, name)
            else:
                found.append(f"`{name}` was {before or 'absent'} and is {now or 'absent'}")
        return list(dict.fromkeys(found))

    def _differs(self, other: Self, name: str) -> bool:
        return self.binding.get(name) != other.binding.get(name)

    def _why(self, other: Self, name: str) -> list[str]:
        """Name the settings that explain a different digest, or say that there are none."""
        prefix, what = EXPLAINED_BY[name]
        settings = sorted(key for key in self.described.keys() | other.described.keys() if key.startswith(prefix))
        changed = [key for key in settings if self.described.get(key) != other.described.get(key)]
        if changed:
            return [f"`{key}` was {other.described.get(key)} and is {self.described.get(key)}" for key in changed]
        return [f"{what} changed although the settings are the same: a file has other content"]


def fingerprint_of(
    trainer: Trainer, module: PrunableModule, settings: PruningSettings, processes: Processes, rule_batches: Iterable[Any]
) -> Fingerprint:
    """Fingerprint of this run; the same in all processes, each of which digests its own calibration data.

    Args:
        trainer: Trainer of the run.
        module: The module, still dense.
        settings: Settings of the run.
        processes: Processes of the run.
        rule_batches: Windows that the update rule looks at beside the calibration data; in the first process.
    """
    device = torch.cuda.get_device_name(module.device) if module.device.type == "cuda" else module.device.type
    binding = dict(flattened(settings.as_dict()))
    binding |= {f"version of {name}": _version(name) for name in PACKAGES} | {"version of python": platform.python_version()}
    binding |= {"number of processes": str(processes.size), "device": device, "trainer.precision": str(trainer.precision)}
    binding |= {f"source {path}": value for path, value in source_digests().items()}
    binding |= processes.first_of(module.identity)
    binding["calibration"] = digest_of_texts(processes.gather(digest_of_batches(trainer.train_dataloader)))
    binding["rule source"] = processes.from_first(digest_of_batches(rule_batches))
    described = {f"model.{name}": repr(value) for name, value in module.described().items()}
    described |= {f"data.{name}": repr(value) for name, value in data_of(trainer).facts().settings.items()}
    return Fingerprint(binding, described)


def flattened(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield name and value of each setting, named as on a command line: `score.lambda1`, `update_rule.candidates`."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from flattened(value, prefix if name == "init_args" else f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}".removesuffix(".class_path"), repr(value)


def digest_of_batches(batches: Iterable[Any]) -> str:
    """Return the digest of all tensors of all batches, in order."""

    def tensors():
        for number, batch in enumerate(batches):
            found: list[Tensor] = []
            apply_to_collection(batch, Tensor, found.append)
            yield from ((f"{number}.{position}", tensor) for position, tensor in enumerate(found))

    return digest(tensors())


def digest_of_texts(texts: Iterable[str]) -> str:
    """Return the digest of texts, in order."""
    return digest((text, torch.empty(0)) for text in texts)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"

"""Data modules, each imported on first use, so that `import datamodules` loads no framework."""

from importlib import import_module
from typing import Any

_MODULES = {
    "GraphDataModule": "datamodules.graphs",
    "ImageDataModule": "datamodules.images",
    "TextDataModule": "datamodules.text",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'datamodules' has no attribute {name!r}; it has {', '.join(sorted(_MODULES))}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(_MODULES)

"""When something happens: callbacks of a Trainer."""

from importlib import import_module

_HOME = {"BlockProgressBar": "progress", "BlockwisePruning": "blockwise_pruning"}
__all__ = ["BlockProgressBar", "BlockwisePruning"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

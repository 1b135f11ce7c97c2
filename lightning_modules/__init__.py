"""What is run: LightningModules. Each is imported on first use, so that a graph run never loads a language model library."""

from importlib import import_module

_HOME = {"CausalLM": "causal_lm", "ImageClassifier": "image_classifier", "PrunableModule": "prunable"}
__all__ = ["CausalLM", "ImageClassifier", "PrunableModule"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

"""What is run: LightningModules. Each is imported on first use, so that a graph run never loads a language model library."""

from importlib import import_module

_HOME = {
    "CSG2L": "csg2l",
    "CausalLM": "causal_lm",
    "DGI": "graph_baselines",
    "GRACE": "graph_baselines",
    "ImageClassifier": "image_classifier",
    "NodeClassifier": "graph_baselines",
    "PrunableModule": "base.prunable",
}
__all__ = ["CSG2L", "DGI", "GRACE", "CausalLM", "ImageClassifier", "NodeClassifier", "PrunableModule"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

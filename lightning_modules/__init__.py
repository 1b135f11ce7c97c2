"""What is run: LightningModules, and the choices that their settings are made of.

Each is imported on first use, so that a graph run never loads a language model library.
"""

from importlib import import_module

_HOME = {
    "CSG2L": "csg2l",
    "CausalLM": "causal_lm",
    "ClusteredLabels": "parts.csg2l_settings",
    "Contrast": "parts.csg2l_settings",
    "DGI": "graph_baselines",
    "DropView": "parts.csg2l_views",
    "EdgesView": "parts.csg2l_views",
    "GRACE": "graph_baselines",
    "ImageClassifier": "image_classifier",
    "KnnView": "parts.csg2l_views",
    "MlpView": "parts.csg2l_views",
    "NodeClassifier": "graph_baselines",
    "PredictedLabels": "parts.csg2l_settings",
    "PrunableModule": "base.prunable",
    "PurifiedView": "parts.csg2l_views",
    "SvdView": "parts.csg2l_views",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

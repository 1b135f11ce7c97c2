"""When something happens: callbacks of a Trainer."""

from importlib import import_module

_HOME = {
    "AttentionImages": "attention_images",
    "BlockProgressBar": "blockwise.progress",
    "BlockwisePruning": "blockwise_pruning",
    "EvaluateTasks": "evaluate_tasks",
    "ExportOnnx": "export_onnx",
    "GraphMonitor": "graph_monitor",
    "KeepSparsity": "keep_sparsity",
    "LoRA": "lora",
    "SaveModel": "save_model",
}
__all__ = [
    "AttentionImages",
    "BlockProgressBar",
    "BlockwisePruning",
    "EvaluateTasks",
    "ExportOnnx",
    "GraphMonitor",
    "KeepSparsity",
    "LoRA",
    "SaveModel",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

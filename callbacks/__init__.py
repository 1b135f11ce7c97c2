"""Callbacks of a Trainer, each imported on first use: what a config names, and the choices that their settings are made of."""

from importlib import import_module

_HOME = {
    "AdmmSolver": "blockwise.solvers",
    "JointSolver": "blockwise.solvers",
    "AttentionImages": "attention_images",
    "AttentionRule": "blockwise.update_rules",
    "AverageWeights": "average_weights",
    "BlockProgressBar": "blockwise.progress",
    "BlockwisePruning": "blockwise_pruning",
    "DepthAllocation": "blockwise.allocations",
    "Diagnostics": "blockwise.run",
    "ErrorAllocation": "blockwise.allocations",
    "DropExperts": "drop_experts",
    "EvaluateTasks": "evaluate_tasks",
    "ExportOnnx": "export_onnx",
    "FixedRule": "blockwise.update_rules",
    "GraphMonitor": "graph_monitor",
    "KeepSparsity": "keep_sparsity",
    "LoRA": "lora",
    "ObsSolver": "blockwise.solvers",
    "OutlierRule": "blockwise.update_rules",
    "OwlAllocation": "blockwise.allocations",
    "PerplexityRule": "blockwise.update_rules",
    "SaveModel": "save_model",
    "Score": "blockwise.settings",
    "UniformAllocation": "blockwise.allocations",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

"""Base of the graph modules whose encoder propagates by views: what these make of the graph, and their operators."""

from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from lightning_modules.base.node import NodeModule
from lightning_modules.parts.csg2l_views import LocalView, View
from lightning_modules.parts.graph_operators import GlobalOperator


class ViewedModule(NodeModule):
    """A module with views, by the prefix of their buffers; subclasses say which.

    Args:
        learning_rate: Learning rate of Adam.
        weight_decay: L2 penalty of Adam, on all parameters.
    """

    def __init__(self, learning_rate: float, weight_decay: float) -> None:
        super().__init__(learning_rate, weight_decay)
        self._operators: dict[str, tuple[Tensor, GlobalOperator]] = {}

    @property
    def _views(self) -> dict[str, View | LocalView]:
        """Views by the prefix of their buffers."""
        return {}

    def register_views(self, data: Data) -> None:
        """Keep what the views make of the whole graph as buffers: moved, saved and resumed with the module."""
        for prefix, view in self._views.items():
            for name, value in view.buffers(data).items():
                self.register_buffer(prefix + name, value)

    def operator(self, batch: Data, prefix: str = "") -> GlobalOperator | None:
        """Return the propagation of the global view, or with prefix local_ of the local one, on a batch.

        It is kept for the next step on the same graph. None for a local view by the encoder's own layers.
        """
        known = self._operators.get(prefix)
        if known is None or known[0] is not batch.edge_index:
            view = self._views[prefix]
            names = [name for name, _ in self.named_buffers(recurse=False) if name.startswith(prefix)]
            buffers = {name.removeprefix(prefix): getattr(self, name) for name in names}
            with torch.inference_mode(False):  # training uses what validation may have made
                operator = view.operator(batch, buffers)
            if operator is None:
                return self.local_operator(batch)
            known = self._operators[prefix] = batch.edge_index, operator
        return known[1]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Forget the operators, since other factors are loaded next."""
        super().on_load_checkpoint(checkpoint)
        self._operators.clear()

"""Graph: the form that every source gives its graph: nodes, edges, labels and the splits that come with them.

Legend: N nodes, E directed edges (each undirected edge twice), F features.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch_geometric.utils import remove_self_loops, to_undirected

Masks = tuple[Tensor, Tensor | None, Tensor | None]
"""Training, validation and test nodes, each (N,) or (N, folds); None where the data set has none."""


@dataclass
class Graph:
    """A graph as its source has it, and the splits that come with it."""

    name: str
    x: Tensor
    """(N, F) float32"""
    edge_index: Tensor
    """(2, E), made undirected, coalesced, without self-loops"""
    y: Tensor
    """(N,) long"""
    classes: list[str] | None = None
    bag_of_words: bool = False
    """Whether rows of `x` are counts or indicators of words, which may be divided by their sum."""
    public: dict[int | None, Masks] = field(default_factory=dict)
    """Its own splits by labels a class, or under None."""
    geom_gcn: Masks | None = None
    unlabelled: Tensor | None = None
    """(N,) nodes whose entry of `y` only fills a gap"""

    def __post_init__(self) -> None:
        self.edge_index = to_undirected(remove_self_loops(self.edge_index)[0].long(), num_nodes=len(self.y))
        self.x, self.y = self.x.float(), self.y.long()

    @property
    def num_classes(self) -> int:
        """One more than the largest label."""
        return int(self.y.max()) + 1

    def class_name(self, label: int) -> str:
        """Name a class in messages."""
        return f"{label} ({self.classes[label]})" if self.classes and self.classes[label] != str(label) else str(label)


def as_mask(indices: Tensor | np.ndarray, size: int) -> Tensor:
    """Make a mask (size,) that is True at some positions."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.as_tensor(indices).long()] = True
    return mask

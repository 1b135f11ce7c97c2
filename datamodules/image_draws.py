"""Draws of images by class: calibration and held-out images, as evenly over the classes as possible."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import torch


class Pool:
    """Positions of images, shuffled within each class, from which parts are drawn without return.

    Positions are taken in turn, one of each class a round: the numbers of any two classes differ by at most one until a class
    is exhausted. Drawing from both ends keeps two parts independent of one another's size as long as classes have enough
    images.
    """

    def __init__(self, labels: Sequence[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        by_class: dict[int, list[int]] = {label: [] for label in sorted(set(labels))}
        for position, label in enumerate(labels):
            by_class[label].append(position)
        queues = [_shuffled(positions, generator) for positions in by_class.values()]
        self._queues = {end: list(_shuffled(queues, generator)) for end in ("first", "last")}

    def take(self, count: int, end: Literal["first", "last"], accept: Callable[[int], bool] = lambda _: True) -> list[int]:
        """Draw positions, fewer if there are no more; one not accepted is replaced by the next of its class."""
        taken: list[int] = []
        queues = self._queues[end]
        while len(taken) < count and any(queues):
            for queue in queues:
                while queue and len(taken) < count:
                    position = queue.popleft() if end == "first" else queue.pop()
                    if accept(position):
                        taken.append(position)
                        break
        return taken


def _shuffled(items: Sequence, generator: torch.Generator) -> deque:
    return deque(items[index] for index in torch.randperm(len(items), generator=generator).tolist())

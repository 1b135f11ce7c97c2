"""Draws of images by class: calibration and held-out images, as evenly over the classes as possible."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import torch


class Pool:
    """Positions of images, shuffled within each class; parts are drawn from them without replacement.

    Each round takes one position of each class. The numbers of any two classes differ by at most one, until a class is used
    up. One part is drawn from the front and one from the end, so that neither depends on the size of the other as long as
    every class has enough images.
    """

    def __init__(self, labels: Sequence[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        by_class: dict[int, list[int]] = {label: [] for label in sorted(set(labels))}
        for position, label in enumerate(labels):
            by_class[label].append(position)
        queues = [_shuffled(positions, generator) for positions in by_class.values()]
        self._queues = {end: list(_shuffled(queues, generator)) for end in ("first", "last")}

    def take(self, count: int, end: Literal["first", "last"], accept: Callable[[int], bool] = lambda _: True) -> list[int]:
        """Draw positions, or fewer when none are left. One that is not accepted is replaced by the next of its class.

        Args:
            count: Number of positions.
            end: Whether to draw from the front of each class or from its end.
            accept: Tells whether a position can be used.
        """
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

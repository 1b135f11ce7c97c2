"""HeldRuns: D²Prune's perplexity rule (Algorithm 1): prune once with each of q, k, v held, keep the best run's weights.

"Best" is the lowest loss on held-out calibration windows; the paper does not say on which text it measures, and the test text
would be cheating. Copies of the dense and of the best weights live in CPU memory, so that the model never has to be pruned a
fourth time.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from callbacks.blockwise.records import BlockRecord
from callbacks.blockwise.settings import Plan
from callbacks.blockwise.update_rules.rules import ROLES
from lightning_modules.base.prunable import PrunableModule


@dataclass
class Run:
    """One run: what it held, its metrics, its record of every block, and its weights by full name, on the CPU."""

    held: str
    metrics: dict[str, float]
    records: list[BlockRecord]
    weights: dict[str, Tensor] = field(repr=False)


class HeldRuns:
    """Runs with one projection held each.

    Args:
        module: The model, still dense.
        plan: Names the linears that are pruned.
    """

    held = ROLES

    @property
    def judge(self) -> str:
        """The metric that is minimised."""
        return self._module.judge

    def __init__(self, module: PrunableModule, plan: Plan) -> None:
        self._module, self._plan = module, plan
        self._dense = self._copy()
        self.best: Run | None = None
        self.metrics: dict[str, dict[str, float]] = {}

    def restart(self) -> None:
        """Put the dense weights back."""
        self._write(self._dense)

    def add(self, held: str, metrics: dict[str, float], records: list[BlockRecord]) -> None:
        """Judge the run that the model holds now; its weights are kept if no earlier run was better."""
        self.metrics[held] = metrics
        if self.best is None or self._loss(metrics) < self._loss(self.best.metrics):
            self.best = Run(held, metrics, records, self._copy())

    def finish(self) -> Run:
        """Write the best run's weights into the model, bit by bit, and give the copies back.

        Raises:
            RuntimeError: If no run had a finite loss.
        """
        best, self.best = self.best, None
        if best is None or self._loss(best.metrics) == math.inf:
            raise RuntimeError(
                f"None of the runs with {', '.join(self.metrics)} held had a finite {self.judge}: {self.metrics}."
            )
        self._write(best.weights)
        self._dense = {}
        return best

    def _weights(self) -> dict[str, Tensor]:
        blocks = self._module.blocks
        return {
            f"{block}.{name}": linear.weight
            for block, names in self._plan.items()
            for name, linear in self._module.linears(blocks[block]).items()
            if name in names
        }

    def _copy(self) -> dict[str, Tensor]:
        return {name: weight.to("cpu", copy=True) for name, weight in self._weights().items()}

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, weight in self._weights().items():
            weight.copy_(values[name])

    def _loss(self, metrics: dict[str, float]) -> float:
        loss = metrics[self.judge]
        return loss if math.isfinite(loss) else math.inf

"""PerplexityRule: prune once with each of q, k and v held, and keep the round with the lowest held-out loss (Algorithm 1).

The paper does not say on which text it measures. The test text would be cheating, so held-out data decide. Copies of the dense
and of the best weights wait in CPU memory, so that the model does not have to be pruned a fourth time.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from callbacks.blockwise.records import BlockRecord
from callbacks.blockwise.update_rules.base import UpdateRule
from lightning_modules.parts.architectures import PrunableLinear


class PerplexityRule(UpdateRule):
    """Prune with each of q, k and v held in every block, and keep the round with the lowest loss on held-out data."""

    short = "perplexity"

    @override
    def rounds(self, roles: list[str]) -> list[str | None]:
        return list(roles)

    @override
    def holds(self, linears: Mapping[str, PrunableLinear], round_held: str | None) -> tuple[str, ...]:
        return (round_held,) if round_held in linears else ()


@dataclass
class Round:
    """One round over all blocks.

    Attributes:
        held: Projection that it held.
        metrics: Metrics of the pruned model.
        records: Records of the blocks.
        weights: Full name -> pruned weight, on the CPU.
    """

    held: str
    metrics: dict[str, float]
    records: list[BlockRecord]
    weights: dict[str, Tensor] = field(repr=False)


class Rounds:
    """Rounds of the perplexity rule: restores the dense weights before each, and those of the best round at the end.

    Args:
        linears: Full name -> every pruned linear of the model, still dense. Their weights are looked up at each use, since a
            block that moves to host memory and back has new ones.
        judge: Name of the metric to minimise.
    """

    def __init__(self, linears: Mapping[str, PrunableLinear], judge: str) -> None:
        self.judge = judge
        self.metrics: dict[str, dict[str, float]] = {}
        self._linears = dict(linears)
        self._dense = self._copy()
        self._best: Round | None = None

    def restart(self) -> None:
        """Put the dense weights back."""
        self._write(self._dense)

    def add(self, held: str, metrics: dict[str, float], records: list[BlockRecord]) -> None:
        """Compare the round whose weights the model has now, and copy them if no earlier round was better.

        Args:
            held: Projection that it held.
            metrics: Metrics of the pruned model.
            records: Records of the blocks.
        """
        self.metrics[held] = metrics
        if self._best is None or self._loss(metrics) < self._loss(self._best.metrics):
            self._best = Round(held, metrics, records, self._copy())

    def finish(self) -> Round:
        """Write the best round's weights into the model, bit for bit, and free all copies.

        Returns:
            The best round.

        Raises:
            RuntimeError: If no round had a finite loss.
        """
        best, self._best = self._best, None
        if best is None or self._loss(best.metrics) == math.inf:
            raise RuntimeError(
                f"No round with {', '.join(self.metrics)} held had a finite {self.judge}: {self.metrics}. "
                "Lower the sparsity, or look at the held-out data."
            )
        self._write(best.weights)
        self._dense = {}
        return best

    def _copy(self) -> dict[str, Tensor]:
        return {name: linear.weight.to("cpu", copy=True) for name, linear in self._linears.items()}

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, linear in self._linears.items():
            linear.assign(values[name])

    def _loss(self, metrics: dict[str, float]) -> float:
        loss = metrics[self.judge]
        return loss if math.isfinite(loss) else math.inf

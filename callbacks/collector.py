"""StatisticsCollector: hooks on the linears of one block that add up their calibration statistics.

Linears that are given the very same tensor (q/k/v, gate/up) share one InputStatistics, so its Gram matrix is computed once.
Who shares is seen in the first batch and checked in all others.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from functional.pruning import InputStatistics, OutputStatistics
from lightning_modules.architectures import PrunableLinear


class StatisticsCollector:
    """Statistics of the inputs and outputs of some linears of one block.

    Args:
        linears: The linears by name.
    """

    def __init__(self, linears: Mapping[str, PrunableLinear]) -> None:
        self.linears = dict(linears)
        self._modules: dict[nn.Linear, list[str]] = {}
        for name, linear in self.linears.items():
            self._modules.setdefault(linear.module, []).append(name)
        self.outputs = {name: OutputStatistics(linear.out_features) for name, linear in self.linears.items()}
        self._leaders: dict[str, str] = {}
        self._inputs: dict[str, InputStatistics] = {}

    def inputs(self, name: str) -> InputStatistics:
        """Statistics of what a linear reads.

        Raises:
            RuntimeError: If the linear was never called.
        """
        if name not in self._leaders:
            raise RuntimeError(f"The linear {name!r} was never called while calibrating, so it cannot be pruned.")
        return self._inputs[self._leaders[name]]

    def groups(self) -> dict[str, list[str]]:
        """Linears that read the same tensor, by the name of the first of them."""
        found: dict[str, list[str]] = {}
        for name, leader in self._leaders.items():
            found.setdefault(leader, []).append(name)
        return found

    @contextmanager
    def collecting(self, positions: Tensor) -> Iterator[None]:
        """While open, every call of a linear adds to its statistics.

        Args:
            positions: Positions of the samples of this batch in the calibration set, (samples,).

        Raises:
            RuntimeError: If a linear is called twice in one batch, or shares its input in one batch and not in another.
        """
        seen: dict[str, Tensor] = {}

        def add(name: str, x: Tensor, y: Tensor) -> None:
            if name in seen:
                raise RuntimeError(f"The linear {name!r} is called more than once a forward pass; it cannot be pruned.")
            leader = next((other for other, tensor in seen.items() if tensor is x), name)
            seen[name] = x
            if self._leaders.setdefault(name, leader) != leader:
                raise RuntimeError(f"The linear {name!r} shares its input with others in some batches only.")
            if leader == name:
                inputs = self._inputs.setdefault(name, InputStatistics(x.shape[-1]))
                inputs.update(_by_sample(x, positions), positions)
            self.outputs[name].update(_by_sample(y, positions), positions)

        def hook(module: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
            for name in self._modules[module]:
                add(name, args[0], output[..., self.linears[name].rows])

        handles = [module.register_forward_hook(hook) for module in self._modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _by_sample(x: Tensor, positions: Tensor) -> Tensor:
    """(samples, tokens, features), also from (samples · tokens, features), the form that OPT gives its MLP."""
    return x.reshape(len(positions), -1, x.shape[-1])

"""StatisticsCollector: hooks on the linears of one block that collect their calibration statistics.

Linears that read the very same tensor (q/k/v, gate/up) are siblings and share one InputStatistics, so the Gram matrix is
computed once. The first batch shows which linears are siblings; later batches are checked against it. NaN, Inf and numbers that
are too large are looked for once a block, in the peaks that the statistics keep of each batch, so that no batch waits for the
GPU.

Sums are of products of two features of a token, so class tokens that are scaled by √w count w times, also in the error and
norm of a result. Numbers of tokens, and tokens_per_sample with them, count each once: a factor common to all weights then
scales S_W, ŷ x̂ and x̂² alike, and λ1 and λ2 mean what they mean without weights. So dividing by the mean weight would change the
unit of error and norm only; damping is relative.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from functional.pruning import InputStatistics, OutputStatistics, derived_outputs
from functional.pruning.batches import LARGEST, too_large, weighted_class_tokens
from functional.pruning.perturbation import Perturbation
from functional.pruning.precision import Precision
from lightning_modules.parts.architectures import PrunableLinear
from lightning_modules.parts.experts import Routing

ERROR_TOKENS = 4096
"""Least number of tokens that measure the error of a linear without a weight update; also at least two per input channel."""


class StatisticsCollector:
    """Statistics of the inputs and outputs of some linears of one block.

    Args:
        linears: Name -> linear.
        precision: Precision of Gram matrices.
        updates: Whether weights will be updated. If not, the Gram matrix only measures errors, and the first samples, with
            about `ERROR_TOKENS` tokens, are enough.
        perturbed: Linear, the first of its siblings -> its outputs if it adds them to hidden states, or 0; for linears whose
            perturbation is measured as well.
        class_tokens: Number of leading tokens of a sample that are class tokens.
        class_token_weight: How many times a class token counts in all sums.
        inputs_only: Whether the linears, which all read the same tensor, need not run: nothing is measured of their outputs.
    """

    def __init__(
        self,
        linears: Mapping[str, PrunableLinear],
        precision: Precision = "auto",
        updates: bool = True,
        perturbed: Mapping[str, int] | None = None,
        class_tokens: int = 0,
        class_token_weight: float = 1.0,
        inputs_only: bool = False,
    ) -> None:
        self.linears = dict(linears)
        self.inputs_only = inputs_only
        self._precision, self._updates = precision, updates
        self._class_tokens = class_tokens, class_token_weight
        self._modules: dict[nn.Module, list[str]] = {}
        for name, linear in self.linears.items():
            self._modules.setdefault(linear.module, []).append(name)
        measured = {} if inputs_only else self.linears
        self.outputs = {name: OutputStatistics(linear.out_features) for name, linear in measured.items()}
        """Linear -> statistics of its outputs, where they are measured."""
        self.perturbations = {
            name: Perturbation(self.linears[name].in_features, channels, precision)
            for name, channels in (perturbed or {}).items()
        }
        """Leader -> its perturbation."""
        self._leaders: dict[str, str] = {}
        self._inputs: dict[str, InputStatistics] = {}
        self._positions: list[Tensor] = []
        """Positions of the samples of each batch."""
        self._called: dict[str, list[int]] = {name: [] for name in self.linears}
        """Batches in which each linear was called."""
        self._checked = False

    def inputs(self, name: str) -> InputStatistics:
        """Return the statistics of the inputs of a linear.

        Raises:
            RuntimeError: If the linear was never called.
        """
        return self._inputs[self.leader(name)]

    def outputs_of(self, name: str) -> OutputStatistics:
        """Return the statistics of the outputs of a linear, derived from those of its inputs if they were not measured."""
        if name in self.outputs:
            return self.outputs[name]
        return derived_outputs(self.linears[name].weight, self.inputs(name))

    def leader(self, name: str) -> str:
        """Return the first of the siblings of a linear, itself included.

        Raises:
            RuntimeError: If the linear was never called.
        """
        if name not in self._leaders:
            raise RuntimeError(f"The linear {name!r} was never called while calibrating, so it cannot be pruned.")
        return self._leaders[name]

    def siblings(self) -> dict[str, list[str]]:
        """Return leader -> its siblings, itself included."""
        found: dict[str, list[str]] = {}
        for name, leader in self._leaders.items():
            found.setdefault(leader, []).append(name)
        return found

    def check(self, block: str) -> None:
        """Check the weights and the statistics of each batch, once, before anything is pruned.

        Args:
            block: Name of the block, for errors.

        Raises:
            ValueError: If a weight, an input or an output holds NaN, Inf or numbers whose squares overflow float32; names the
                linear and the first such batch of this process.
            RuntimeError: If a linear was never called.
        """
        if self._checked or not self.linears:
            return
        bad = self._bad_batches()
        sound = torch.stack([linear.weight.isfinite().all() for linear in self.linears.values()]).tolist()
        for name in (name for name, finite in zip(self.linears, sound, strict=True) if not finite):
            batches = [batch for batch, _, argument, other, _ in bad if (argument, other) == ("outputs", name)]
            seen = f" So do its outputs, from {self._name_of(batches[0])} on." if batches else ""
            raise ValueError(f"{block}.{name}: Argument `weight` holds NaN or Inf.{seen} Look at the file that it came from.")
        for batch, _, argument, name, peak in bad:
            what = f"{block}.{name}: Argument `{argument}`"
            if peak < float("inf"):
                raise ValueError(f"{what} {too_large(peak, f' in {self._name_of(batch)}')}")
            raise ValueError(
                f"{what} holds NaN or Inf, first in {self._name_of(batch)}. Look at these samples; if they are sound, the "
                "model leaves the range of its numbers: use bfloat16 or float32."
            )
        self._checked = True

    def _bad_batches(self) -> list[tuple[int, int, str, str, float]]:
        """Return batch, order of the call, argument, linear and peak for every peak whose square overflows float32; sorted."""
        seen = [
            (batch, order, argument, name, peak)
            for order, name in enumerate((*self._leaders, *(name for name in self.linears if name not in self._leaders)))
            for argument, statistics in (("inputs", self.inputs(name)), ("outputs", self.outputs.get(name)))
            if statistics is not None
            for batch, peak in zip(self._called[name], statistics.peaks, strict=True)
        ]
        peaks = torch.stack([peak for *_, peak in seen]).tolist()  # waits for the GPU
        return sorted((*entry[:4], peak) for entry, peak in zip(seen, peaks, strict=True) if not peak**2 <= LARGEST)

    def _name_of(self, batch: int) -> str:
        first, last = (int(position) for position in self._positions[batch].aminmax())
        samples = f"sample {first}" if first == last else f"samples {first} to {last}"
        return f"calibration batch {batch} ({samples}, all counted from 0)"

    @contextmanager
    def collecting(
        self, positions: Tensor, lacks: Callable[[str, Tensor, Routing | None], Tensor] | None = None
    ) -> Iterator[None]:
        """Add every call of a linear to its statistics, within the context.

        Args:
            positions: Positions of the samples of this batch in the calibration set, (samples,), on the CPU.
            lacks: Returns what a linear's inputs lack of the dense model's, or its outputs and the hidden states that it adds
                to, see :class:`Perturbation`; called for the `perturbed` ones, with their inputs and, for experts, routing.

        Raises:
            RuntimeError: If a linear is called twice in one batch, or shares its input in one batch and not in another.
        """
        seen: dict[str, Tensor | Routing] = {}
        self._positions.append(positions)
        self._checked = False

        def samples(tokens: Tensor, routing: Routing | None) -> tuple[Tensor, Tensor | None]:
            if routing is not None:
                return routing.by_sample(tokens, len(positions))
            return weighted_class_tokens(by_sample(tokens, positions), *self._class_tokens), None

        def add(name: str, x: Tensor, y: Tensor | None, routing: Routing | None) -> None:
            linear = self.linears[name]
            if name in seen:
                raise RuntimeError(f"The linear {name!r} is called more than once a forward pass; it cannot be pruned.")
            read = x if routing is None else routing  # experts that borrow read the same tensor, each with weights of its own
            leader = next((other for other, tensor in seen.items() if tensor is read), name)
            seen[name] = read
            if self._leaders.setdefault(name, leader) != leader:
                raise RuntimeError(f"The linear {name!r} shares its input with others in some batches only.")
            if leader == name:
                missing = lacks(name, x, routing) if name in self.perturbations else None
                x, lengths = samples(linear.tokens_in(x), routing)
                if name not in self._inputs:
                    self._inputs[name] = InputStatistics(x.shape[-1], self._precision, self._gram_samples(x, lengths))
                self._inputs[name].update(x, positions, lengths)
                if missing is not None:
                    as_read = linear.tokens_out if self.perturbations[name].out_features else linear.tokens_in
                    self.perturbations[name].update(x, samples(as_read(missing), routing)[0], lengths)
            if y is not None:
                y, lengths = samples(linear.tokens_out(y), routing)
                self.outputs[name].update(y, positions, lengths)
            self._called[name].append(len(self._positions) - 1)

        def before(module: nn.Module, args: tuple[Tensor]) -> None:
            for name in self.linears:
                add(name, args[0], None, None)

        def hook(module: nn.Module, args: tuple[Tensor] | tuple[Tensor, Routing], output: Tensor) -> None:
            for name in self._modules[module]:
                add(name, args[0], output[..., self.linears[name].rows], args[1] if len(args) > 1 else None)

        if self.inputs_only:
            handles = [next(iter(self._modules)).register_forward_pre_hook(before)]
        else:
            handles = [module.register_forward_hook(hook) for module in self._modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _gram_samples(self, x: Tensor, lengths: Tensor | None) -> int | None:
        tokens, features = x.shape[1:]
        if self._updates or lengths is not None:  # nobody knows how many tokens of later samples are routed to an expert
            return None
        return -(-max(ERROR_TOKENS, 2 * features) // tokens)


def by_sample(x: Tensor, positions: Tensor) -> Tensor:
    """View x as (samples, tokens, features), also if it is (samples · tokens, features), as in OPT's MLP."""
    return x.reshape(len(positions), -1, x.shape[-1])

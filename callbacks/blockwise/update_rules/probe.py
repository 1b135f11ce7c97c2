"""AttentionProbe: measures attention of the dense and of the pruned model on a few windows, block by block.

Two streams of hidden states carry the same windows, one through the dense blocks and one through the pruned blocks. The
attention of the dense model in a block is the reference. A candidate's attention reads the outputs of the pruned blocks before
it, so a choice can make up for earlier errors. With `reference="block"` the reference is the dense block on the same input
instead.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from functional.pruning.attention import attention_divergence, attention_entropy, attention_mass
from lightning_modules.base.prunable import PrunableModule
from lightning_modules.parts.attention_form import attention_form, run_attention, run_attention_eagerly
from lightning_modules.parts.block_stream import BlockStream

Reference = Literal["model", "block"]
SHARES = (0.01, 0.05)


@dataclass
class _Window:
    """One batch of windows at one block."""

    args: tuple
    kwargs: dict[str, Any]
    output: Tensor
    probabilities: Tensor | None


class AttentionProbe:
    """Attention on a few windows.

    Args:
        module: The model; its blocks are dense until they are pruned one after the other.
        reference: model (the dense model on its own hidden states) or block (the dense block on those of the pruned model).
        distributions: all measures probabilities in every window, as Eq. 12 does; first measures them in the first batch of
            windows only, which takes less time and memory if the output decides.
    """

    def __init__(
        self, module: PrunableModule, reference: Reference = "model", distributions: Literal["first", "all"] = "first"
    ) -> None:
        self._module = module
        self._blocks = list(module.blocks.values())
        self._reference, self._distributions = reference, distributions
        self._pruned, self._dense = module.block_stream(), module.block_stream()
        self._windows: list[_Window] = []
        self.num_windows = 0

    def capture(self, batch: Any, samples: int) -> None:
        """Add a batch of windows.

        Args:
            batch: The batch.
            samples: Number of its windows.
        """
        key = len(self._pruned)
        with attention_form(self._module.model, "eager", required=True):
            self._pruned.capture(key, lambda: self._module.calibration_forward(batch))
        self._dense.adopt(key, self._pruned)
        self.num_windows += samples

    @torch.no_grad()
    def enter(self, index: int) -> None:
        """Measure the reference of block `index`, which must still be dense, and move the dense stream past it."""
        attention = self._attention(index)
        self._windows = []
        if attention is None:
            with attention_form(self._blocks[index], "own"):
                for key in range(len(self._dense)):
                    self._dense.advance(key, index)
            return
        for key in range(len(self._pruned)):
            args, kwargs, _ = self._call(self._pruned, key, index)
            if self._reference == "model":
                dense_args, dense_kwargs, hidden = self._call(self._dense, key, index)
                self._dense.replace(key, hidden)
            else:
                dense_args, dense_kwargs = args, kwargs
            if key == 0 or self._distributions == "all":
                output, probabilities = run_attention_eagerly(attention, dense_args, dense_kwargs)
            else:
                output, probabilities = run_attention(attention, dense_args, dense_kwargs), None
            self._windows.append(_Window(args, kwargs, output.float(), probabilities))
        self._attending = attention

    @torch.no_grad()
    def output_error(self) -> float:
        """Return Σ‖o − o_ref‖² / Σ‖o_ref‖² with the present weights; o is the output after the output projection."""
        error = norm = 0.0
        for window in self._windows:
            output = run_attention(self._attending, window.args, window.kwargs).float()
            error += (output - window.output).square().sum()
            norm += window.output.square().sum()
        return float(error / norm) if norm else 0.0

    @torch.no_grad()
    def divergence(self) -> float:
        """Return the KL divergence of the present attention probabilities from those of the reference, in nats (Eq. 12)."""
        values = [attention_divergence(probabilities, dense) for probabilities, dense in self._distributions_now()]
        return float(torch.stack(values).mean())

    @torch.no_grad()
    def leave(self, index: int) -> tuple[dict[str, float], list[Tensor]]:
        """Measure block `index`, which must be pruned by now, and move the pruned stream past it.

        Returns:
            Measures by name; and the attention maps (queries, keys) of the dense and the pruned model, the mean over heads in
            the first window. Both are empty for a block without attention, such as one that downsamples.
        """
        if not self._windows:
            self.pass_by(index)
            return {}, []
        relative, entries = self.output_error(), sum(window.output.numel() for window in self._windows)
        norm = float(sum(window.output.square().sum() for window in self._windows))
        divergences, first = [], None
        for probabilities, dense in self._distributions_now():
            divergences.append(attention_divergence(probabilities, dense))
            first = probabilities[:1] if first is None else first
        dense, divergence = self._windows[0].probabilities[:1], torch.stack(divergences).mean()
        measures = {"rmse": math.sqrt(relative * norm / entries), "relative_error": relative, "kl": divergence}
        for state, probabilities in (("dense", dense), ("pruned", first)):
            measures[f"entropy_{state}"] = attention_entropy(probabilities)
            for share, mass in zip(SHARES, attention_mass(probabilities, SHARES), strict=True):
                measures[f"top_{share:.0%}_mass_{state}"] = mass
        maps = [probabilities[0].float().mean(0) for probabilities in (dense, first)]
        self.pass_by(index)
        return {name: float(value) for name, value in measures.items()}, maps

    def pass_by(self, index: int) -> None:
        """Move the pruned stream past block `index`, which must be pruned by now, without measuring it."""
        self._windows = []
        with attention_form(self._blocks[index], "own"):
            for key in range(len(self._pruned)):
                self._pruned.advance(key, index)

    def attention_map(self) -> Tensor:
        """Return the present attention probabilities, the mean over heads in the first window, (queries, keys)."""
        window = self._windows[0]
        with torch.no_grad():
            return run_attention_eagerly(self._attending, window.args, window.kwargs)[1][0].float().mean(0)

    def clear(self) -> None:
        """Free the hidden states."""
        self._pruned.clear()
        self._dense.clear()
        self._windows = []

    def _attention(self, index: int) -> nn.Module | None:
        """Return the attention of a block; None if it has none, which is so only where blocks differ."""
        block, architecture = self._blocks[index], self._module.architecture
        if isinstance(architecture.blocks, tuple) and architecture.projections.get("q") not in self._module.linears(block):
            return None
        return self._module.attention(block)

    def _distributions_now(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the present probabilities and those of the reference, window by window."""
        for window in self._windows:
            if window.probabilities is not None:
                yield run_attention_eagerly(self._attending, window.args, window.kwargs)[1], window.probabilities

    def _call(self, stream: BlockStream, key: int, index: int) -> tuple[tuple, dict[str, Any], Tensor]:
        """Run block `index`; return the arguments of its attention and its own output."""
        calls: list[tuple[tuple, dict[str, Any]]] = []
        attention = self._attention(index)
        handle = attention.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        try:
            with attention_form(self._blocks[index], "own"):
                hidden = stream.run(key, index)
        finally:
            handle.remove()
        if len(calls) != 1:
            raise RuntimeError(f"{type(self._blocks[index]).__name__} called its attention {len(calls)} times, not once.")
        return *calls[0], hidden

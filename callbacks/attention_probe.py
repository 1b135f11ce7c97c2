"""AttentionProbe: attention of the dense model and of the pruned one on a few windows, block by block.

Two streams of hidden states carry the same windows: one through the dense blocks, one through the pruned blocks. The dense
model's attention in a block is the reference; the error of a candidate is that of its own attention, which reads what the
pruned blocks before it hand on. So a choice can make up for errors that came before. `reference="block"` instead compares
with the dense block on the very same input.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from functional.pruning.attention import attention_divergence, attention_entropy, attention_mass
from lightning_modules.attention_form import attention_form, run_attention, run_attention_eagerly
from lightning_modules.block_stream import BlockStream
from lightning_modules.prunable import PrunableModule

Reference = Literal["model", "block"]
SHARES = (0.01, 0.05)


@dataclass
class _Window:
    """One batch of windows at one block."""

    args: tuple
    kwargs: dict[str, Any]
    output: Tensor
    probabilities: Tensor


class AttentionProbe:
    """Attention on a few windows.

    Args:
        module: The model; its blocks are dense until they are pruned one after the other.
        reference: model: the dense model on its own hidden states; block: the dense block on those of the pruned model.
    """

    def __init__(self, module: PrunableModule, reference: Reference = "model") -> None:
        self._module = module
        self._blocks = list(module.blocks.values())
        self._reference = reference
        self._pruned, self._dense = BlockStream(self._blocks), BlockStream(self._blocks)
        self._windows: list[_Window] = []
        self.num_windows = 0

    def capture(self, batch: Any, samples: int) -> None:
        """Add a batch of windows, as many as `samples` says."""
        key = len(self._pruned)
        with attention_form(self._module.model, "eager"):
            self._pruned.capture(key, lambda: self._module.calibration_forward(batch))
        self._dense.adopt(key, self._pruned)
        self.num_windows += samples

    @torch.no_grad()
    def enter(self, index: int) -> None:
        """Take the reference of block `index`, which must still be dense, and move the dense stream beyond it."""
        attention = self._attention(index)
        self._windows = []
        for key in range(len(self._pruned)):
            args, kwargs, _ = self._call(self._pruned, key, index)
            if self._reference == "model":
                dense_args, dense_kwargs, hidden = self._call(self._dense, key, index)
                self._dense.replace(key, hidden)
            else:
                dense_args, dense_kwargs = args, kwargs
            output, probabilities = run_attention_eagerly(attention, dense_args, dense_kwargs)
            self._windows.append(_Window(args, kwargs, output.float(), probabilities))
        self._attending = attention

    @torch.no_grad()
    def output_error(self) -> float:
        """Σ‖o − o_ref‖² / Σ‖o_ref‖² of the attention module with its present weights, o after the output projection."""
        error = norm = 0.0
        for window in self._windows:
            output = run_attention(self._attending, window.args, window.kwargs).float()
            error += (output - window.output).square().sum()
            norm += window.output.square().sum()
        return float(error / norm) if norm else 0.0

    @torch.no_grad()
    def divergence(self, windows: int | None = None) -> float:
        """KL of the attention probabilities with the present weights from the reference's, in nats (Eq. 12).

        Args:
            windows: Only on the first so many; it costs more than `output_error`.
        """
        pairs = islice(self._eagerly(), windows)
        return float(torch.stack([attention_divergence(p, window.probabilities) for window, _, p in pairs]).mean())

    @torch.no_grad()
    def leave(self, index: int) -> tuple[dict[str, float], list[Tensor]]:
        """Measures of block `index`, which must be pruned by now; moves the pruned stream beyond it.

        Returns:
            Measures by name, and attention maps (queries, keys), mean over heads of the first window: dense, pruned.
        """
        errors, norms, divergences = [], [], []
        first: Tensor | None = None
        for window, output, probabilities in self._eagerly():
            errors.append((output.float() - window.output).square().mean())
            norms.append(window.output.square().mean())
            divergences.append(attention_divergence(probabilities, window.probabilities))
            first = probabilities[:1] if first is None else first
        error, norm, divergence = (torch.stack(values).mean() for values in (errors, norms, divergences))
        dense = self._windows[0].probabilities[:1]
        measures = {"rmse": error.sqrt(), "relative_error": error / norm, "kl": divergence}
        for state, probabilities in (("dense", dense), ("pruned", first)):
            measures[f"entropy_{state}"] = attention_entropy(probabilities)
            for share, mass in zip(SHARES, attention_mass(probabilities, SHARES), strict=True):
                measures[f"top_{share:.0%}_mass_{state}"] = mass
        maps = [probabilities[0].float().mean(0) for probabilities in (dense, first)]
        self._windows = []
        with attention_form(self._blocks[index], "fused"):
            for key in range(len(self._pruned)):
                self._pruned.advance(key, index)
        return {name: float(value) for name, value in measures.items()}, maps

    def attention_map(self) -> Tensor:
        """Attention probabilities with the present weights, mean over heads of the first window, (queries, keys)."""
        window = self._windows[0]
        with torch.no_grad():
            return run_attention_eagerly(self._attending, window.args, window.kwargs)[1][0].float().mean(0)

    def clear(self) -> None:
        """Give the hidden states back."""
        self._pruned.clear()
        self._dense.clear()
        self._windows = []

    def _attention(self, index: int) -> nn.Module:
        return self._module.attention(self._blocks[index])

    def _eagerly(self) -> Iterator[tuple[_Window, Tensor, Tensor]]:
        for window in self._windows:
            yield window, *run_attention_eagerly(self._attending, window.args, window.kwargs)

    def _call(self, stream: BlockStream, key: int, index: int) -> tuple[tuple, dict[str, Any], Tensor]:
        """What block `index` gives its attention, and what it returns."""
        calls: list[tuple[tuple, dict[str, Any]]] = []
        attention = self._attention(index)
        handle = attention.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        try:
            with attention_form(self._blocks[index], "fused"):
                hidden = stream.run(key, index)
        finally:
            handle.remove()
        if len(calls) != 1:
            raise RuntimeError(f"{type(self._blocks[index]).__name__} called its attention {len(calls)} times, not once.")
        return *calls[0], hidden

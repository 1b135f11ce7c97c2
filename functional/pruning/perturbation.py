"""The part of D²Prune's ΔX that is known: what the model pruned so far has done to the inputs of a linear map.

With x_d the input of a token in the dense model and x the one in the model pruned so far, the map is to give what the dense
model gives. If its outputs are added to hidden states h, as those of an attention's and of a feed-forward's last linear are, it
can also make up for what h lacks of the dense model's h_d. The error over all tokens is

    Σ ‖W x_d + (h_d − h) − Ŵ x‖² = N/2 · tr (W⁺ − Ŵ) H (W⁺ − Ŵ)ᵀ + const,   H = (2/N) Σ x xᵀ

    W⁺ = W + (W C + E) H⁻¹,   C = (2/N) Σ (x_d − x) xᵀ,   E = (2/N) Σ (h_d − h) xᵀ

so a solver has only to take W⁺ in place of W. The whole correction follows the calibration data too closely; a share α of it is
taken: W⁺ = W + α (W C + E) H⁻¹. Quantisation knows C (GPTAQ, arXiv 2504.02692); E is new here.

Letters: N samples, I inputs, O outputs.
"""

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Self

from functional.pruning.gram import add_cross_products
from functional.pruning.precision import Precision, check_precision, resolved
from functional.pruning.sums import Sums

DENSE_SHARE = 0.35
"""α, chosen on held-out text (results/joint.csv)."""


class Perturbation(Sums):
    """Sums of what the inputs, and the hidden states that outputs are added to, lack of the dense model's.

    Args:
        in_features: I, number of input channels.
        stream_features: O, number of channels of the hidden states that the outputs are added to; 0 if they are not.
        precision: Precision of the products, see :mod:`functional.pruning.precision`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, in_features: int, stream_features: int = 0, precision: Precision = "auto") -> None:
        super().__init__(in_features)
        check_precision(precision)
        if stream_features < 0:
            raise ValueError(f"Argument `stream_features` expected to be 0 or a number of channels but got {stream_features}.")
        self.stream_features, self._precision = stream_features, precision
        self.add_sum("inputs", (in_features, in_features))
        if stream_features:
            self.add_sum("stream", (stream_features, in_features))

    def __repr__(self) -> str:
        """Return class and sizes, for errors."""
        return f"Perturbation({self.features}, {self.stream_features})"

    def update(self, x: Tensor, x_dense: Tensor, lack: Tensor | None = None) -> Self:
        """Add samples.

        Args:
            x: Inputs, (samples, tokens, I), any floating dtype.
            x_dense: The inputs of the same tokens in the dense model.
            lack: h_d − h, (samples, tokens, O), if there are stream features.

        Raises:
            ValueError: If a shape does not fit.

        Examples:
            >>> x = torch.tensor([[[1.0, 2.0]]])
            >>> Perturbation(2).update(x, x_dense=x + 1).inputs()
            tensor([[2., 4.],
                    [2., 4.]])
        """
        given: dict[str, tuple[Tensor | None, int]] = {"x": (x, self.features), "x_dense": (x_dense, self.features)}
        given |= {"lack": (lack, self.stream_features)} if self.stream_features else {}
        for name, (value, features) in given.items():
            if value is None or value.shape != (*x.shape[:2], features):
                raise ValueError(
                    f"Argument `{name}` expected to have the shape {(*x.shape[:2], features)} but got "
                    f"{None if value is None else tuple(value.shape)}."
                )
        tokens = x.detach().reshape(-1, self.features)
        moved = x_dense.detach().reshape(-1, self.features) - tokens
        self._device = self._device or x.device
        precision = resolved(self._precision, x.dtype)
        add_cross_products(self._sum("inputs"), moved, tokens, precision)
        if lack is not None and self.stream_features:
            add_cross_products(self._sum("stream"), lack.detach().reshape(-1, self.stream_features), tokens, precision)
        self.num_samples += len(x)
        self.num_tokens += len(tokens)
        self._derived.clear()
        return self

    def inputs(self) -> Tensor:
        """Return C = (2/N) Σ (x_d − x) xᵀ, float32, (I, I)."""
        return self._mean("inputs")

    def stream(self) -> Tensor:
        """Return E = (2/N) Σ (h_d − h) xᵀ, float32, (O, I)."""
        return self._mean("stream")

    def _mean(self, name: Literal["inputs", "stream"]) -> Tensor:
        self.check_filled()
        return (self._sum(name) * (2 / self.num_samples)).to(torch.float32)


def corrected_target(weight: Tensor, perturbation: Perturbation, factor: Tensor, share: float, unit: float = 1.0) -> Tensor:
    """Return W⁺ = W + α (W C + E) H⁻¹, (O, I), float32.

    Args:
        weight: W, (O, I), float32.
        perturbation: C, and E if the outputs are added to hidden states.
        factor: U with (H · unit)⁻¹ = Uᵀ U, (I, I).
        share: α.
        unit: Factor of squares of x in `factor`.
    """
    missing = weight @ (perturbation.inputs() * unit)
    if perturbation.stream_features:
        missing += perturbation.stream() * unit
    return torch.addmm(weight, missing @ factor.T, factor, alpha=share)

"""The part of D²Prune's ΔX that is known: what the model pruned so far has done to the inputs of a linear map.

With x_d the input of a token in the dense model and x the one in the model pruned so far, the map is to give what the dense
model gives. If its outputs are added to hidden states h, as those of an attention's and of a feed-forward's last linear are, it
can also make up for what h lacks of the dense model's h_d. The error over all tokens is

    Σ ‖W x_d + (h_d − h) − Ŵ x‖² = N/2 · tr (W⁺ − Ŵ) H (W⁺ − Ŵ)ᵀ + const,   H = (2/N) Σ x xᵀ

    W⁺ = W + (W C + E) H⁻¹,   C = (2/N) Σ (x_d − x) xᵀ,   E = (2/N) Σ (h_d − h) xᵀ

so a solver has only to take W⁺ in place of W. The whole correction follows the calibration data too closely; a share α of it is
taken: W⁺ = W + α (W C + E) H⁻¹. Quantisation knows C (GPTAQ, arXiv 2504.02692); E is new here. For a map that adds to hidden
states W C + E = (2/N) Σ ((W x_d + h_d) − (W x + h)) xᵀ is summed in one, (O, I).

Letters: N samples, I inputs, O outputs, K = I, or O for a map that adds to hidden states.
"""

import torch
from torch import Tensor
from typing_extensions import Self

from functional.pruning.gram import add_cross_products
from functional.pruning.precision import Precision, check_precision, resolved
from functional.pruning.sums import Sums

DENSE_SHARE = 0.35
"""α, chosen on held-out text (results/joint.csv)."""


class Perturbation(Sums):
    """Sums of what a map's inputs, or its outputs and the hidden states that these are added to, lack of the dense model's.

    Args:
        in_features: I, number of input channels.
        out_features: O, number of output channels, if what these and the hidden states lack is summed; 0 for the inputs.
        precision: Precision of the products, see :mod:`functional.pruning.precision`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, in_features: int, out_features: int = 0, precision: Precision = "auto") -> None:
        super().__init__(in_features)
        check_precision(precision)
        if out_features < 0:
            raise ValueError(f"Argument `out_features` expected to be 0 or a number of channels but got {out_features}.")
        self.out_features, self._precision = out_features, precision
        self.add_sum("lack", (out_features or in_features, in_features))

    def __repr__(self) -> str:
        """Return class and sizes, for errors."""
        return f"Perturbation({self.features}, {self.out_features})"

    def update(self, x: Tensor, lack: Tensor, lengths: Tensor | None = None) -> Self:
        """Add samples.

        Args:
            x: Inputs, (samples, tokens, I), any floating dtype.
            lack: x_d − x, or (W x_d + h_d) − (W x + h) with `out_features`, (samples, tokens, K).
            lengths: As for :meth:`InputStatistics.update`.

        Raises:
            ValueError: If a shape does not fit.

        Examples:
            >>> x = torch.tensor([[[1.0, 2.0]]])
            >>> Perturbation(2).update(x, lack=torch.ones_like(x)).mean()
            tensor([[2., 4.],
                    [2., 4.]])
        """
        for name, value, features in (("x", x, self.features), ("lack", lack, self.out_features or self.features)):
            if value.shape != (*x.shape[:2], features):
                raise ValueError(
                    f"Argument `{name}` expected to have the shape {(*x.shape[:2], features)} but got {tuple(value.shape)}."
                )
        tokens, missing = (value.detach().reshape(-1, value.shape[-1]) for value in (x, lack))
        self._device = self._device or x.device
        add_cross_products(self._sum("lack"), missing, tokens, resolved(self._precision, x.dtype))
        self.num_samples += len(x)
        self.num_tokens += len(tokens) if lengths is None else int(lengths.sum())
        self._derived.clear()
        return self

    def mean(self, unit: float = 1.0) -> Tensor:
        """Return (2/N) Σ lack xᵀ · unit, which is C, or W C + E with `out_features`: float32, (K, I)."""
        self.check_filled()
        return (self._sum("lack") * (2 * unit / self.num_samples)).to(torch.float32)


def corrected_target(weight: Tensor, perturbation: Perturbation, factor: Tensor, share: float, unit: float = 1.0) -> Tensor:
    """Return W⁺ = W + α (W C + E) H⁻¹, (O, I), float32.

    Args:
        weight: W, (O, I), float32.
        perturbation: C, or W C + E if the outputs are added to hidden states.
        factor: U with (H · unit)⁻¹ = Uᵀ U, (I, I).
        share: α.
        unit: Factor of squares of x in `factor`.
    """
    missing = perturbation.mean(unit)
    if not perturbation.out_features:
        missing = weight @ missing
    return torch.addmm(weight, missing @ factor.T, factor, alpha=share)

"""Calibration statistics of one linear map y = W x + b: sums over calibration samples, divided once at the end.

They add up over batches and processes (functional.pruning.sums); another batch size changes them by float32 rounding.

The norms of D²Prune (Eq. 13-15) come in two modes. With N samples, `scale` s, n = 1..N the position of a sample in the
calibration set and ‖·‖ the Euclidean norm over the tokens of one sample:

    rms       x̂_j = sqrt( Σ_n ‖X_n,j‖² / (N s) )                                     Alg. 1; s = tokens per sample: the RMS
    official  x̂_j = Σ_n (n/N) ‖X_n,j‖ / s             layers without weight update    what the released code computes
              x̂_j = Σ_n (n/N) √(2/n) ‖X_n,j‖ / s      layers with weight update       by rescaling its sums by n/(n+1)

and ŷ_i likewise from the outputs (`official`: without the √(2/n)). Letters: N samples, L tokens, I inputs, O outputs.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import Self

from functional.pruning.batches import norms_and_peak, positions_of
from functional.pruning.gram import add_products, symmetric
from functional.pruning.precision import Precision, check_precision, resolved
from functional.pruning.sums import Sums

ActivationNorm = Literal["rms", "official"]


class _Statistics(Sums):
    """Sums over samples of per-channel norms, for inputs and outputs.

    Args:
        features: Number of channels. The sums live on the device of the first batch.

    Raises:
        ValueError: If `features` is not positive.
    """

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.add_sum("square_norm", (features,))
        self.add_sum("weighted_norm", (features,))

    @property
    def square_norm(self) -> Tensor:
        """Σ_n ‖X_n,j‖², float32, (features,)."""
        return self._in_float32("square_norm")

    @property
    def weighted_norm(self) -> Tensor:
        """Σ_n n ‖X_n,j‖, float32, (features,)."""
        return self._in_float32("weighted_norm")

    def update(self, x: Tensor, sample_index: int | Tensor, lengths: Tensor | None = None) -> Self:
        """Add samples.

        Args:
            x: (samples, tokens, features), any floating dtype.
            sample_index: Position of ``x[0]`` in the whole calibration set, counted from 0 (the others follow it), or the
                positions of all samples, (samples,).
            lengths: Number of tokens of each sample, (samples,), where those that are zero are left out or rows are filled up
                with zeros; the number of rows when None.

        Raises:
            ValueError: If the shape or the positions do not fit.

        Examples:
            >>> inputs = InputStatistics(2).update(torch.tensor([[[3.0, 0.0], [4.0, 1.0]]]), sample_index=0)
            >>> inputs.square_norm, inputs.num_tokens
            (tensor([25.,  1.]), 2)
        """
        if x.ndim != 3 or x.shape[-1] != self.features:
            raise ValueError(
                f"Argument `x` expected to have the shape (samples, tokens, {self.features}) but got {tuple(x.shape)}."
            )
        positions = positions_of(sample_index, len(x))
        x = x.detach().float() if x.dtype == torch.float64 else x.detach()
        norm, peak = norms_and_peak(x)
        self.peaks.append(peak)
        self._device = self._device or x.device
        self._sum("square_norm").add_(norm.square().sum(0))
        weights = positions.to(x.device, non_blocking=True)[:, None]
        self._sum("weighted_norm").add_((weights * norm).sum(0))  # no matmul: autocast would make it half precision
        lengths = torch.full((len(x),), x.shape[1]) if lengths is None else lengths
        self._update_more(x, norm, positions, lengths)
        self.num_samples += len(x)
        self.num_tokens += int(lengths.sum())
        self._derived.clear()
        return self

    def activation_norm(self, mode: ActivationNorm, scale: float) -> Tensor:
        """Return ŷ (outputs), or x̂ of a layer without weight update (inputs): float32, (features,)."""
        check_activation_norm(mode, scale)
        self.check_filled()
        if mode == "rms":
            return (self.square_norm / (self.num_samples * scale)).sqrt()
        return self.weighted_norm / (self.num_samples * scale)

    def _update_more(self, x: Tensor, norm: Tensor, positions: Tensor, lengths: Tensor) -> None:
        """Add to the sums that a subclass declares."""


class InputStatistics(_Statistics):
    """Statistics of the inputs x of a linear map; linears that read the same tensor share one.

    Args:
        in_features: I, number of input channels.
        precision: Precision of the Gram matrix, see :mod:`functional.pruning.precision`.
        gram_samples: Only samples at positions below this enter the Gram matrix; all do when None, as a weight update needs.
            Without an update the matrix only measures errors, for which some thousand tokens are enough.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, in_features: int, precision: Precision = "auto", gram_samples: int | None = None) -> None:
        super().__init__(in_features)
        check_precision(precision)
        if gram_samples is not None and gram_samples < 1:
            raise ValueError(f"Argument `gram_samples` expected to be a positive number or None but got {gram_samples}.")
        self._precision, self.gram_samples = precision, gram_samples
        self.dtype = torch.float32
        """Dtype of the last samples."""
        self.gram_tokens = 0
        """Tokens in the Gram matrix."""
        self._counts.append("gram_tokens")
        self.add_sum("root_weighted_norm", (in_features,))
        self.add_sum("gram", (in_features, in_features))

    @property
    def precision(self) -> Literal["highest", "high"]:
        """Precision of products with the Gram matrix: that of the argument, with auto resolved."""
        return resolved(self._precision, self.dtype)

    @property
    def gram(self) -> Tensor:
        """Σ x xᵀ over the tokens, float32, (I, I)."""
        return self._in_float32("gram")

    @property
    def root_weighted_norm(self) -> Tensor:
        """Σ_n √(2n) ‖X_n,j‖ = Σ_n n √(2/n) ‖X_n,j‖, float32, (I,)."""
        return self._in_float32("root_weighted_norm")

    def hessian(self, unit: float = 1.0) -> Tensor:
        """Return H · unit = (2/N) Σ_n X_n X_nᵀ · unit, a new tensor, float32, (I, I)."""
        self.check_whole()
        return self.gram * (2 / self.num_samples * unit)

    def mean_square_norm(self) -> Tensor:
        """Return (1/N) Σ_n ‖X_n,j‖², Wanda's scaler, float32, (I,)."""
        self.check_filled()
        return self.square_norm / self.num_samples

    def updated_activation_norm(self, mode: ActivationNorm, scale: float) -> Tensor:
        """Return x̂ of a layer with weight update (D²-SparseGPT): float32, (I,)."""
        if mode == "official":
            check_activation_norm(mode, scale)
            self.check_filled()
            return self.root_weighted_norm / (self.num_samples * scale)
        return self.activation_norm(mode, scale)

    def tokens_per_sample(self) -> float:
        """Return the mean number of tokens of a sample, the scale with which `rms` norms are root mean squares."""
        self.check_filled()
        return self.num_tokens / self.num_samples

    def check_whole(self) -> None:
        """Check that all tokens have entered the Gram matrix.

        Raises:
            ValueError: If some have not.
        """
        self.check_filled()
        if self.gram_tokens != self.num_tokens:
            raise ValueError(
                f"The Gram matrix holds {self.gram_tokens} of {self.num_tokens} tokens, but a weight update needs all. Leave "
                "out `gram_samples`."
            )

    def merge(self, other: Self) -> Self:
        """Add the sums of `other`, which has the same features, to these."""
        super().merge(other)
        self.dtype = other.dtype if other.num_samples else self.dtype
        return self

    def _update_more(self, x: Tensor, norm: Tensor, positions: Tensor, lengths: Tensor) -> None:
        self.dtype = x.dtype
        weights = (2 * positions).sqrt().to(x.device, non_blocking=True)[:, None]
        self._sum("root_weighted_norm").add_((weights * norm).sum(0))
        if self.gram_samples is not None:
            chosen = positions <= self.gram_samples
            x, lengths = x[chosen], lengths[chosen.cpu()]
        tokens = x.reshape(-1, self.features)
        self.gram_tokens += int(lengths.sum())
        if len(tokens):
            add_products(self._sum("gram"), tokens, self.precision)

    def _in_float32(self, name: str) -> Tensor:
        if name != "gram":
            return super()._in_float32(name)
        return self.derived("gram", lambda: symmetric(self._sum("gram").to(torch.float32, copy=True)))


class OutputStatistics(_Statistics):
    """Statistics of the outputs y of a linear map.

    Args:
        out_features: O, number of output channels.
    """

    def __init__(self, out_features: int) -> None:
        super().__init__(out_features)


class DerivedOutputStatistics(OutputStatistics):
    """Statistics of y = W x as they follow from those of x: ‖Y_i‖² = w_i (Σ x xᵀ) w_iᵀ. They have `rms` norms only.

    Args:
        square_norm: Σ_n ‖Y_n,i‖², (O,).
        inputs: Statistics of x.
    """

    def __init__(self, square_norm: Tensor, inputs: InputStatistics) -> None:
        super().__init__(len(square_norm))
        self._device = inputs.square_norm.device
        self._sum("square_norm").copy_(square_norm)
        self.num_samples, self.num_tokens = inputs.num_samples, inputs.num_tokens

    def activation_norm(self, mode: ActivationNorm, scale: float) -> Tensor:
        """Return ŷ: float32, (features,).

        Raises:
            ValueError: If `mode` is not rms, which norms of single samples are needed for.
        """
        if mode != "rms":
            raise ValueError(f"Argument `activation_norm` expected to be rms where outputs are not measured but got {mode!r}.")
        return super().activation_norm(mode, scale)


def check_activation_norm(mode: str, scale: float | str) -> None:
    """Check the arguments of activation norms.

    Args:
        mode: rms or official.
        scale: A positive number, or auto.

    Raises:
        ValueError: If `mode` is unknown or `scale` is out of range.
    """
    if mode not in get_args(ActivationNorm):
        raise ValueError(f"Argument `activation_norm` expected to be rms or official but got {mode!r}.")
    if scale != "auto" and (isinstance(scale, str) or not 0 < scale < float("inf")):
        raise ValueError(f"Argument `scale` expected to be auto or a positive number but got {scale!r}.")

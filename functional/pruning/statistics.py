"""Calibration statistics of one linear map y = W x + b: sums over calibration samples, divided only at the end.

Every quantity is a sum (and a count). What a batch adds is made in float32 and summed in float64, so that neither the order of
batches nor how they are shared out over processes leaves a trace; other batches make a difference of float32 rounding. The
norms of D²Prune (Eq. 13-15) come in two modes; with N samples, s the `scale`, n = 1..N the position of a sample in the
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

from functional.pruning.admm import Preconditioned, precondition
from functional.pruning.kernels import by_kernels
from functional.pruning.precision import HALF, Precision, check_precision, float32_matmul, resolved
from functional.pruning.solver import inverse_factor, safe_unit

ActivationNorm = Literal["rms", "official"]

LARGEST = torch.finfo(torch.float32).max
PANEL, PANEL_ON_GPU = 256, 2048
"""Rows of a Gram matrix that are made at a time, from the diagonal to the right: measured on both."""


class _Statistics:
    """Sums over samples of per-channel norms: what inputs and outputs have in common.

    Args:
        features: Number of channels. The sums live on the device of the first batch.
    """

    _SUMS: tuple[str, ...] = ("square_norm", "weighted_norm")
    _COUNTS: tuple[str, ...] = ("num_samples", "num_tokens")

    def __init__(self, features: int) -> None:
        if features < 1:
            raise ValueError(f"Argument `features` expected to be a positive integer but got {features}.")
        self.features = features
        self.num_samples = 0
        self.num_tokens = 0
        self.peaks: list[Tensor] = []
        """Largest magnitude of each update, float32 scalars where the data was: NaN or Inf if it held any. Not summed."""
        self._device: torch.device | None = None
        self._sums: dict[str, Tensor] = {}
        self._values: dict[str, Tensor] = {}
        """The sums in float32, as far as they were asked for since the last change."""

    def counts(self) -> dict[str, int]:
        """The numbers to add over processes, by name."""
        return {name: getattr(self, name) for name in self._COUNTS}

    @property
    def square_norm(self) -> Tensor:
        """Σ_n ‖X_n,j‖², float32, (features,)."""
        return self._value("square_norm")

    @property
    def weighted_norm(self) -> Tensor:
        """Σ_n n ‖X_n,j‖, float32, (features,)."""
        return self._value("weighted_norm")

    def sums(self) -> dict[str, Tensor]:
        """The tensors to add over processes, float64, by name; reduce in place by sum, and `counts` beside them."""
        self._forget()
        return {name: self._sum(name) for name in self._SUMS}

    def update(self, x: Tensor, sample_index: int | Tensor) -> Self:
        """Add samples.

        Args:
            x: (samples, tokens, features), any floating dtype; what is made of it is float32.
            sample_index: Position of ``x[0]`` in the whole calibration set, counted from 0 (the others follow it), or the
                positions of all samples, (samples,).

        Raises:
            ValueError: If the shape or the positions do not fit.
        """
        if x.ndim != 3 or x.shape[-1] != self.features:
            raise ValueError(
                f"Argument `x` expected to have the shape (samples, tokens, {self.features}) but got {tuple(x.shape)}."
            )
        positions = _positions(sample_index, len(x))
        x = x.detach().float() if x.dtype == torch.float64 else x.detach()
        norm, peak = by_kernels(x, lambda: _norms_and_peak_by_kernel(x), lambda: _norms_and_peak(x))
        self.peaks.append(peak)
        self._device = self._device or x.device
        self._add("square_norm", norm.square().sum(0))
        weights = positions.to(x.device, non_blocking=True)[:, None]
        self._add("weighted_norm", (weights * norm).sum(0))  # no matmul: autocast would make it half precision
        self._update_more(x, norm, positions)
        self.num_samples += len(x)
        self.num_tokens += x.shape[0] * x.shape[1]
        self._forget()
        return self

    def merge(self, other: Self) -> Self:
        """Add the sums of `other` (same features) to these."""
        if type(other) is not type(self) or other.features != self.features:
            raise ValueError(
                f"Argument `other` expected to be {type(self).__name__}({self.features}) but got "
                f"{type(other).__name__}({getattr(other, 'features', '?')})."
            )
        if other.num_samples:
            self._device = self._device or other._device
            for name, value in other.sums().items():
                self._add(name, value.to(self._sum(name).device))
        self.peaks += other.peaks
        for name, value in other.counts().items():
            setattr(self, name, getattr(self, name) + value)
        self._forget()
        return self

    def activation_norm(self, mode: ActivationNorm, scale: float) -> Tensor:
        """ŷ (outputs), or x̂ of a layer without weight update (inputs): float32, (features,)."""
        check_activation_norm(mode, scale)
        self.check_filled()
        if mode == "rms":
            return (self.square_norm / (self.num_samples * scale)).sqrt()
        return self.weighted_norm / (self.num_samples * scale)

    def check_filled(self) -> None:
        """Raise a ValueError if no token was ever added."""
        if self.num_tokens == 0:
            raise ValueError(f"These {type(self).__name__} hold no tokens. Call `update` with calibration data first.")

    def check_finite(self, argument: str) -> None:
        """Raise a ValueError that names the argument unless every sum is finite."""
        if torch.stack([self._value(name).isfinite().all() for name in self._SUMS]).all():
            return
        peaks = [peak.item() for peak in self.peaks]
        if all(peak < float("inf") for peak in peaks) and max(peaks, default=0.0) ** 2 * self.num_tokens > LARGEST:
            raise ValueError(f"Argument `{argument}` {too_large(max(peaks))}")
        raise ValueError(f"Argument `{argument}` holds NaN or Inf.")

    def _update_more(self, x: Tensor, norm: Tensor, positions: Tensor) -> None:
        """Further sums of a subclass."""

    def _shape(self, name: str) -> tuple[int, ...]:
        return (self.features,)

    def _sum(self, name: str) -> Tensor:
        if name not in self._sums:
            device = self._device or torch.device("cpu")
            dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has nothing wider
            self._sums[name] = torch.zeros(self._shape(name), dtype=dtype, device=device)
        return self._sums[name]

    def _value(self, name: str) -> Tensor:
        if name not in self._values:
            self._values[name] = self._in_float32(name)
        return self._values[name]

    def _in_float32(self, name: str) -> Tensor:
        return self._sum(name).to(torch.float32, copy=True)

    def _forget(self) -> None:
        """What was made of the sums before they changed."""
        self._values.clear()

    def _add(self, name: str, value: Tensor) -> None:
        self._sum(name).add_(value)


class InputStatistics(_Statistics):
    """What pruning needs of the inputs x of a linear map; linears that read the same tensor share one.

    Args:
        in_features: I, number of input channels.
        precision: Of the Gram matrix, see :mod:`functional.pruning.precision`.
        gram_samples: The Gram matrix is of the samples at positions below this; None is all, which a weight update needs.
            Without one it serves to measure errors, for which some thousand tokens are enough.
    """

    _SUMS = (*_Statistics._SUMS, "root_weighted_norm", "gram")
    _COUNTS = (*_Statistics._COUNTS, "gram_tokens")

    def __init__(self, in_features: int, precision: Precision = "auto", gram_samples: int | None = None) -> None:
        super().__init__(in_features)
        check_precision(precision)
        if gram_samples is not None and gram_samples < 1:
            raise ValueError(f"Argument `gram_samples` expected to be a positive number or None but got {gram_samples}.")
        self._precision, self.gram_samples = precision, gram_samples
        self.dtype = torch.float32
        """Of the last samples."""
        self.gram_tokens = 0
        """Tokens that have entered the Gram matrix."""
        self._unit: float | None = None
        self._factors: dict[float, tuple[Tensor, Tensor, float]] = {}
        self._preconditioned: dict[float, Preconditioned] = {}

    @property
    def precision(self) -> Literal["highest", "high"]:
        """Of products with the Gram matrix."""
        return resolved(self._precision, self.dtype)

    @property
    def gram(self) -> Tensor:
        """Σ x xᵀ over the tokens, float32, (I, I)."""
        return self._value("gram")

    @property
    def root_weighted_norm(self) -> Tensor:
        """Σ_n √(2n) ‖X_n,j‖ = Σ_n n √(2/n) ‖X_n,j‖, float32, (I,)."""
        return self._value("root_weighted_norm")

    def hessian(self) -> Tensor:
        """H = (2/N) Σ_n X_n X_nᵀ, a new tensor, float32, (I, I)."""
        return self._hessian_in(1.0)

    def unit(self) -> float:
        """By what squares of x are multiplied so that float32 holds what a solve makes of them: 1, or a power of four."""
        if self._unit is None:
            self._unit = safe_unit(self.gram.diagonal().abs().max().item(), 64)
        return self._unit

    def inverse_factor(self, damping: float) -> tuple[Tensor, Tensor, float]:
        """:func:`functional.pruning.solver.inverse_factor` of H · `unit()`, computed once for all linears that share x."""
        if damping not in self._factors:
            self._factors[damping] = inverse_factor(self._hessian_in(self.unit()), damping)
        return self._factors[damping]

    def preconditioned(self, damping: float) -> Preconditioned:
        """:func:`functional.pruning.admm.precondition` of H · `unit()`, computed once for all linears that share x."""
        if damping not in self._preconditioned:
            self._preconditioned[damping] = precondition(self._hessian_in(self.unit()), damping)
        return self._preconditioned[damping]

    def mean_square_norm(self) -> Tensor:
        """(1/N) Σ_n ‖X_n,j‖², Wanda's scaler, float32, (I,)."""
        self.check_filled()
        return self.square_norm / self.num_samples

    def updated_activation_norm(self, mode: ActivationNorm, scale: float) -> Tensor:
        """x̂ of a layer with weight update (D²-SparseGPT): float32, (I,)."""
        if mode == "official":
            check_activation_norm(mode, scale)
            self.check_filled()
            return self.root_weighted_norm / (self.num_samples * scale)
        return self.activation_norm(mode, scale)

    def check_whole(self) -> None:
        """Raise a ValueError unless all tokens have entered the Gram matrix."""
        self.check_filled()
        if self.gram_tokens != self.num_tokens:
            raise ValueError(
                f"The Gram matrix holds {self.gram_tokens} of {self.num_tokens} tokens, but a weight update needs all. Leave "
                "out `gram_samples`."
            )

    def merge(self, other: Self) -> Self:
        """Add the sums of `other` (same features) to these."""
        super().merge(other)
        self.dtype = other.dtype if other.num_samples else self.dtype
        return self

    def _hessian_in(self, unit: float) -> Tensor:
        self.check_whole()
        return self.gram * (2 / self.num_samples * unit)

    def _update_more(self, x: Tensor, norm: Tensor, positions: Tensor) -> None:
        self.dtype = x.dtype
        weights = (2 * positions).sqrt().to(x.device, non_blocking=True)[:, None]
        self._add("root_weighted_norm", (weights * norm).sum(0))
        if self.gram_samples is not None:
            x = x[positions <= self.gram_samples]
        tokens = x.reshape(-1, self.features)
        self.gram_tokens += len(tokens)
        if len(tokens):
            self._add_products(tokens)

    def _add_products(self, tokens: Tensor) -> None:
        """Gram matrix, the part from the diagonal to the right: panels of rows, which take little more than half the time."""
        gram = self._sum("gram")
        exact_products = tokens.is_cuda and tokens.dtype in HALF and self.precision == "high"
        if not exact_products:
            tokens = tokens.to(torch.float32)
        width = _panel(tokens)
        with float32_matmul(self.precision, tokens.device):
            for start in range(0, self.features, width):
                rows, left = gram[start : start + width, start:], tokens[:, start : start + width].T
                if exact_products:
                    rows += torch.mm(left, tokens[:, start:], out_dtype=torch.float32)
                else:
                    rows += left @ tokens[:, start:]

    def _in_float32(self, name: str) -> Tensor:
        value = super()._in_float32(name)
        if name == "gram":  # of which only what is right of the diagonal was summed up
            width = _panel(value)
            for start in range(0, self.features, width):
                panel, below = slice(start, start + width), slice(start + width, None)
                value[panel, panel] = value[panel, panel].triu() + value[panel, panel].triu(1).T
                value[below, panel] = value[panel, below].T
        return value

    def _forget(self) -> None:
        super()._forget()
        self._factors.clear()
        self._preconditioned.clear()
        self._unit = None

    def _shape(self, name: str) -> tuple[int, ...]:
        return (self.features, self.features) if name == "gram" else (self.features,)


class OutputStatistics(_Statistics):
    """What pruning needs of the outputs y of a linear map.

    Args:
        out_features: O, number of output channels.
    """

    def __init__(self, out_features: int) -> None:
        super().__init__(out_features)


def _panel(like: Tensor) -> int:
    return PANEL_ON_GPU if like.is_cuda else PANEL


def check_activation_norm(mode: str, scale: float) -> None:
    """Raise a ValueError unless `mode` is known and `scale` positive."""
    if mode not in get_args(ActivationNorm):
        raise ValueError(f"Argument `activation_norm` expected to be rms or official but got {mode!r}.")
    if not 0 < scale < float("inf"):
        raise ValueError(f"Argument `scale` expected to be a positive number but got {scale}.")


def too_large(largest: float, where: str = "") -> str:
    """What an error says of finite numbers that cannot be squared and summed in float32."""
    return (
        f"reaches {largest:.3g} in magnitude{where}, and sums of squares of such numbers overflow float32. Scale the data "
        "down, or look for what makes it grow."
    )


def _norms_and_peak(x: Tensor) -> tuple[Tensor, Tensor]:
    """‖X_n,j‖, float32, (samples, features), and the largest magnitude, NaN if there is any; not waited for."""
    peak = torch.stack(x.aminmax()).abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    if x.device.type == "cpu":  # where the reduction of half precision is slow
        return x.float().square().sum(1).sqrt(), peak
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32), peak


def _norms_and_peak_by_kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    from functional.pruning.statistics_triton import norms_and_peak

    return norms_and_peak(x) if x.numel() else _norms_and_peak(x)


def _positions(sample_index: int | Tensor, num_samples: int) -> Tensor:
    """1-based positions n of the samples, float32, (samples,), where the index is."""
    if isinstance(sample_index, Tensor) and sample_index.ndim:
        # Not looked into on a GPU, which would have to be waited for.
        valid = sample_index.shape == (num_samples,) and (sample_index.is_cuda or int(sample_index.min()) >= 0)
        positions = sample_index
    else:
        first = int(sample_index)
        positions, valid = torch.arange(first, first + num_samples), first >= 0
    if not valid:
        raise ValueError(
            f"Argument `sample_index` expected to be a position from 0 on, or {num_samples} of them, but got {sample_index}."
        )
    return positions.to(torch.float32) + 1

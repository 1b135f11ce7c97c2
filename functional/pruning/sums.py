"""Sums over calibration samples that add up over batches and processes.

Each sum is declared with `add_sum`, like a torchmetrics state with `dist_reduce_fx="sum"`. Batches are computed in float32 and
summed in float64, so neither their order nor their distribution over processes changes a result. To combine processes, add up
what `sums` and `counts` return.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from functional.pruning.batches import LARGEST, too_large

T = TypeVar("T")


class Sums:
    """Sums and counts over samples, for one linear map.

    Args:
        features: Number of channels. The sums live on the device of the first batch.

    Raises:
        ValueError: If `features` is not positive.
    """

    def __init__(self, features: int) -> None:
        if features < 1:
            raise ValueError(f"Argument `features` expected to be a positive integer but got {features}.")
        self.features = features
        self.num_samples = 0
        self.num_tokens = 0
        self.peaks: list[Tensor] = []
        """Largest magnitude of each update, NaN or Inf if it held any: float32 scalars where the data was. Not summed."""
        self._device: torch.device | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts = ["num_samples", "num_tokens"]
        self._derived: dict[Hashable, Any] = {}

    def __repr__(self) -> str:
        """Return class and sizes, for errors."""
        return f"{type(self).__name__}({self.features})"

    def add_sum(self, name: str, shape: tuple[int, ...]) -> None:
        """Declare a float64 sum over samples, reduced over processes by addition."""
        self._shapes[name] = shape

    def counts(self) -> dict[str, int]:
        """Return counts by name, to be reduced over processes by addition."""
        return {name: getattr(self, name) for name in self._counts}

    def sums(self) -> dict[str, Tensor]:
        """Return sums by name, float64, to be reduced over processes in place by addition, together with `counts`."""
        self._derived.clear()
        return {name: self._sum(name) for name in self._shapes}

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result of `make`, cached under `key` until the statistics change."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def merge(self, other: Self) -> Self:
        """Add the sums of `other`, which has the same features, to these.

        Raises:
            ValueError: If `other` is of another class or has other features.
        """
        if type(other) is not type(self) or other._shapes != self._shapes:
            got = repr(other) if isinstance(other, Sums) else type(other).__name__
            raise ValueError(f"Argument `other` expected to be {self!r} but got {got}. Merge sums of the same linear.")
        if other.num_samples:
            self._device = self._device or other._device
            for name, value in other.sums().items():
                mine = self._sum(name)
                mine.add_(value.to(mine.device))
        self.peaks += other.peaks
        for name, count in other.counts().items():
            setattr(self, name, getattr(self, name) + count)
        self._derived.clear()
        return self

    def check_filled(self) -> None:
        """Check that a token was added.

        Raises:
            ValueError: If there is none.
        """
        if self.num_tokens == 0:
            raise ValueError(f"These {type(self).__name__} hold no tokens. Call `update` with calibration data first.")

    def check_finite(self, argument: str) -> None:
        """Check that every sum is finite.

        Args:
            argument: Name of the data, for the error.

        Raises:
            ValueError: If a sum is NaN or Inf.
        """
        if torch.stack([self._in_float32(name).isfinite().all() for name in self._shapes]).all():
            return
        if not self.peaks:
            raise ValueError(f"Argument `{argument}` holds NaN or Inf, or numbers whose products overflow float32.")
        peaks = [peak.item() for peak in self.peaks]
        if all(peak < float("inf") for peak in peaks) and max(peaks, default=0.0) ** 2 * self.num_tokens > LARGEST:
            raise ValueError(f"Argument `{argument}` {too_large(max(peaks))}")
        raise ValueError(f"Argument `{argument}` holds NaN or Inf.")

    def _sum(self, name: str) -> Tensor:
        if name not in self._sums:
            device = self._device or torch.device("cpu")
            dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has nothing wider
            self._sums[name] = torch.zeros(self._shapes[name], dtype=dtype, device=device)
        return self._sums[name]

    def _in_float32(self, name: str) -> Tensor:
        return self.derived(("float32", name), lambda: self._sum(name).to(torch.float32, copy=True))

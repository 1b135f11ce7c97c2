"""One batch of samples: norms of its channels, its largest number, positions of its samples, weights of its class tokens."""

import torch
from torch import Tensor

from functional.pruning.dispatch import by_kernels

LARGEST = torch.finfo(torch.float32).max


def norms_and_peak(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norms and the largest magnitude of a batch, without waiting for the GPU.

    Args:
        x: X, (samples, tokens, features).

    Returns:
        ‖X_n,j‖, float32, (samples, features), and the largest magnitude, float32, (); NaN if x holds any.
    """
    return by_kernels(x, lambda: _norms_and_peak_by_kernel(x), lambda: _plain_norms_and_peak(x))


def positions_of(sample_index: int | Tensor, num_samples: int) -> Tensor:
    """Return the 1-based positions n of the samples, float32, (samples,), on the device of the index.

    Args:
        sample_index: 0-based position of the first sample, or of every sample, (samples,).
        num_samples: Number of samples.

    Raises:
        ValueError: If there are other than `num_samples` positions, or a negative one; on a GPU their values are not checked.
    """
    if isinstance(sample_index, Tensor) and sample_index.ndim:
        # Values on a GPU are not checked, because that would wait for it.
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


def weighted_class_tokens(x: Tensor, class_tokens: int, weight: float) -> Tensor:
    """Scale the first tokens of every sample by √weight, so that they count `weight` times in sums of products.

    Args:
        x: (samples, tokens, features), any floating dtype; not modified.
        class_tokens: Number of leading tokens of a sample that are class tokens.
        weight: How many times one counts; 1 returns `x` itself.

    Returns:
        The same shape and dtype. Half precision rounds, unless √weight is a power of two; float16 ends at 65504 / √weight.

    Examples:
        >>> weighted_class_tokens(torch.tensor([[[1.0], [2.0], [3.0]]]), class_tokens=1, weight=16.0).flatten()
        tensor([4., 2., 3.])
    """
    if weight == 1:
        return x
    weighted = x.clone()
    weighted[:, :class_tokens] *= weight**0.5
    return weighted


def too_large(largest: float, where: str = "") -> str:
    """Return the text of an error about finite numbers whose squares overflow float32.

    Args:
        largest: The largest magnitude.
        where: Place of the number, with a space in front.
    """
    return (
        f"reaches {largest:.3g} in magnitude{where}, and sums of squares of such numbers overflow float32. Scale the data "
        "down, or look for what makes it grow."
    )


def _plain_norms_and_peak(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ‖X_n,j‖, float32, (samples, features), and the largest magnitude, NaN if x holds any, without GPU waits."""
    peak = torch.stack(x.aminmax()).abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    if x.device.type == "cpu":  # which reduces half precision slowly
        return x.float().square().sum(1).sqrt(), peak
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32), peak


def _norms_and_peak_by_kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    from functional.pruning.statistics_triton import norms_and_peak

    return norms_and_peak(x) if x.numel() else _plain_norms_and_peak(x)

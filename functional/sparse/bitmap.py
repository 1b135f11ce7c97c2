"""Compress a matrix with zeros anywhere and decompress it again, exactly, in plain torch on any device.

A weight is kept if it is not zero, NaN included. What is not kept comes back as +0, so a matrix without negative zeros comes
back bit for bit.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

BITS = 8


class Compressed(NamedTuple):
    """A matrix (O, I) with n weights that are not zero.

    Attributes:
        mask: (O, ceil(I / 8)), uint8: bit j of byte k of a row is set if weight 8 k + j is kept. Bits past I are 0.
        values: (n,), kept weights row after row, in the matrix's dtype.
        rows: O.
        columns: I.
    """

    mask: Tensor
    values: Tensor
    rows: int
    columns: int

    @property
    def nbytes(self) -> int:
        """Number of bytes of mask and values."""
        return self.mask.nbytes + self.values.nbytes


def compress(weight: Tensor) -> Compressed:
    """Compress a matrix into a mask and the weights that are not zero.

    Args:
        weight: (O, I), floating point.

    Raises:
        ValueError: If `weight` is no floating-point matrix.

    Examples:
        >>> compressed = compress(torch.tensor([[0.0, 5.0, 0.0, -0.0, 7.0]]))
        >>> compressed.mask, compressed.values
        (tensor([[18]], dtype=torch.uint8), tensor([5., 7.]))
        >>> decompress(*compressed)
        tensor([[0., 5., 0., 0., 7.]])
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"Argument `weight` expected to be a floating-point matrix (outputs, inputs) but got {weight.dtype} of shape "
            f"{tuple(weight.shape)}. Flatten its leading axes, or leave it dense."
        )
    rows, columns = weight.shape
    kept = weight != 0
    octets = pad(kept, (0, -columns % BITS)).to(torch.uint8).unflatten(1, (-1, BITS))
    return Compressed((octets << _shifts(weight.device)).sum(-1, dtype=torch.uint8), weight[kept], rows, columns)


def decompress(mask: Tensor, values: Tensor, rows: int, columns: int) -> Tensor:
    """Restore the matrix that was compressed, bit for bit except for the sign of zeros.

    Args:
        mask: `Compressed.mask`.
        values: `Compressed.values`.
        rows: O.
        columns: I.

    Returns:
        The matrix, (O, I).

    Raises:
        ValueError: If the mask has another shape or dtype. The values are not counted, since that would wait for a GPU.
    """
    if mask.dtype != torch.uint8 or mask.shape != (rows, -(-columns // BITS)):
        raise ValueError(
            f"Argument `mask` of a weight ({rows}, {columns}) expected uint8 ({rows}, {-(-columns // BITS)}) but got "
            f"{mask.dtype} {tuple(mask.shape)}. Take it from `compress`."
        )
    kept = (mask[..., None] >> _shifts(mask.device) & 1).flatten(1)[:, :columns].bool()
    return values.new_zeros(rows, columns).masked_scatter_(kept, values)


def compressed_bytes(rows: int, columns: int, kept: int, itemsize: int) -> int:
    """Return how many bytes a matrix takes when compressed.

    Args:
        rows: O.
        columns: I.
        kept: Number of weights that are not zero.
        itemsize: Bytes of a weight.

    Examples:
        >>> compressed_bytes(16, 64, kept=512, itemsize=2) / (16 * 64 * 2)
        0.5625
    """
    return rows * -(-columns // BITS) + kept * itemsize


def count_kept(mask: Tensor) -> int:
    """Return how many bits of a mask are set, which is how many values there are.

    Examples:
        >>> count_kept(compress(torch.tensor([[0.0, 5.0, 0.0, 7.0]])).mask)
        2
    """
    return int((mask[..., None] >> _shifts(mask.device) & 1).sum())


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(BITS, dtype=torch.uint8, device=device)

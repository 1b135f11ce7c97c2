"""Compress a matrix with zeros anywhere into tiles as tensor cores take them, and decompress it again, exactly.

The matrix is cut into tiles of 16 rows, and these into strips of 32 columns, padded with zeros. A strip is two blocks s, products
of 16 rows and 16 columns (PTX, mma.m16n8k16). Rows are numbered 8 h + 4 f + g, columns of a strip 8 q + 4 s + 2 k + e. Lane
16 f + 4 g + q of a warp has, in register h + 2 k of block s, the pair of weights e = 0, 1. Which columns a product takes is free,
since all are summed; in this order a lane reads 16 consecutive bytes of inputs and writes 16 consecutive bytes of a dense row.

A register of half a warp, 16 pairs, has a mask of 32 bits: bit 2 (4 g + q) + e tells whether a weight is not zero. These weights
follow each other in the order of (block, k, h, f, bit). With the masks is stored where those of each block begin, and how many
of the block lie before each mask; so a lane finds its weights by counting the bits of one mask below its own.

Storage is the weights that are not zero and 1.5 bits a weight: at 16 bit 0.59 of the dense bytes at 50 % zeros, 0.39 at 70 %. Bit
masks unpacked into registers of tensor cores are the idea of SpInfer (EuroSys 2025), which counts bits of whole tiles.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

TILE, STRIP = 16, 32
SPARE = 8
"""Values after the last one, since lanes read the next one too."""


class Tiles(NamedTuple):
    """A matrix (O, I) of T = ceil(O / 16) tiles of P = ceil(I / 32) strips.

    Attributes:
        values: (E + 8,), weights that are not zero, in the matrix's dtype; then zeros.
        heads: (T, P, 2, 12), int32: tiles, strips, halves of a warp; masks by (block, register), then for each block the numbers
            of its weights before each of its masks, in 8 bits by register, then where the weights of each block begin.
        rows: O.
        columns: I.
    """

    values: Tensor
    heads: Tensor
    rows: int
    columns: int

    @property
    def nbytes(self) -> int:
        """Number of bytes of all tensors."""
        return self.values.nbytes + self.heads.nbytes


def to_tiles(weight: Tensor) -> Tiles:
    """Compress a matrix.

    Args:
        weight: (O, I), floating point, of fewer than 2^31 weights that are not zero.

    Raises:
        ValueError: If `weight` is no floating-point matrix.

    Examples:
        >>> tiles = to_tiles(torch.tensor([[0.0, 5.0, 0.0, 7.0]]))
        >>> tiles.values[:2], tiles.heads[0, 0, 0, :4]  # both are second in their pair, of registers 0 and 2
        (tensor([5., 7.]), tensor([2, 0, 2, 0], dtype=torch.int32))
        >>> from_tiles(tiles)
        tensor([[0., 5., 0., 7.]])
    """
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        raise ValueError(
            f"Argument `weight` expected to be a floating-point matrix (outputs, inputs), not empty, but got {weight.dtype} of "
            f"shape {tuple(weight.shape)}. Leave it dense."
        )
    rows, columns = weight.shape
    ordered = _ordered(pad(weight, (0, -columns % STRIP, 0, -rows % TILE)))
    there = ordered != 0
    bits = (there.long() << torch.arange(32, device=weight.device)).sum(-1)
    masks = torch.where(bits >= 2**31, bits - 2**32, bits).int()  # (T, P, s, 2 k + h, f)
    counts = there.sum(-1).flatten(3)  # of a block in the order of its values
    ends = counts.sum(-1).flatten().cumsum(0).view(counts.shape[:3])
    before = (counts.cumsum(-1) - counts).to(torch.uint8).view_as(masks)
    starts = (ends - counts.sum(-1)).int()
    heads = [_by_half(masks).flatten(3), _by_half(before).contiguous().view(torch.int32).flatten(3)]
    heads += [starts[:, :, None].expand(-1, -1, 2, -1)]
    return Tiles(torch.cat([ordered[there], weight.new_zeros(SPARE)]), torch.cat(heads, -1), rows, columns)


def from_tiles(tiles: Tiles) -> Tensor:
    """Restore the matrix that was compressed, bit for bit except for the sign of zeros: (O, I)."""
    values, heads, rows, columns = tiles
    masks = heads[..., :8].unflatten(3, (2, 4)).permute(0, 1, 3, 4, 2)  # (T, P, s, 2 k + h, f)
    there = (masks[..., None] >> torch.arange(32, device=masks.device, dtype=torch.int32) & 1).bool()
    ordered = values.new_zeros(there.shape)
    ordered[there] = values[: len(values) - SPARE]
    count, strips = masks.shape[:2]
    weight = ordered.view(count, strips, 2, 2, 2, 2, 4, 4, 2)  # tile, strip, s, k, h, f, g, q, e
    return weight.permute(0, 4, 5, 6, 1, 7, 2, 3, 8).reshape(TILE * count, STRIP * strips)[:rows, :columns].contiguous()


def _by_half(numbers: Tensor) -> Tensor:
    """Reshape (T, P, s, 2 k + h, f) to (T, P, f, s, 2 k + h)."""
    return numbers.permute(0, 1, 4, 2, 3)


def _ordered(weight: Tensor) -> Tensor:
    """Reshape (16 T, 32 P) to the order of values: (T, P, s, 2 k + h, f, 32)."""
    split = weight.unflatten(1, (-1, 4, 2, 2, 2)).unflatten(0, (-1, 2, 2, 4))  # tile, h, f, g, strip, q, s, k, e
    ordered = split.permute(0, 4, 6, 7, 1, 2, 3, 5, 8)
    return ordered.reshape(*ordered.shape[:3], 4, 2, 32)

"""Compress a 2:4 matrix and decompress it again, exactly, in plain torch on any device.

Each group of a row, four consecutive inputs, keeps two values, at positions i0 < i1 of its four; zeros stand in where fewer are
not zero. The two positions make a nibble i0 | i1 << 2.

Values and nibbles lie as the sparse tensor cores of a GPU take them (PTX, mma.sp.m16n8k32): in tiles of 16 rows and strips of
64 inputs, padded with zeros. Letters: T tiles, P strips of a tile. A strip is two steps s of 32 inputs. Rows are numbered
8 h + g, the eight groups of a step 4 u + 2 k + v. Lane 4 g + 2 v + u of a warp keeps the two values of that row and group in
register 2 k + h of step s. Lane 4 g + 2 s + k keeps nibbles of rows g and g + 8: that of h, v and u at bit 16 h + 4 (2 v + u).

The registers of a lane in a step are 16 consecutive bytes. The order of groups within a step is free, since all of them are
summed. This order also lets lanes read 16 consecutive bytes of the inputs, and exchange half of them with one neighbour
(decode_triton.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes that kernels multiply."""
GROUP = 4
TILE = 16
STRIP = 64


class Compressed(NamedTuple):
    """A 2:4 matrix (O, I) of T = ceil(O / 16) tiles of P = ceil(I / 64) strips.

    Attributes:
        values: (T, P, 2, 32, 4, 2): tiles, strips, steps, lanes, registers, values of a group; in the matrix's dtype.
        indices: (T, P, 32), int32.
        rows: O.
        columns: I.
    """

    values: Tensor
    indices: Tensor
    rows: int
    columns: int


def groups_over_two(weight: Tensor) -> int:
    """Count the groups of four consecutive weights of a row that have more than two that are not zero.

    Args:
        weight: (O, I).

    Raises:
        ValueError: If `weight` is no floating-point matrix, or I is no multiple of 4.

    Examples:
        >>> groups_over_two(torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 4.0, 5.0]]))
        1
    """
    return int(((as_groups(weight) != 0).sum(-1) > 2).sum())


def compress(weight: Tensor) -> Compressed:
    """Compress a 2:4 matrix into values and positions.

    Args:
        weight: (O, I), floating point, I a multiple of 4.

    Returns:
        The compressed matrix: 9/16 of the weight's bytes at 16 bit, 17/32 at 32 bit, if 16 divides O and 64 divides I.

    Raises:
        ValueError: If `weight` is no floating-point matrix, I is no multiple of 4, or a group has more than two weights that
            are not zero.

    Examples:
        >>> weight = torch.zeros(16, 64, dtype=torch.float16)
        >>> weight[0, :4] = torch.tensor([0.0, 5.0, 0.0, 7.0])
        >>> compressed = compress(weight)
        >>> sum(part.nbytes for part in (compressed.values, compressed.indices)) / weight.nbytes
        0.5625
        >>> torch.equal(decompress(*compressed), weight)
        True
    """
    over = groups_over_two(weight)
    if over:
        raise ValueError(
            f"Argument `weight` expected at most two weights that are not zero in every four consecutive ones of a row, but "
            f'{over} of {weight.numel() // GROUP} groups have more. Prune with pattern "2:4" first.'
        )
    groups = as_groups(weight)
    a, b, c, d = (groups != 0).unbind(-1)
    first = torch.where(a, 0, torch.where(b, 1, 2))
    last = torch.where(d, 3, torch.where(c, 2, 1))
    first = torch.minimum(first, last - 1)  # if there is none, or one only: a zero on its left stands in
    kept = groups.gather(2, torch.stack([first, last], -1))
    return Compressed(in_order_of_lanes(kept), indices_of(first, last), *weight.shape)


def in_order_of_lanes(kept: Tensor) -> Tensor:
    """Bring the two values of each group, (16 T, 16 P, 2), into the order of `Compressed.values`."""
    return _tiles(kept).permute(0, 3, 4, 2, 7, 5, 6, 1, 8).reshape(len(kept) // TILE, -1, 2, 32, 4, 2)


def indices_of(first: Tensor, last: Tensor) -> Tensor:
    """Make `Compressed.indices` of the two positions of each group, (16 T, 16 P) each."""
    nibbles = _tiles((first | last << 2).to(torch.uint8)).permute(0, 3, 2, 4, 6, 1, 7, 5)
    nibbles = nibbles.reshape(len(first) // TILE, -1, 32, 4, 2)
    return (nibbles[..., 0] | nibbles[..., 1] << 4).view(torch.int32)[..., 0]


def decompress(values: Tensor, indices: Tensor, rows: int, columns: int) -> Tensor:
    """Restore the matrix that was compressed, bit for bit except for the sign of zeros.

    Args:
        values: `Compressed.values`.
        indices: `Compressed.indices`.
        rows: O.
        columns: I.

    Returns:
        The matrix, (O, I).
    """
    tiles, strips = indices.shape[:2]
    kept = values.view(tiles, strips, 2, 8, 2, 2, 2, 2, 2).permute(0, 7, 3, 1, 2, 5, 6, 4, 8).reshape(TILE * tiles, -1, 2)
    octets = indices[..., None].view(torch.uint8)
    nibbles = torch.stack([octets & 15, octets >> 4], -1).view(tiles, strips, 8, 2, 2, 2, 2, 2)
    nibbles = nibbles.permute(0, 5, 2, 1, 3, 7, 4, 6).reshape(TILE * tiles, -1)
    groups = values.new_zeros(*nibbles.shape, GROUP)
    groups.scatter_(2, torch.stack([nibbles & 3, nibbles >> 2], -1).long(), kept)
    return groups.flatten(1)[:rows, :columns].contiguous()


def _tiles(groups: Tensor) -> Tensor:
    """Reshape (16 T, 16 P, ...), by row and group, to (T, h, g, P, s, u, k, v, ...)."""
    return groups.unflatten(1, (-1, 2, 2, 2, 2)).unflatten(0, (-1, 2, 8))


def as_groups(weight: Tensor) -> Tensor:
    """Return the groups of a matrix (O, I), (16 T, 16 P, 4), padded with zeros.

    Raises:
        ValueError: If it is no floating-point matrix, or I is no multiple of 4.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        raise ValueError(
            f"Argument `weight` expected to be a floating-point matrix (outputs, inputs), not empty, but got "
            f"{weight.dtype} of shape {tuple(weight.shape)}."
        )
    if weight.shape[1] % GROUP:
        raise ValueError(
            f"Argument `weight` expected a multiple of {GROUP} inputs but got {weight.shape[1]}. Leave this linear dense."
        )
    return pad(weight, (0, -weight.shape[1] % STRIP, 0, -len(weight) % TILE)).unflatten(1, (-1, GROUP))

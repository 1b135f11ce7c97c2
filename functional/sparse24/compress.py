"""The compressed form of a 2:4 matrix, to and fro, exactly; plain torch on any device.

Letters: O rows (outputs), I columns (inputs), g one of the I / 4 groups of a row. Group g keeps two values, V0[g] at position
i0 and V1[g] at position i1 of its four, 0 <= i0 < i1 <= 3; where fewer are not zero, zeros stand in. Both positions make a
nibble i0 | i1 << 2. Byte j of a row has the nibble of group j in its low half and that of group j + I / 8 in its high half, so
that whoever reads consecutive bytes needs consecutive values.
"""

import torch
from torch import Tensor

GROUP = 4
INPUTS_OF_A_BYTE = 8


def groups_over_two(weight: Tensor) -> int:
    """How many groups of four consecutive weights of a row, (O, I), have more than two that are not zero.

    Raises:
        ValueError: If `weight` is no floating-point matrix, or I is no multiple of 8.
    """
    _check(weight)
    return int((_groups(weight).sum(-1) > 2).sum())


def compress(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values and positions of a 2:4 matrix.

    Args:
        weight: (O, I), floating point, I a multiple of 8.

    Returns:
        Values V0 and V1, (2, O, I / 4), of the weight's dtype, and positions, (O, I / 8), uint8: 9/16 of the weight's bytes at
        16 bit, 17/32 at 32 bit.

    Raises:
        ValueError: If `weight` is no floating-point matrix, I is no multiple of 8, or a group has more than two weights that
            are not zero.
    """
    _check(weight)
    there = _groups(weight)
    over = int((there.sum(-1) > 2).sum())
    if over:
        raise ValueError(
            f"Argument `weight` expected at most two weights that are not zero in every four consecutive ones of a row, but "
            f'{over} of {there[..., 0].numel()} groups have more. Prune with pattern "2:4" first.'
        )
    a, b, c, d = there.unbind(-1)
    first = torch.where(a, 0, torch.where(b, 1, 2))
    last = torch.where(d, 3, torch.where(c, 2, 1))
    first = torch.minimum(first, last - 1)  # of none, or one in the middle: a zero on its left stands in
    groups = weight.unflatten(1, (-1, GROUP))
    values = torch.stack([groups.gather(2, index[..., None])[..., 0] for index in (first, last)])
    nibbles = (first | last << 2).to(torch.uint8)
    half = nibbles.shape[1] // 2
    return values, nibbles[:, :half] | nibbles[:, half:] << 4


def decompress(values: Tensor, indices: Tensor) -> Tensor:
    """The matrix, (O, I), of what `compress` returned; equal to it bit for bit, but for the sign of zeros."""
    nibbles = torch.cat([indices & 15, indices >> 4], 1)
    groups = values.new_zeros(*nibbles.shape, GROUP)
    positions = torch.stack([nibbles & 3, nibbles >> 2], -1).long()
    return groups.scatter_(2, positions, values.movedim(0, -1)).flatten(1)


def _groups(weight: Tensor) -> Tensor:
    """Which weights are not zero, (O, I / 4, 4)."""
    return (weight != 0).unflatten(1, (-1, GROUP))


def _check(weight: Tensor) -> None:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"Argument `weight` expected to be a floating-point matrix (outputs, inputs) but got {weight.dtype} of shape "
            f"{tuple(weight.shape)}."
        )
    if weight.shape[1] % INPUTS_OF_A_BYTE:
        raise ValueError(
            f"Argument `weight` expected a multiple of {INPUTS_OF_A_BYTE} inputs, two groups a byte, but got "
            f"{weight.shape[1]}. Leave this linear dense."
        )

"""Split any matrix into a 2:4 one and the rest: of groups with three or four weights that are not zero, those beyond two.

With zeros at random 9 % of a matrix are rest at 50 % zeros, 5 % at 60 %, 2 % at 70 %. The 2:4 matrix is stored as in
compress.py. The rest has at most two weights in a group, at the positions that the 2:4 matrix leaves out, and so it could be
stored in the same order; but most of that would be zeros. Stored is a word for each weight: its value in the upper 16 bits, and
in the lower ones its place, twice its number among the values of a patch (a tile's four strips, 16 rows and 256 inputs). Words
of a patch lie together, in such an order that 32 of them in turn go to different banks of a GPU's shared memory, as far as
there are such.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from functional.sparse24.compress import DTYPES, Compressed, as_groups, decompress, in_order_of_lanes, indices_of

STRIPS = 4
"""Strips of a patch."""
PLACES = 512 * STRIPS
"""Values of a patch."""
BANKS = 32
ROWS_AT_A_TIME = 1024
"""Rows that are sorted at a time, which takes 20 times their bytes."""
ROUNDS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
"""Words of a patch that a lane can take: the compiler makes a kernel for each."""


class Rest(NamedTuple):
    """What a matrix (O, I), of T tiles of Q patches, has beside a 2:4 one.

    Attributes:
        words: (N,), int32.
        starts: (T Q + 1,), int32; number of the first word of each patch, and N.
        rounds: Words of the fullest patch for each of 32 lanes, the next larger one of `ROUNDS`.
    """

    words: Tensor
    starts: Tensor
    rounds: int


def split(weight: Tensor) -> tuple[Compressed, Rest]:
    """Split a matrix of 16 bit into a 2:4 one and the rest; their sum is the matrix.

    Args:
        weight: (O, I), bfloat16 or float16, I a multiple of 4.

    Returns:
        The compressed 2:4 matrix, and the rest.

    Raises:
        ValueError: If `weight` is no such matrix.

    Examples:
        >>> weight = torch.zeros(16, 64, dtype=torch.float16)
        >>> weight[0, :4] = torch.tensor([1.0, 2.0, 3.0, 4.0])
        >>> compressed, rest = split(weight)
        >>> len(rest.words), rest.rounds, torch.equal(join(compressed, rest), weight)
        (2, 1, True)
    """
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"Argument `weight` expected bfloat16 or float16 but got {weight.dtype}. Leave this linear dense, or cast it."
        )
    groups = as_groups(weight)
    rows, columns = weight.shape
    kept, positions, left = (torch.cat(parts) for parts in zip(*map(_halves, groups.split(ROWS_AT_A_TIME)), strict=True))
    compressed = Compressed(in_order_of_lanes(kept), indices_of(*positions.unbind(-1)), rows, columns)
    rest = in_order_of_lanes(left).flatten(2)
    values = pad(rest, (0, 0, 0, -rest.shape[1] % STRIPS)).reshape(-1, PLACES)
    counts = torch.count_nonzero(values, dim=1)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    patch, place = _by_bank(*(values != 0).nonzero(as_tuple=True))
    words = values[patch, place].view(torch.int16).int() << 16 | 2 * place.int()
    return compressed, Rest(words, starts, rounds_of(starts))


def rounds_of(starts: Tensor) -> int:
    """Return `Rest.rounds` of `Rest.starts`.

    Examples:
        >>> rounds_of(torch.tensor([0, 5, 5, 38], dtype=torch.int32))
        2
    """
    most = -(-int(starts.diff().max()) // BANKS)
    return next(rounds for rounds in ROUNDS if most <= rounds)


def join(compressed: Compressed, rest: Rest) -> Tensor:
    """Restore the matrix that was split, bit for bit except for the sign of zeros: (O, I)."""
    values, indices, rows, columns = compressed
    left = values_in_order(rest, values.dtype).view(len(values), -1, *values.shape[2:])[:, : values.shape[1]]
    return decompress(*compressed) + decompress(left, other_positions(indices), rows, columns)


def values_in_order(rest: Rest, dtype: torch.dtype) -> Tensor:
    """Return the values of a rest, (T Q, 2048), with zeros between them: each patch in the order of `Compressed.values`."""
    words, starts, _ = rest
    patch = torch.arange(len(starts) - 1, device=starts.device).repeat_interleave(starts.diff())
    values = torch.zeros(len(starts) - 1, PLACES, dtype=torch.int16, device=words.device)
    values[patch, (words & 0xFFFF) // 2] = (words >> 16).to(torch.int16)
    return values.view(dtype)


def other_positions(indices: Tensor) -> Tensor:
    """Return, in place of the two positions of each group in `Compressed.indices`, the two others.

    Positions i0 < i1 make a nibble n = i0 | i1 << 2. The others make n ^ 5, but n ^ 10 for positions 0 and 1, and for 2 and 3.

    Examples:
        >>> hex(other_positions(torch.tensor(0x448C9DE4, dtype=torch.int32)).item() & 0xFFFFFFFF)
        '0xeed9c84e'
    """
    ends = (~indices >> 3 | indices >> 1) & 0x11111111
    return indices ^ 0x55555555 ^ 15 * ends


def _halves(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return two values of each group, (rows, groups, 4), not zero if it has such; their positions; and the two others."""
    order = (groups == 0).to(torch.uint8).argsort(stable=True)
    kept, left = (half.sort(-1)[0] for half in order.split(2, -1))
    return groups.gather(2, kept), kept.to(torch.uint8), groups.gather(2, left)


def _by_bank(patch: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the entries of each patch: first one of every bank, then a second one of every bank, and so on."""
    bank = place // 2 % BANKS  # two values in a word of memory
    order = (patch * BANKS + bank).argsort(stable=True)
    patch, place, bank = patch[order], place[order], bank[order]
    pair = patch * BANKS + bank
    number = torch.arange(len(pair), device=pair.device)
    turn = number - torch.searchsorted(pair, pair)
    order = ((patch * PLACES + turn) * BANKS + bank).argsort(stable=True)
    return patch[order], place[order]

"""Compress a matrix with zeros anywhere into streams that the lanes of a GPU walk along, and decompress it again, exactly.

Rows are sorted by their number of entries and cut into slices of H rows; each row of a slice is cut into P parts of equal
length, so that all H · P lanes of a program end together. A lane's entries are the weights of its part that are not zero, each
with the step from the column before it, in 4 bits. A gap of more than 15 columns is bridged by entries of value 0. Eight
entries are a chunk: 16 bytes of values at 16 bit, 4 bytes of steps. Lane p · H + h has part p of row h; chunk c of all lanes of
a slice lies before chunk c + 1, in the order of the lanes, so that a warp reads consecutive bytes.

Storage is 20 bits an entry at 16 bit: 5/8 of the dense bytes at 50 % zeros, 3/8 at 70 %, plus some 1 % where parts begin and
where rows of a slice differ. Streams of deltas in place of a mask: GPUs of 4.8 TB/s wait for the instructions that decode, not
for the bytes (MACKO, arXiv 2511.13061, has deltas too, in another order), and a step costs three of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK, LONGEST = 8, 15
MOST_COLUMNS = 2**15 - 1
"""Columns are stored as int16 where parts begin."""
MANY = 8192
"""Rows or columns from which a matrix is cut otherwise."""


class Lanes(NamedTuple):
    """A matrix (O, I) of S = ceil(O / H) slices and C chunks a row in all.

    Attributes:
        values: (C, H, 8), in the matrix's dtype.
        steps: (C, H), int32: eight steps of 4 bits; the first of a part is 0.
        firsts: (S, P, H), int16: column of the first entry of each part.
        starts: (S + 1,), int32: number of chunks a row before each slice.
        order: (S · H,), int32: row of each place; O where there is none.
        rows: O.
        columns: I.
    """

    values: Tensor
    steps: Tensor
    firsts: Tensor
    starts: Tensor
    order: Tensor
    rows: int
    columns: int

    @property
    def nbytes(self) -> int:
        """Number of bytes of all tensors."""
        return sum(part.nbytes for part in self[:5])


class _Entries(NamedTuple):
    """Entries of all rows, in no order: (E,) each."""

    row: Tensor
    place: Tensor
    column: Tensor
    step: Tensor
    value: Tensor


def lanes_of(rows: int, columns: int) -> tuple[int, int]:
    """Return the H and P that were the fastest on one H200 for the nearest of LLaMA-2-7B's shapes (gate, down, q).

    Args:
        rows: O.
        columns: I.

    Examples:
        >>> lanes_of(4096, 4096)
        (16, 32)
    """
    return (32, 16) if rows > MANY else (16, 64) if columns > MANY else (16, 32)


def to_lanes(weight: Tensor, height: int = 16, parts: int = 32) -> Lanes:
    """Compress a matrix.

    Args:
        weight: (O, I), floating point, at most 32767 columns.
        height: H, rows of a slice.
        parts: P, parts of a row.

    Raises:
        ValueError: If `weight` is no floating-point matrix, or has too many columns.

    Examples:
        >>> lanes = to_lanes(torch.tensor([[0.0, 5.0, 0.0, 7.0]]), height=1, parts=1)
        >>> lanes.values, lanes.firsts, lanes.steps  # steps 0 and 2
        (tensor([[[5., 7., 0., 0., 0., 0., 0., 0.]]]), tensor([[[1]]], dtype=torch.int16), tensor([[32]], dtype=torch.int32))
        >>> from_lanes(lanes)
        tensor([[0., 5., 0., 7.]])
    """
    if weight.ndim != 2 or not weight.is_floating_point() or weight.shape[1] > MOST_COLUMNS:
        raise ValueError(
            f"Argument `weight` expected to be a floating-point matrix (outputs, inputs) of at most {MOST_COLUMNS} inputs but "
            f"got {weight.dtype} of shape {tuple(weight.shape)}. Leave it dense."
        )
    rows, columns = weight.shape
    slices, device = -(-rows // height), weight.device
    entries, counts = _entries(weight)
    order = torch.full((slices * height,), rows, dtype=torch.int32, device=device)
    by_count = counts.argsort(stable=True)
    order[:rows] = by_count.int()
    position = torch.empty_like(by_count)
    position[by_count] = torch.arange(rows, device=device)
    last = torch.arange(slices, device=device) * height + height - 1  # of a slice the row with the most entries
    chunks = -(-counts[by_count[last.clamp_max(rows - 1)]] // CHUNK)
    starts = torch.cat([chunks.new_zeros(1), chunks.cumsum(0)])
    piece, lane = position[entries.row] // height, position[entries.row] % height
    part, turn = _cut(entries.place // CHUNK, chunks[piece], parts)
    flat = ((starts[piece] + turn * parts + part) * height + lane) * CHUNK + entries.place % CHUNK
    total = int(starts[-1])
    values = weight.new_zeros(total * height * CHUNK)
    values[flat] = entries.value
    begins = (turn == 0) & (entries.place % CHUNK == 0)
    nibbles = torch.zeros(total * height * CHUNK, dtype=torch.uint8, device=device)
    nibbles[flat] = torch.where(begins, 0, entries.step).to(torch.uint8)
    firsts = torch.zeros(slices, parts, height, dtype=torch.int16, device=device)
    firsts[piece[begins], part[begins], lane[begins]] = entries.column[begins].to(torch.int16)
    pairs = nibbles.view(-1, CHUNK // 2, 2)
    steps = (pairs[..., 0] | pairs[..., 1] << 4).contiguous().view(torch.int32).view(total, height)
    return Lanes(values.view(total, height, CHUNK), steps, firsts, starts.int(), order, rows, columns)


def from_lanes(lanes: Lanes) -> Tensor:
    """Restore the matrix that was compressed, bit for bit except for the sign of zeros: (O, I)."""
    values, steps, firsts, starts, order, rows, columns = lanes
    total, height = steps.shape
    parts, device = firsts.shape[1], values.device
    chunk = torch.arange(total, device=device)
    piece = torch.searchsorted(starts[1:].contiguous(), chunk, right=True)
    part, turn = (chunk - starts[piece]) % parts, (chunk - starts[piece]) // parts
    nibbles = (steps[..., None] >> 4 * torch.arange(CHUNK, device=device, dtype=torch.int32) & 15).long()
    moved = nibbles.cumsum(-1)
    ahead = torch.zeros(len(firsts), parts, int(turn.max()) + 2 if total else 1, height, dtype=torch.long, device=device)
    ahead[piece, part, turn + 1] = moved[..., -1]
    column = firsts.long()[piece, part, :, None] + ahead.cumsum(2)[piece, part, turn][..., None] + moved
    row = order.view(-1, height)[piece].long()[..., None].expand_as(column)
    dense = values.new_zeros(rows + 1, columns)
    real = values != 0  # what bridges a gap has value 0, as has what fills a chunk
    dense[row[real], column[real]] = values[real]
    return dense[:rows]


def _entries(weight: Tensor) -> tuple[_Entries, Tensor]:
    """Return the entries of a matrix (O, I), bridges included, and their number in each row (O,)."""
    row, column = (weight != 0).nonzero(as_tuple=True)  # row after row
    fresh = torch.cat([row.new_ones(1), row[1:] - row[:-1]])[: len(row)] != 0
    step = torch.where(fresh, column, column - column.roll(1))
    bridges = ((step - 1) // LONGEST).clamp_min(0)
    counts = row.new_zeros(len(weight)).index_add_(0, row, 1 + bridges)
    place = (1 + bridges).cumsum(0) - 1 - (counts.cumsum(0) - counts)[row]
    real = _Entries(row, place, column, step - LONGEST * bridges, weight[row, column])
    owner = torch.arange(len(row), device=row.device).repeat_interleave(bridges)
    back = 1 + torch.arange(len(owner), device=row.device) - (bridges.cumsum(0) - bridges)[owner]
    reached = real.column[owner] - real.step[owner] - LONGEST * (back - 1)
    long = torch.full_like(back, LONGEST)
    bridge = _Entries(row[owner], place[owner] - back, reached, long, weight.new_zeros(len(owner)))
    return _Entries(*(torch.cat(pair) for pair in zip(real, bridge, strict=True))), counts


def _cut(chunk: Tensor, chunks: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Return the part that a chunk of a row belongs to, and its number there; where parts differ the first have one more."""
    short, longer = chunks // parts, chunks % parts
    within = longer * (short + 1)
    late = chunk - within
    in_long = late < 0
    part = torch.where(in_long, chunk // (short + 1), longer + late // short.clamp_min(1))
    return part, torch.where(in_long, chunk % (short + 1), late % short.clamp_min(1))

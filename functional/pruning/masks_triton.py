"""`masks.keep_largest_of_rows` as one GPU kernel: a program holds a row in registers and bisects its threshold.

The order of float32 numbers is that of integers made of their bits, so 32 halvings find the threshold exactly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 16384
"""Columns of a row that a program can hold."""
ENTRIES = 4096
"""A program takes as many rows as have about so many entries."""


@triton.jit
def _keep_kernel(
    score_ptr, keep_ptr, rows, columns, num_zeros, WIDTH: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    score = tl.load(score_ptr + at, mask=inside, other=float("inf"))
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # both zeros are one number
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(inside, key, 0x7FFFFFFF)  # above infinity
    low = tl.full((ROWS,), -0x80000000, tl.int32)
    high = tl.full((ROWS,), 0x7FFFFFFF, tl.int32)
    for _ in range(32):  # the least number that `num_zeros` entries do not exceed
        middle = (low & high) + ((low ^ high) >> 1)
        enough = tl.sum((key <= middle[:, None]).to(tl.int32), 1) >= num_zeros
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    below, equal = key < low[:, None], key == low[:, None]
    missing = num_zeros - tl.sum(below.to(tl.int32), 1)
    first = tl.zeros((ROWS,), tl.int32)
    last = tl.full((ROWS,), WIDTH - 1, tl.int32)
    for _ in range(STEPS):  # ties lose from the left: the column of the last that does; a cumulative sum went wrong on a GPU
        middle = (first + last) // 2
        enough = tl.sum((equal & (column[None, :] <= middle[:, None])).to(tl.int32), 1) >= missing
        last = tl.where(enough, middle, last)
        first = tl.where(enough, first, middle + 1)
    dropped = below | (equal & (column[None, :] <= first[:, None]))
    tl.store(keep_ptr + at, 1 - dropped.to(tl.int8), mask=inside)


def fits(scores: Tensor) -> bool:
    """Whether the kernel is for these scores."""
    return scores.dtype == torch.float32 and scores.shape[-1] <= WIDEST


def keep_largest_of_rows(scores: Tensor, num_zeros: int) -> Tensor:
    """Drop the `num_zeros` smallest scores of every row (last dimension), at least 1: bool, like `scores`, float32."""
    flat = scores.reshape(-1, scores.shape[-1]).contiguous()
    keep = torch.empty_like(flat, dtype=torch.int8)
    width = triton.next_power_of_2(flat.shape[1])
    rows = max(ENTRIES // width, 1)
    warps = 4 if width <= ENTRIES else 8
    _keep_kernel[(triton.cdiv(len(flat), rows),)](
        flat, keep, *flat.shape, num_zeros, WIDTH=width, STEPS=width.bit_length() - 1, ROWS=rows, num_warps=warps
    )
    return keep.view(torch.bool).view_as(scores)

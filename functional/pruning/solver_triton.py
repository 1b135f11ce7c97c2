"""The sweep over one block of columns as a single GPU kernel: what `solver._sweep` does with a launch for every column.

A program owns a few rows and walks over the columns with all of them in registers; rows do not depend on each other. Runs on
CPU tensors too under ``TRITON_INTERPRET=1``, which is how it is tested where there is no GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4
"""Rows of a program: 128 columns of 4 rows fit into the registers of four warps."""


@triton.jit
def _sweep_kernel(
    weight_ptr, keep_ptr, factor_ptr, square_ptr, linear_ptr, row_ptr,
    new_ptr, kept_ptr, error_ptr, score_ptr, rows, columns,
    ZEROS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    at = row[:, None] * columns + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    keep = tl.load(keep_ptr + at, mask=inside, other=1)
    error = tl.zeros((ROWS, WIDTH), tl.float32)
    score = tl.zeros((ROWS, WIDTH), tl.float32)
    if GROUP > 0:
        square = tl.load(square_ptr + column, mask=column < columns, other=0.0)
        linear = tl.load(linear_ptr + column, mask=column < columns, other=0.0)
        row_term = tl.load(row_ptr + row, mask=row < rows, other=0.0)
    for j in range(columns):
        if GROUP > 0:  # a constant: without a pattern nothing of this is compiled
            begins = j % GROUP == 0
            if begins:  # the scores of this group, from the weights as updated by now
                now = square[None, :] * weight * weight + row_term[:, None] * linear[None, :] * tl.abs(weight)
                rank = tl.zeros((ROWS, WIDTH), tl.int32)
                for k in tl.static_range(GROUP):
                    other = tl.sum(tl.where(column[None, :] == j + k, now, 0.0), 1)[:, None]
                    before = (other < now) | ((other == now) & (j + k < column)[None, :])  # ties lose from the left
                    rank += before.to(tl.int32)
                group = ((column >= j) & (column < j + GROUP))[None, :]
                keep = tl.where(group, (rank >= ZEROS).to(tl.int8), keep)
                score = tl.where(group, now, score)
        here = (column == j)[None, :]
        value = tl.sum(tl.where(here, weight, 0.0), 1)
        kept = tl.sum(tl.where(here, keep.to(tl.int32), 0), 1)
        pivot = tl.load(factor_ptr + j * columns + j)
        step = tl.where(kept != 0, 0.0, value / pivot)
        later = tl.load(factor_ptr + j * columns + column, mask=(column > j) & (column < columns), other=0.0)
        weight = tl.where(here & (kept == 0)[:, None], 0.0, weight - step[:, None] * later[None, :])
        error = tl.where(here, step[:, None], error)
    # Never in place: a small tile is held by several warps, and one could store before another has loaded.
    tl.store(new_ptr + at, weight, mask=inside)
    tl.store(kept_ptr + at, keep, mask=inside)
    tl.store(error_ptr + at, error, mask=inside)
    if GROUP > 0:
        tl.store(score_ptr + at, score, mask=inside)


def sweep(
    weight: Tensor, keep: Tensor, factor: Tensor, terms: tuple[Tensor, Tensor, Tensor], zeros: int, group: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sweep over the columns of one block.

    Args:
        weight: (rows, columns), float32.
        keep: (rows, columns), bool; chosen here when `group` is not 0.
        factor: U of these columns, (columns, columns), upper triangular.
        terms: Coefficients of W² (columns,), of |W| (columns,), and of |W| by row (rows,).
        zeros: N of N:M.
        group: M of N:M; 0 keeps `keep`.

    Returns:
        New weights, mask, errors (w − q) / U_jj and, with a group, the scores that chose it; each (rows, columns).
    """
    rows, columns = weight.shape
    weight, keep, factor = weight.contiguous(), keep.to(torch.int8).contiguous(), factor.contiguous()
    new, kept, errors, scores = (
        torch.empty_like(weight),
        torch.empty_like(keep),
        torch.empty_like(weight),
        torch.zeros_like(weight),
    )
    _sweep_kernel[(triton.cdiv(rows, ROWS),)](
        weight, keep, factor, *(term.contiguous() for term in terms), new, kept, errors, scores, rows, columns,
        ZEROS=zeros, GROUP=group, WIDTH=triton.next_power_of_2(columns), ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return new, kept.bool(), errors, scores

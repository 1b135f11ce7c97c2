"""Update one block of columns in three GPU launches: scores, a sort, the sweep over the columns.

`solver` does the same with a launch for every operation and column. In the sweep a program owns a few rows, which do not depend
on others, keeps their columns in registers and walks over them. All kernels read and write whole matrices rather than copies of
the block. With ``TRITON_INTERPRET=1`` they run on CPU tensors, which is how they are tested without a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 4
"""Rows of one program of the sweep: 128 columns of 4 rows fit into the registers of four warps."""
SCORED_ROWS = 16


@triton.jit
def _score_kernel(
    weight_ptr, square_ptr, linear_ptr, row_ptr, score_ptr, rows, columns, start, width,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    weight = tl.load(weight_ptr + row[:, None].to(tl.int64) * columns + start + column[None, :], mask=inside, other=0.0)
    square = tl.load(square_ptr + start + column, mask=column < width, other=0.0)
    linear = tl.load(linear_ptr + start + column, mask=column < width, other=0.0)
    row_term = tl.load(row_ptr + row, mask=row < rows, other=0.0)
    score = square[None, :] * weight * weight + row_term[:, None] * linear[None, :] * tl.abs(weight)
    tl.store(score_ptr + row[:, None] * width + column[None, :], score, mask=inside)


@triton.jit
def _sweep_kernel(
    weight_ptr, factor_ptr, square_ptr, linear_ptr, row_ptr, chosen_ptr, value_ptr, index_ptr,
    new_ptr, kept_ptr, score_ptr, error_ptr,
    rows, columns, start, width, first_row, rows_of_part, num_zeros,
    ZEROS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = first_row + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    at = row[:, None].to(tl.int64) * columns + start + column[None, :]
    in_block = row[:, None] * width + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < width)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    error = tl.zeros((ROWS, WIDTH), tl.float32)
    if GROUP > 0:  # a constant: without a pattern nothing of this is compiled
        keep = tl.full((ROWS, WIDTH), 1, tl.int8)
        score = tl.zeros((ROWS, WIDTH), tl.float32)
        square = tl.load(square_ptr + start + column, mask=column < width, other=0.0)
        linear = tl.load(linear_ptr + start + column, mask=column < width, other=0.0)
        row_term = tl.load(row_ptr + row, mask=row < rows, other=0.0)
    else:  # the smallest kept entry of a part is that number `num_zeros` of a stable order: ties lose from the left
        score = tl.load(chosen_ptr + in_block, mask=inside, other=0.0)
        part = (row - first_row) // rows_of_part
        begin = part.to(tl.int64) * rows_of_part * width
        entry = begin + num_zeros
        there = (row < rows) & (entry < begin + rows_of_part * width)  # else none is kept
        least = tl.load(value_ptr + entry, mask=there, other=float("inf"))[:, None]
        place = tl.load(index_ptr + entry, mask=there, other=0)[:, None]
        own = (row - first_row - part * rows_of_part)[:, None].to(tl.int64) * width + column[None, :]
        keep = tl.where((score < least) | ((score == least) & (own < place)), 0, 1).to(tl.int8)
    for j in range(width):
        if GROUP > 0:
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
        line = factor_ptr + (start + j).to(tl.int64) * columns + start
        step = tl.where(kept != 0, 0.0, value / tl.load(line + j))
        later = tl.load(line + column, mask=(column > j) & (column < width), other=0.0)
        weight = tl.where(here & (kept == 0)[:, None], 0.0, weight - step[:, None] * later[None, :])
        error = tl.where(here, step[:, None], error)
    # Not in place: several warps hold a small tile, and one could store before another has loaded.
    tl.store(new_ptr + at, weight, mask=inside)
    tl.store(kept_ptr + at, keep, mask=inside)
    tl.store(score_ptr + at, score, mask=inside)
    tl.store(error_ptr + in_block, error, mask=inside)


class Sweeper:
    """State of one weight update: matrices that are filled block by block.

    Args:
        weight: (O, I), float32, contiguous; after each sweep the caller updates its later columns from the errors.
        factor: U, (I, I), upper triangular, contiguous.
        terms: Coefficients of W², (I,), and of |W| by column, (I,), and by row, (O,).

    Attributes:
        new: Swept weights, (O, I).
        kept: Mask, (O, I), as bytes.
        scores: Scores that chose the mask, (O, I).
    """

    def __init__(self, weight: Tensor, factor: Tensor, terms: tuple[Tensor, Tensor, Tensor]) -> None:
        self._weight, self._factor = weight, factor
        self._terms = tuple(term.contiguous() for term in terms)
        self.new, self.scores = torch.empty_like(weight), torch.empty_like(weight)
        self.kept = torch.empty_like(weight, dtype=torch.int8)

    def score(self, start: int, width: int) -> Tensor:
        """Compute the scores of a block of columns, (O, width), contiguous."""
        rows, columns = self._weight.shape
        scores = self._weight.new_empty(rows, width)
        _score_kernel[(triton.cdiv(rows, SCORED_ROWS),)](
            self._weight, *self._terms, scores, rows, columns, start, width,
            WIDTH=triton.next_power_of_2(width), ROWS=SCORED_ROWS, num_warps=4,
        )  # fmt: skip
        return scores

    def sweep(
        self, start: int, width: int, errors: Tensor, rows: tuple[int, int, int], scores: Tensor | None, num_zeros: int
    ) -> None:
        """Drop the smallest scores of each part, and sweep.

        Args:
            start: First column.
            width: Number of columns.
            errors: (O, width), receives (w − q) / U_jj.
            rows: First row, last row + 1, and number of rows of a part.
            scores: Result of `score`.
            num_zeros: Number of entries that each part drops.
        """
        first, last, of_part = rows
        order = torch.sort(scores[first:last].view(-1, of_part * width), dim=-1, stable=True)
        self._launch(start, width, errors, first, last, of_part, (scores, order.values, order.indices), num_zeros, 0, 0)

    def sweep_groups(self, start: int, width: int, errors: Tensor, zeros: int, group: int) -> None:
        """Sweep, and choose the mask of each group of columns on the way, from the weights as updated by then.

        Args:
            start: First column.
            width: Number of columns.
            errors: (O, width), receives (w − q) / U_jj.
            zeros: N of the pattern.
            group: M of the pattern.
        """
        last = len(self._weight)
        unused = (self._weight, self._weight, self._weight)
        self._launch(start, width, errors, 0, last, last, unused, 0, zeros, group)

    def _launch(self, start, width, errors, first, last, of_part, chosen, num_zeros, zeros, group) -> None:
        _sweep_kernel[(triton.cdiv(last - first, ROWS),)](
            self._weight, self._factor, *self._terms, *chosen, self.new, self.kept, self.scores, errors,
            last, self._weight.shape[1], start, width, first, of_part, num_zeros,
            ZEROS=zeros, GROUP=group, WIDTH=triton.next_power_of_2(width), ROWS=ROWS, num_warps=4,
        )  # fmt: skip

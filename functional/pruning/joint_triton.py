"""Split F = B + U of the joint solver in one GPU launch (functional.pruning.joint_split).

With ``TRITON_INTERPRET=1`` the kernel runs on CPU tensors, which is how it is tested without a GPU.
"""

import triton
import triton.language as tl
from torch import Tensor

from functional.pruning.masks import Pattern
from functional.pruning.scores import ScoreTerms

ROWS, COLUMNS = 4, 512
"""Size of the tile of a program."""


@triton.jit
def _score(size, square, linear, row):
    return (square * size + row * linear) * size


@triton.jit
def _split_kernel(
    free_ptr, dense_ptr, square_ptr, linear_ptr, row_ptr, limit_ptr, base_ptr, change_ptr, rows, columns, ratio,
    ZEROS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    line = row[:, None].to(tl.int64) * columns
    free = tl.load(free_ptr + line + column[None, :], mask=inside, other=0.0)
    dense = tl.load(dense_ptr + line + column[None, :], mask=inside, other=0.0)
    square = tl.load(square_ptr + column, mask=column < columns, other=0.0)[None, :]
    linear = tl.load(linear_ptr + column, mask=column < columns, other=0.0)[None, :]
    row_term = tl.load(row_ptr + row, mask=row < rows, other=0.0)[:, None]
    score = _score(tl.abs(free), square, linear, row_term)
    if GROUP > 0:  # a constant: only one of the two is compiled
        rank = tl.zeros((ROWS, COLUMNS), tl.int32)
        place = column % GROUP
        for k in tl.static_range(1, GROUP):  # the others of the group
            other = column - place + (place + k) % GROUP
            size = tl.abs(tl.load(free_ptr + line + other[None, :], mask=inside, other=0.0))
            square = tl.load(square_ptr + other, mask=column < columns, other=0.0)[None, :]
            linear = tl.load(linear_ptr + other, mask=column < columns, other=0.0)[None, :]
            against = _score(size, square, linear, row_term)
            before = (against < score) | ((against == score) & (other < column)[None, :])  # ties lose from the left
            rank += before.to(tl.int32)
        dropped = rank < ZEROS
    else:
        dropped = score < tl.load(limit_ptr + row, mask=row < rows, other=0.0)[:, None]
    multiplier = tl.where(dropped, free, 0.0)
    tl.store(base_ptr + line + column[None, :], dense + ratio * multiplier, mask=inside)
    tl.store(change_ptr + line + column[None, :], free - dense - (1 + ratio) * multiplier, mask=inside)


def split_by_kernel(
    free: Tensor,
    dense: Tensor,
    terms: ScoreTerms,
    limits: Tensor | Pattern,
    ratio: float,
    base: Tensor,
    change: Tensor,
) -> None:
    """Do what :func:`functional.pruning.joint_split.split` does.

    Args:
        free: F, (ΣO, I), contiguous, as all matrices; not modified.
        dense: B₀, (ΣO, I).
        terms: Score of a weight.
        limits: Scores below which weights of each row are dropped, (ΣO, 1), or N:M.
        ratio: r, the penalty before divided by the next one.
        base: (ΣO, I), receives B₀ + r U; other memory than F's.
        change: (ΣO, I), receives Z − r U − B₀.
    """
    rows, columns = free.shape
    coefficients = (term.contiguous() for term in terms.coefficients(slice(None), rows))
    zeros, group, limit = (limits.zeros, limits.group, free) if isinstance(limits, Pattern) else (0, 0, limits.contiguous())
    _split_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS))](
        free, dense, *coefficients, limit, base, change, rows, columns, ratio,
        ZEROS=zeros, GROUP=group, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip

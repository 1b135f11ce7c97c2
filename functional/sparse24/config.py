"""How `decode` divides its work among programs and warps, as it was fastest where it was measured."""

from typing import NamedTuple

from functional.sparse24.compress import STRIP
from functional.sparse24.rest import STRIPS

OF_A_PASS = 16
"""Tokens of a pass over the weights."""
MOST_TOKENS = 32
"""Most tokens of `decode`. Two passes take less time than a dense product and restoring its matrix (results/sparse_decode.csv);
three were not measured."""
WARPS = (1, 2, 4, 8, 16, 32)
MOST_BUFFERS = 8
"""Patches of a rest in shared memory at a time, one for each tile and warp: a kernel can declare 48 KiB."""
MANY = 8192
"""Rows or columns from which a matrix has many rows or long ones."""


class Config(NamedTuple):
    """Division of the work of `decode` among programs and warps.

    Attributes:
        tiles: Tiles of 16 outputs that a program computes; 1, 2 or 4.
        warps: Warps of a program, which share the inputs.
        unroll: Strips on their way into the registers of a warp at a time; with a rest a multiple of 4.
    """

    tiles: int
    warps: int
    unroll: int


FASTEST = {
    (8, "few rows"): Config(1, 4, 8), (8, "long rows"): Config(1, 4, 8), (8, "many rows"): Config(2, 2, 8),
    (16, "few rows"): Config(1, 4, 4), (16, "long rows"): Config(1, 4, 4), (16, "many rows"): Config(2, 2, 4),
}  # fmt: skip
"""Largest number of tokens, and shape -> fastest configuration for LLaMA-2-7B's linears (q, down, gate) on an H200
(benchmarks/sparse24_tuning.py)."""
FASTEST_WITH_REST = {
    (8, "few rows"): Config(1, 4, 4), (8, "long rows"): Config(1, 4, 8), (8, "many rows"): Config(1, 2, 4),
    (16, "few rows"): Config(1, 4, 4), (16, "long rows"): Config(1, 4, 4), (16, "many rows"): Config(2, 2, 4),
}  # fmt: skip
"""The same for matrices with a rest, at 50 and 70 % zeros."""


def default_config(tokens: int, rows: int, columns: int, has_rest: bool = False) -> Config:
    """Return the entry of `FASTEST` or `FASTEST_WITH_REST` for the nearest shape.

    Args:
        tokens: Number of tokens of a pass.
        rows: O.
        columns: I.
        has_rest: Whether there is a rest.

    Raises:
        ValueError: If there are more tokens than a pass takes.

    Examples:
        >>> default_config(tokens=1, rows=4096, columns=4096)
        Config(tiles=1, warps=4, unroll=8)
    """
    if tokens > OF_A_PASS:
        raise ValueError(
            f"Argument `tokens` expected at most {OF_A_PASS}, the tokens of one pass, but got {tokens}. Split them."
        )
    table = FASTEST_WITH_REST if has_rest else FASTEST
    most = next(most for most in sorted({most for most, _ in table}) if tokens <= most)
    chosen = table[most, "many rows" if rows > MANY else "long rows" if columns > MANY else "few rows"]
    strips = -(-columns // STRIP)
    return chosen._replace(warps=min(chosen.warps, 1 << strips.bit_length() - 1))


def possible(config: Config, has_rest: bool) -> bool:
    """Return whether the kernel can have a division of the work."""
    tiles, warps, unroll = config
    right = tiles in (1, 2, 4) and warps in WARPS and unroll >= 1
    return right and not (has_rest and (unroll % STRIPS or tiles * warps > MOST_BUFFERS))


def check_config(config: Config, has_rest: bool) -> None:
    """Refuse a division that the kernel cannot have.

    Raises:
        ValueError: If it is one.
    """
    if not possible(config, has_rest):
        raise ValueError(
            f"Argument `config` expected 1, 2 or 4 tiles, a power of two of at most {max(WARPS)} warps, and an unroll of 1 or "
            f"more (with a rest at most {MOST_BUFFERS} tiles times warps, and a multiple of {STRIPS}) but got {config}. "
            "Leave it out for the default."
        )

"""Layouts of fused linears: which output rows belong to which projection.

A layout is a function (out_features, config) -> part -> rows. Rows that lie together are a slice, others an index. The order of
the rows cannot be seen in shapes or weights; the test of the rows that attention reads
(tests/lightning_modules/parts/test_architectures.py) has a case for every family with a layout.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Rows = slice | Tensor
Layout = Callable[[int, Any], dict[str, Rows]]

QKV = ("q", "k", "v")


def equal(*parts: str) -> Layout:
    """Return the layout of parts of one size, one after the other.

    Examples:
        >>> equal("gate", "up")(8, None)
        {'gate': slice(0, 4, None), 'up': slice(4, 8, None)}
    """

    def rows(out_features: int, config: Any) -> dict[str, Rows]:
        return _one_after_the_other(out_features, dict.fromkeys(parts, 1))

    return rows


def by_projection(out_features: int, config: Any) -> dict[str, Rows]:
    """Return all rows of q, then of k, then of v, with fewer heads of k and v than of q (Phi-3).

    Args:
        out_features: Number of rows.
        config: Has num_attention_heads and num_key_value_heads.
    """
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    return _one_after_the_other(out_features, {"q": heads, "k": shared, "v": shared})


def by_head(out_features: int, config: Any) -> dict[str, Rows]:
    """Return the rows of q, k and v of the first head, then of the second, and so on (GPT-NeoX, BLOOM).

    Args:
        out_features: Number of rows.
        config: Has num_attention_heads.
    """
    return _by_group(out_features, config.num_attention_heads, {"q": 1, "k": 1, "v": 1})


def of_falcon(out_features: int, config: Any) -> dict[str, Rows]:
    """Return Falcon's rows: by groups of heads that share k and v, by head, or all of q and then one k and v.

    Args:
        out_features: Number of rows.
        config: Has num_attention_heads, num_kv_heads, new_decoder_architecture and multi_query.
    """
    heads = config.num_attention_heads
    if config.new_decoder_architecture:
        groups = config.num_kv_heads
        return _by_group(out_features, groups, {"q": heads // groups, "k": 1, "v": 1})
    if config.multi_query:
        return _one_after_the_other(out_features, {"q": heads, "k": 1, "v": 1})
    return by_head(out_features, config)


def _one_after_the_other(out_features: int, shares: dict[str, int]) -> dict[str, Rows]:
    size, start, found = _unit(out_features, shares), 0, {}
    for part, share in shares.items():
        found[part] = slice(start, start + share * size)
        start += share * size
    return found


def _by_group(out_features: int, groups: int, shares: dict[str, int]) -> dict[str, Rows]:
    size = _unit(out_features, dict.fromkeys(range(groups), sum(shares.values())))
    rows = torch.arange(out_features).view(groups, -1, size)
    return dict(zip(shares, (part.flatten() for part in rows.split(list(shares.values()), dim=1)), strict=True))


def _unit(out_features: int, shares: dict[Any, int]) -> int:
    """Return the number of rows of a share.

    Raises:
        ValueError: If the rows are not a multiple of the shares.
    """
    size, rest = divmod(out_features, sum(shares.values()))
    if rest:
        raise ValueError(f"{out_features} rows do not fall into {sum(shares.values())} equal parts")
    return size

"""Store and multiply 2:4 linears: at most two of every four consecutive weights of a row are not zero.

`compress` keeps the two values of each group and their positions, 9/16 of the bytes at 16 bit. `decode` multiplies the result
with a few tokens, when a GPU waits for the weights; `prefill` with many, by cuSPARSELt.
"""

from functional.sparse24 import prefill
from functional.sparse24.compress import GROUP, Compressed, compress, decompress, groups_over_two
from functional.sparse24.decode import DTYPES, MOST_TOKENS, Config, decode, default_config, expand

__all__ = [
    "DTYPES",
    "GROUP",
    "MOST_TOKENS",
    "Compressed",
    "Config",
    "compress",
    "decode",
    "decompress",
    "default_config",
    "expand",
    "groups_over_two",
    "prefill",
]

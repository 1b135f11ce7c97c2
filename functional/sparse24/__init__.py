"""Store and multiply 2:4 linears: at most two of every four consecutive weights of a row are not zero.

`compress` keeps the two values of each group and their positions, 9/16 of the bytes at 16 bit. `decode` multiplies the result
with a few tokens, when a GPU waits for the weights; `prefill` with many, by cuSPARSELt. For zeros anywhere `split` makes of a
matrix a 2:4 one and the rest, which `decode` takes beside it.
"""

from functional.sparse24 import prefill
from functional.sparse24.compress import DTYPES, GROUP, Compressed, compress, decompress, groups_over_two
from functional.sparse24.config import MOST_TOKENS, OF_A_PASS, Config, default_config
from functional.sparse24.decode import decode, expand
from functional.sparse24.rest import Rest, join, split

__all__ = [
    "DTYPES",
    "GROUP",
    "MOST_TOKENS",
    "OF_A_PASS",
    "Compressed",
    "Config",
    "Rest",
    "compress",
    "decode",
    "decompress",
    "default_config",
    "expand",
    "groups_over_two",
    "join",
    "prefill",
    "split",
]

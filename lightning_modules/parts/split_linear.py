"""SplitLinear: a linear with zeros anywhere as a 2:4 matrix and the rest, for a few tokens on a GPU; for inference only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from functional.sparse24 import (
    DTYPES,
    GROUP,
    MOST_TOKENS,
    Compressed,
    Rest,
    decode,
    expand,
    groups_over_two,
    join,
    split,
)
from functional.sparse24.rest import rounds_of
from lightning_modules.parts.compressed_base import CompressedLinear, bias_of, on_gpu, try_product, zeros_of
from lightning_modules.parts.sparse_linear import LEAST_ZEROS


class SplitLinear(CompressedLinear):
    """``nn.Linear`` with a compressed weight of 16 bit: some 0.75 of its bytes at 50 % zeros, 0.61 at 70 %.

    On a GPU, up to 32 tokens are multiplied with the compressed form: eight of them faster than with a dense linear, and faster
    than by `LaneLinear`, which is smaller and ahead with one (times: docs/speed.md). More tokens, and tokens of another dtype
    than the weight's, as under autocast, are multiplied with the dense weight, which is made for the call and freed.

    Args:
        weight: 2:4 part of the result of `functional.sparse24.split`, (O, I).
        rest: Its rest.
        bias: (O,), or None.
    """

    def __init__(self, weight: Compressed, rest: Rest, bias: Tensor | None) -> None:
        super().__init__(weight.rows, weight.columns, bias)
        self.register_buffer("values", weight.values)
        self.register_buffer("indices", weight.indices)
        self.register_buffer("words", rest.words)
        self.register_buffer("starts", rest.starts)
        self.rounds = rest.rounds

    @staticmethod
    def fits(linear: nn.Linear) -> bool:
        """Return whether a linear is of 16 bit, has a multiple of 4 inputs and enough zeros, and is not 2:4 as it is."""
        weight = linear.weight.detach()
        possible = weight.dtype in DTYPES and weight.shape[1] % GROUP == 0
        return possible and zeros_of(linear) >= LEAST_ZEROS and groups_over_two(weight) > 0

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "SplitLinear":
        """Compress the weight of a linear on its device; negative zeros become positive ones.

        Raises:
            ValueError: If the weight is not of 16 bit, or the number of inputs is no multiple of 4.
        """
        return cls(*split(linear.weight.detach()), bias_of(linear))

    @property
    def compressed(self) -> Compressed:
        """2:4 part of the weight as it is stored."""
        return Compressed(self.values, self.indices, self.out_features, self.in_features)

    @property
    def rest(self) -> Rest:
        """Rest of the weight as it is stored."""
        return Rest(self.words, self.starts, self.rounds)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SplitLinear":
        """Move or cast the module; a cast is refused, since words hold the bits of values.

        Raises:
            TypeError: If it is one.
        """
        cast = fn(self.values.new_empty(0)).dtype
        if cast != self.values.dtype:
            raise TypeError(
                f"SplitLinear expected to stay {self.values.dtype} but is cast to {cast}. Cast the model before its linears "
                "are compressed."
            )
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *others: Any) -> None:
        """Load buffers, and find the rounds that these need; another dtype is refused, since words hold the bits of values.

        Raises:
            TypeError: If it is another.
        """
        values = state_dict.get(f"{prefix}values", self.values)
        if values.dtype != self.values.dtype:
            raise TypeError(
                f"SplitLinear expected to load {prefix}values of {self.values.dtype} but got {values.dtype}. Compress a linear "
                "of that dtype."
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, *others)
        self.rounds = rounds_of(self.starts)

    def dense(self) -> Tensor:
        """Return the dense weight, (O, I)."""
        return (expand if self.values.is_cuda else join)(self.compressed, self.rest)

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply tokens, (tokens, I), and return (tokens, O)."""
        if on_gpu(x) and x.dtype == self.values.dtype and len(x) <= MOST_TOKENS:
            return decode(x, self.compressed, self.bias, None, self.rest)
        return self.multiply_cast(x)


def try_split(device: torch.device) -> None:
    """Check that the kernels run on a device before a model relies on them.

    Raises:
        ValueError: If they do not, because Triton or a C compiler is missing, or the GPU has no sparse tensor cores.
    """
    weight = torch.ones(1, GROUP, device=device, dtype=torch.bfloat16)
    needs = "Triton, a C compiler and, for a GPU, compute capability 8.0 or more, for 2:4 and rest"
    main, rest = split(weight)
    try_product(lambda: decode(weight, main, None, None, rest), "auto", needs)

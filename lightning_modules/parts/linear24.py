"""Linear24: a linear whose weight is 2:4, stored compressed; for inference only."""

import torch
from torch import Tensor, nn

from functional.sparse24 import (
    DTYPES,
    GROUP,
    MOST_TOKENS,
    OF_A_PASS,
    Compressed,
    compress,
    decode,
    decompress,
    expand,
    groups_over_two,
    prefill,
)
from lightning_modules.parts.compressed_base import CompressedLinear, bias_of, on_gpu, try_product


class Linear24(CompressedLinear):
    """``nn.Linear`` with a compressed 2:4 weight: 9/16 of its bytes at 16 bit, 17/32 at 32 bit.

    On a GPU, up to 32 tokens are multiplied with the compressed form of a 16 bit weight (times: docs/speed.md). More tokens,
    and tokens of another dtype than the weight's, as under autocast, are multiplied with the dense weight, which is made for
    the call and freed: slower than a dense linear, and many times slower on a CPU or for a 32 bit weight, for which there is no
    kernel. After `prepare_prefill`, more than 16 tokens inside a CUDA graph or torch.compile go through cuSPARSELt; that form
    takes another 9/16.

    Args:
        weight: Result of `functional.sparse24.compress`, (O, I).
        bias: (O,), or None.
    """

    def __init__(self, weight: Compressed, bias: Tensor | None) -> None:
        super().__init__(weight.rows, weight.columns, bias)
        self.register_buffer("values", weight.values)
        self.register_buffer("indices", weight.indices)
        self.register_buffer("packed", None, persistent=False)
        self.algorithm = [0, 1, -1]

    @staticmethod
    def fits(linear: nn.Linear) -> bool:
        """Return whether a linear is 2:4, with a multiple of 4 inputs."""
        return linear.in_features % GROUP == 0 and not groups_over_two(linear.weight.detach())

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "Linear24":
        """Compress the weight of a linear on its device.

        Raises:
            ValueError: If the weight is not 2:4, or the number of inputs is no multiple of 4.
        """
        return cls(compress(linear.weight.detach()), bias_of(linear))

    @property
    def compressed(self) -> Compressed:
        """Weight as it is stored."""
        return Compressed(self.values, self.indices, self.out_features, self.in_features)

    def dense(self) -> Tensor:
        """Return the dense weight, (O, I)."""
        if self.values.is_cuda and self.values.dtype in DTYPES:
            return expand(self.compressed)
        return decompress(*self.compressed)

    def prepare_prefill(self, tokens: int) -> "Linear24":
        """Also keep cuSPARSELt's form of the weight, with the algorithm that is fastest for a number of tokens.

        Call it on the final device before a graph is captured, and again after the linear was moved or cast.

        Raises:
            ValueError: If the weight is not on a GPU, not bfloat16 or float16, or O or I is no multiple of 16.
        """
        self.packed = prefill.pack(self.dense())
        self.algorithm = prefill.fastest(self.packed, self.values.new_zeros(tokens, self.in_features))
        return self

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply tokens, (tokens, I), and return (tokens, O)."""
        as_stored = x.dtype == self.values.dtype and x.dtype in DTYPES
        if as_stored and self.packed is not None and len(x) > OF_A_PASS and in_graph():
            y = prefill.multiply(x, self.packed, self.out_features, self.algorithm)
            return y if self.bias is None else y + self.bias
        if on_gpu(x) and as_stored and len(x) <= MOST_TOKENS:
            return decode(x, self.compressed, self.bias)
        return super().multiply(x)  # outside a graph cuSPARSELt plans for 0.45 ms a call; a dense weight takes some 0.03 ms


def in_graph() -> bool:
    """Return whether a CUDA graph is being captured or torch.compile is tracing."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def try_kernels(device: torch.device) -> None:
    """Check that the kernels run on a device before a model relies on them.

    Raises:
        ValueError: If they do not, because Triton or a C compiler is missing, or the GPU has no sparse tensor cores.
    """
    weight = torch.zeros(1, GROUP, device=device, dtype=torch.bfloat16)
    needs = "Triton, a C compiler and, for a GPU, compute capability 8.0 or more"
    try_product(lambda: decode(weight, compress(weight)), "2:4", needs)

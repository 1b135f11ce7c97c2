"""LaneLinear: a linear with zeros anywhere whose weight lies as the lanes of a GPU walk along it; for inference only."""

import torch
from torch import Tensor, nn

from functional.sparse import DTYPES, MOST_COLUMNS, MOST_TOKENS, Lanes, decode, expand, from_lanes, lanes_of, to_lanes
from lightning_modules.parts.compressed_base import CompressedLinear, bias_of, on_gpu, try_product, zeros_of
from lightning_modules.parts.sparse_linear import LEAST_ZEROS


class LaneLinear(CompressedLinear):
    """``nn.Linear`` with a compressed weight of 16 bit: some 0.63 of its bytes at 50 % zeros, 0.38 at 70 %.

    On a GPU, up to 32 tokens are multiplied with the compressed form, eight at a time: one token faster than with a dense
    linear, four and more slower (times: docs/speed.md). More tokens, and tokens of another dtype than the weight's, as under
    autocast, are multiplied with the dense weight, which is made for the call and freed.

    Args:
        weight: Result of `functional.sparse.to_lanes`, (O, I).
        bias: (O,), or None.
    """

    def __init__(self, weight: Lanes, bias: Tensor | None) -> None:
        super().__init__(weight.rows, weight.columns, bias)
        for name, value in weight._asdict().items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)

    @staticmethod
    def fits(linear: nn.Linear) -> bool:
        """Return whether a linear is of 16 bit, not too long, and has enough zeros."""
        weight = linear.weight
        return weight.dtype in DTYPES and weight.shape[1] <= MOST_COLUMNS and zeros_of(linear) >= LEAST_ZEROS

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "LaneLinear":
        """Compress the weight of a linear on its device; negative zeros become positive ones.

        Raises:
            ValueError: If a row has too many columns.
        """
        weight = linear.weight.detach()
        return cls(to_lanes(weight, *lanes_of(*weight.shape)), bias_of(linear))

    @property
    def compressed(self) -> Lanes:
        """Weight as it is stored."""
        tensors = (self.values, self.steps, self.firsts, self.starts, self.order)
        return Lanes(*tensors, self.out_features, self.in_features)

    def dense(self) -> Tensor:
        """Return the dense weight, (O, I)."""
        return (expand if self.values.is_cuda and self.values.dtype in DTYPES else from_lanes)(self.compressed)

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply tokens, (tokens, I), and return (tokens, O)."""
        if on_gpu(x) and x.dtype == self.values.dtype and x.dtype in DTYPES and len(x) <= MOST_TOKENS:
            return decode(x, self.compressed, self.bias)
        return self.multiply_cast(x)


def try_lanes(device: torch.device) -> None:
    """Check that the kernels run on a device before a model relies on them.

    Raises:
        ValueError: If they do not, because Triton or a C compiler is missing.
    """
    weight = torch.zeros(1, 1, device=device, dtype=torch.bfloat16)
    try_product(lambda: decode(weight, to_lanes(weight)), "unstructured", "Triton and a C compiler on a GPU")

"""SparseLinear: a linear with zeros anywhere, stored as a bit for every weight and the values; for inference only."""

from torch import Tensor, nn

from functional.sparse import Compressed, compress, decompress
from lightning_modules.parts.compressed_base import CompressedLinear, bias_of, zeros_of

LEAST_ZEROS = 0.3
"""Share of zeros from which a linear is compressed: below, little memory is saved and no kernel can gain."""


class SparseLinear(CompressedLinear):
    """``nn.Linear`` with a compressed weight: at 16 bit 9/16 of its bytes at 50 % zeros, 0.3625 at 70 %.

    The dense weight is made for every call and freed, which is slower than a dense linear.

    Args:
        weight: Result of `functional.sparse.compress`, (O, I).
        bias: (O,), or None.
    """

    def __init__(self, weight: Compressed, bias: Tensor | None) -> None:
        super().__init__(weight.rows, weight.columns, bias)
        self.register_buffer("mask", weight.mask)
        self.register_buffer("values", weight.values)

    @staticmethod
    def fits(linear: nn.Linear) -> bool:
        """Return whether enough weights of a linear are zero."""
        return zeros_of(linear) >= LEAST_ZEROS

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "SparseLinear":
        """Compress the weight of a linear on its device; negative zeros become positive ones."""
        return cls(compress(linear.weight.detach()), bias_of(linear))

    @property
    def compressed(self) -> Compressed:
        """Weight as it is stored."""
        return Compressed(self.mask, self.values, self.out_features, self.in_features)

    def dense(self) -> Tensor:
        """Return the dense weight, (O, I)."""
        return decompress(*self.compressed)

    def extra_repr(self) -> str:
        """Return the same description as ``nn.Linear``, with the share of zeros."""
        return f"{super().extra_repr()}, zeros={1 - self.values.numel() / (self.out_features * self.in_features):.1%}"

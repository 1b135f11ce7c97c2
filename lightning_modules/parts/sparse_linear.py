"""SparseLinear: a linear with zeros anywhere, stored as a bit for every weight and the values; for inference only."""

import torch
from torch import Tensor, nn

from functional.sparse import Compressed, compress, decompress

LEAST_ZEROS = 0.3
"""Share of zeros from which a linear is compressed: below, little memory is saved and no kernel can gain."""


class SparseLinear(nn.Module):
    """``nn.Linear`` with a compressed weight: at 16 bit 9/16 of its bytes at 50 % zeros, 0.3625 at 70 %.

    The dense weight is made for every call and freed, which is slower than a dense linear.

    Args:
        weight: Result of `functional.sparse.compress`, (O, I).
        bias: (O,), or None.
    """

    def __init__(self, weight: Compressed, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.rows, weight.columns
        self.register_buffer("mask", weight.mask)
        self.register_buffer("values", weight.values)
        self.register_buffer("bias", bias)

    @staticmethod
    def fits(linear: nn.Linear) -> bool:
        """Return whether enough weights of a linear are zero."""
        return zeros_of(linear) >= LEAST_ZEROS

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "SparseLinear":
        """Compress the weight of a linear on its device; negative zeros become positive ones."""
        return cls(compress(linear.weight.detach()), None if linear.bias is None else linear.bias.detach())

    @property
    def compressed(self) -> Compressed:
        """Weight as it is stored."""
        return Compressed(self.mask, self.values, self.out_features, self.in_features)

    @property
    def nbytes(self) -> int:
        """Number of bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def dense(self) -> Tensor:
        """Return the dense weight, (O, I)."""
        return decompress(*self.compressed)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x, (..., I), and return (..., O)."""
        y = self.multiply(x.reshape(-1, self.in_features))
        return y.reshape(*x.shape[:-1], self.out_features)

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply tokens, (tokens, I), and return (tokens, O)."""
        return nn.functional.linear(x, self.dense(), self.bias)

    def extra_repr(self) -> str:
        """Return the same description as ``nn.Linear``, with the share of zeros."""
        zeros = 1 - self.values.numel() / (self.out_features * self.in_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, zeros={zeros:.1%}"
        )


@torch.no_grad()
def zeros_of(linear: nn.Linear) -> float:
    """Return the share of zeros of a linear's weight."""
    return 1 - torch.count_nonzero(linear.weight).item() / linear.weight.numel()

"""CsrLinear: a linear with zeros anywhere as a sparse matrix of torch, multiplied by MKL on a CPU; for inference only."""

import warnings

import torch
from torch import Tensor, nn

from lightning_modules.parts.compressed_base import CompressedLinear, bias_of, zeros_of

LEAST_ZEROS = 0.5
"""Share of zeros from which the form, a value and a column of 4 bytes each, is no larger than the dense weight."""


class CsrLinear(CompressedLinear):
    """``nn.Linear`` with a float32 weight in compressed sparse rows: as many bytes at 50 % zeros, 0.6 of them at 70 %.

    torch has this product for float32 on a CPU only. How fast it is depends on shape and zeros (docs/speed.md).

    Args:
        weight: (O, I), sparse CSR, float32, with int32 indices.
        bias: (O,), or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(*weight.shape, bias)
        # Three plain buffers: a sparse tensor can be neither copied with its module nor written into a file.
        self.register_buffer("starts", weight.crow_indices())
        self.register_buffer("columns", weight.col_indices())
        self.register_buffer("values", weight.values())

    @staticmethod
    def fits(linear: nn.Linear) -> bool:
        """Return whether torch can multiply the form of a linear, and it is no larger than the dense one."""
        weight = linear.weight
        possible = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkl.is_available()
        return possible and zeros_of(linear) >= LEAST_ZEROS

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "CsrLinear":
        """Compress the weight of a linear; MKL takes int32 indices without copying them."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
            found = linear.weight.detach().to_sparse_csr()
        indices = found.crow_indices().int(), found.col_indices().int()
        weight = torch.sparse_csr_tensor(*indices, found.values(), found.shape, check_invariants=False)
        return cls(weight, bias_of(linear))

    @property
    def weight(self) -> Tensor:
        """Weight as a sparse tensor, (O, I), which shares the buffers."""
        shape = self.out_features, self.in_features
        return torch.sparse_csr_tensor(self.starts, self.columns, self.values, shape, check_invariants=False)

    def dense(self) -> Tensor:
        """Return the dense weight, (O, I)."""
        return self.weight.to_dense()

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply tokens, (tokens, I), and return (tokens, O)."""
        if x.dtype != torch.float32 or self.values.dtype != torch.float32:  # as under autocast
            return super().multiply(x)
        # One token has a routine of its own, several times faster than that for a matrix of one column.
        weight = self.weight
        y = torch.mv(weight, x[0])[None] if len(x) == 1 else (weight @ x.T).T
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Return the same description as ``nn.Linear``, with the share of zeros."""
        return f"{super().extra_repr()}, zeros={1 - self.values.numel() / (self.out_features * self.in_features):.1%}"

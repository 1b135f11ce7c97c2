"""What the compressed forms of ``nn.Linear`` have in common: linear24.py, split_linear.py, lane_linear.py and others."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class CompressedLinear(nn.Module):
    """``nn.Linear`` whose weight is held in another form, in buffers; for inference only.

    Args:
        out_features: O.
        in_features: I.
        bias: (O,), or None.
    """

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.register_buffer("bias", bias)

    @property
    def nbytes(self) -> int:
        """Number of bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def dense(self) -> Tensor:
        """Return the dense weight, (O, I)."""
        raise RuntimeError(f"{type(self).__name__} expected to say how its weight is made dense.")

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply tokens, (tokens, I), and return (tokens, O); with the dense weight, which is made for the call and freed."""
        return nn.functional.linear(x, self.dense(), self.bias)

    def multiply_cast(self, x: Tensor) -> Tensor:
        """Do the same with the dense weight and the bias cast to the dtype of the tokens."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.dense().to(x.dtype), bias)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x, (..., I), and return (..., O)."""
        return self.multiply(x.reshape(-1, self.in_features)).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return the same description as ``nn.Linear``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def bias_of(linear: nn.Linear) -> Tensor | None:
    """Return the bias of a linear without its gradient, or None."""
    return None if linear.bias is None else linear.bias.detach()


@torch.no_grad()
def zeros_of(linear: nn.Linear) -> float:
    """Return the share of zeros of a linear's weight."""
    return 1 - torch.count_nonzero(linear.weight).item() / linear.weight.numel()


@torch.no_grad()
def is_plain(module: nn.Module) -> bool:
    """Return whether a module multiplies as ``nn.Linear`` does; a subclass may not, such as a router or a quantised linear."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    try:
        x = torch.linspace(-1, 1, 2 * module.in_features, dtype=module.weight.dtype, device=module.weight.device).view(2, -1)
        torch.testing.assert_close(module(x), nn.functional.linear(x, module.weight, module.bias))
    except Exception:  # of another shape or type, or not to be multiplied: each library raises its own
        return False
    return True


def on_gpu(x: Tensor) -> bool:
    """Return whether kernels can read a tensor."""
    return x.is_cuda


def try_product(product: Callable[[], Tensor], kind: str, needs: str) -> None:
    """Check that a kernel runs before a model relies on it.

    Args:
        product: A small product by the kernel.
        kind: Value of `compressed` that asks for it.
        needs: What it needs, for the error.

    Raises:
        ValueError: If it does not run.
    """
    try:
        product()
    except Exception as error:  # Triton raises many classes
        raise ValueError(
            f"Argument `compressed` = {kind} needs {needs}, but its kernels do not run here ({error}). Install them, or leave "
            "`compressed` out."
        ) from error

"""Linears that are called with the same tensor as one product: q, k and v of attention, gate and up of a feed-forward network.

Decoding multiplies a single token, which takes a few microseconds for each linear. A part of that is the start and the end of a
kernel, so one product of all rows is faster than one for each linear. Which linears share their input is read off a run of the
model, by the identity of the tensors.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.parts.block_stream import replaced_forwards
from lightning_modules.parts.compressed_base import is_plain


class MergedLinears(nn.Module):
    """Several linears as one, whose output is kept until each of them has taken its part of it.

    Args:
        linear: Linear, dense or compressed, of the rows of all, (sum of O_i, I).
        sizes: Number of rows O_i of each.
    """

    def __init__(self, linear: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        self.linear, self.sizes = linear, list(sizes)
        self.given: Tensor | None = None
        """Input whose outputs are kept; None if none are."""
        self.outputs: tuple[Tensor | None, ...] = ()
        """Outputs that were not taken yet, and None for those that were."""

    def take(self, index: int, x: Tensor) -> Tensor:
        """Return the output of a linear for x, (..., I): the one that is kept for this very tensor, or a new one.

        Args:
            index: Number of the linear.
            x: Its input, which must not be changed in place between the calls of two linears.

        Returns:
            (..., O_i), a view.
        """
        if self.given is not x or self.outputs[index] is None:
            self.given, self.outputs = x, self.linear(x).split(self.sizes, -1)
        output = self.outputs[index]
        self.outputs = tuple(None if i == index else kept for i, kept in enumerate(self.outputs))
        if all(kept is None for kept in self.outputs):
            self.given, self.outputs = None, ()
        return output


class MergedPart(nn.Module):
    """One of `MergedLinears`, in the place of the linear that it was.

    Args:
        merged: All of them; each of them holds it.
        index: Which one it is.
    """

    def __init__(self, merged: MergedLinears, index: int) -> None:
        super().__init__()
        self.merged, self.index = merged, index
        self.in_features, self.out_features = merged.linear.in_features, merged.sizes[index]

    @property
    def weight(self) -> Tensor:
        """Weight, (O, I), a view; only of a dense one. Adapters ask for its dtype.

        Raises:
            AttributeError: If the linear is compressed.
        """
        if not isinstance(self.merged.linear, nn.Linear):
            raise AttributeError("a compressed linear has no dense weight")
        return self.merged.linear.weight.split(self.merged.sizes)[self.index]

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x, (..., I), and return (..., O)."""
        return self.merged.take(self.index, x)

    def extra_repr(self) -> str:
        """Return the shape, and which rows of the merged linear these are."""
        first = sum(self.merged.sizes[: self.index])
        rows = f"rows={first}:{first + self.out_features} of {sum(self.merged.sizes)}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {rows}"


@torch.no_grad()
def concatenated(linears: Sequence[nn.Linear]) -> nn.Linear:
    """Return a linear of the rows of several, in their order; where only some have a bias, that of the others is zero."""
    first = linears[0].weight
    bias = any(linear.bias is not None for linear in linears)
    rows = sum(linear.out_features for linear in linears)
    found = nn.Linear(first.shape[1], rows, bias=bias, device="meta", dtype=first.dtype)
    found.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    if bias:
        biases = [first.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears]
        found.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return found


@torch.inference_mode(False)  # whose tensors do not say whether they were changed in place
@torch.no_grad()
def sharing_linears(blocks: Sequence[nn.Module], run_model: Callable[[], Any]) -> list[list[nn.Linear]]:
    """Return the groups of linears of a block that are called with the very same tensor, once in a pass.

    Args:
        blocks: Blocks of a model.
        run_model: Runs the model on a few tokens. Linears of the blocks return zeros meanwhile, so that no weight is read.

    Returns:
        Groups of two or more, of one dtype and device, in the order of their calls.
    """
    calls: list[tuple[int, nn.Linear, Tensor, int]] = []
    """Block, linear, input, and how often that had been changed in place; inputs stay alive, or another could take an id."""

    def forward_of(block: int, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            calls.append((block, linear, input, input._version))
            return input.new_zeros(*input.shape[:-1], linear.out_features)

        return forward

    linears = [(number, part) for number, block in enumerate(blocks) for part in block.modules() if is_plain(part)]
    with replaced_forwards({linear: forward_of(number, linear) for number, linear in linears}):
        run_model()
    counts = Counter(linear for _, linear, _, _ in calls)
    groups: dict[tuple, list[nn.Linear]] = {}
    for block, linear, x, version in calls:
        if counts[linear] == 1:
            groups.setdefault((block, id(x), version, linear.weight.dtype, linear.weight.device), []).append(linear)
    return [group for group in groups.values() if len(group) > 1]

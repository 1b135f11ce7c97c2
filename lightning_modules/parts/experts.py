"""Experts of a mixture, one matrix at a time.

transformers keeps the experts of a layer as parameters of three dimensions (`use_experts_implementation`). `routed_forwards`
runs such a layer expert by expert through `ExpertLinear`, so that hooks see what each matrix reads and writes. Weights stay
where they are: an ExpertLinear has none of its own. Letters: T tokens of a batch, n of them routed to an expert, I inputs, O
outputs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Routing:
    """Tokens of a batch that a matrix reads.

    Attributes:
        index: Their places in the batch, ascending, (n,).
        total: T.
        weights: How many times each counts in statistics, (n,); once when None.
    """

    index: Tensor
    total: int
    weights: Tensor | None = None

    def by_sample(self, x: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
        """Sort tokens by their samples, and scale those that count w times by √w.

        Args:
            x: One row for each token, (n, features).
            num_samples: Number of samples of the batch, all of one length.

        Returns:
            Tokens, filled up with zeros, (samples, most tokens, features), and the number of tokens of each sample, routed here
            or not, (samples,), on the CPU. With these, λ1 and λ2 weigh as much for experts as for linears that read all tokens.

        Examples:
            >>> routing = Routing(torch.tensor([0, 1, 5]), total=6)
            >>> tokens, lengths = routing.by_sample(torch.tensor([[1.0], [2.0], [3.0]]), num_samples=2)
            >>> tokens[..., 0].tolist(), lengths.tolist()
            ([[1.0, 2.0], [3.0, 0.0]], [3, 3])
        """
        if self.weights is not None:
            x = x * self.weights.sqrt()[:, None].to(x.dtype)
        length = self.total // num_samples
        sample = self.index // length
        counts = torch.bincount(sample, minlength=num_samples)
        place = torch.arange(len(sample), device=x.device) - (counts.cumsum(0) - counts)[sample]
        tokens = x.new_zeros(num_samples, max(int(counts.max()), 1), x.shape[-1])
        tokens[sample, place] = x
        return tokens, torch.full((num_samples,), length)


class ExpertLinear(nn.Module):
    """One matrix of one expert: a view into the parameter of all experts.

    Args:
        experts: The experts.
        name: Name of the parameter.
        expert: Number of the expert.
    """

    def __init__(self, experts: nn.Module, name: str, expert: int) -> None:
        super().__init__()
        self._source = (experts, name)  # in a tuple, so that it is no submodule
        self.expert = expert
        self.borrowed = 0.0
        """How many times every token of the layer counts in statistics, beside those that are routed here."""

    @property
    def experts(self) -> nn.Module:
        """The experts."""
        return self._source[0]

    @property
    def share_of_tokens(self) -> float:
        """Share of the tokens that are routed to an expert, if all get equally many."""
        count = len(self.experts.down_proj)
        return (getattr(self.experts.config, "num_experts_per_tok", None) or count) / count

    @property
    def reads_hidden(self) -> bool:
        """Whether it reads hidden states, as the first matrix of an expert does."""
        return self._source[1] != "down_proj"

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter of all experts, (experts, O, I), or transposed, (experts, I, O)."""
        experts, name = self._source
        return getattr(experts, name)

    @property
    def weight(self) -> Tensor:
        """Weight, (O, I): a view."""
        weight = self.parameter[self.expert]
        return weight.T if self._source[0].is_transposed else weight

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return W x + b of some tokens, (n, O)."""
        experts, name = self._source
        bias = getattr(experts, f"{name}_bias")[self.expert] if experts.has_bias else None
        return nn.functional.linear(x, self.weight, bias)


def is_experts(module: nn.Module) -> bool:
    """Return whether a module holds the experts of a layer in the way of transformers."""
    known = all(hasattr(module, name) for name in ("is_transposed", "is_concatenated", "has_gate", "has_bias", "_apply_gate"))
    return known and all(
        isinstance(parameter := getattr(module, name, None), nn.Parameter) and parameter.ndim == 3
        for name in (_first_name(module), "down_proj")
    )


def experts_of(block: nn.Module) -> dict[str, nn.Module]:
    """Return name within the block -> experts."""
    return {name: module for name, module in block.named_modules() if is_experts(module)}


def matrices_of(experts: nn.Module) -> list[tuple[ExpertLinear, ExpertLinear]]:
    """Return the two matrices of each expert, always the same objects."""
    if "_matrices" not in vars(experts):  # a list, so that they are no submodules either
        names = _first_name(experts), "down_proj"
        count = len(experts.down_proj)
        experts._matrices = [tuple(ExpertLinear(experts, name, expert) for name in names) for expert in range(count)]
    return experts._matrices


def parts_of(experts: nn.Module) -> Iterator[tuple[str, ExpertLinear, slice]]:
    """Yield name within the experts, matrix and rows of all linears: gate, up and down of one expert after the other."""
    for expert, (first, down) in enumerate(matrices_of(experts)):
        name = _first_name(experts)
        if experts.has_gate:
            half = len(first.weight) // 2
            concatenated = slice(0, half), slice(half, None)
            gate, up = concatenated if experts.is_concatenated else (slice(0, None, 2), slice(1, None, 2))
            yield f"{expert}.{name}.gate", first, gate
            yield f"{expert}.{name}.up", first, up
        else:
            yield f"{expert}.{name}", first, ALL
        yield f"{expert}.down_proj", down, ALL


def routed_forwards(block: nn.Module) -> dict[nn.Module, Callable[..., Tensor]]:
    """Return experts within a block -> forward that calls their matrices, each once, even if no token is routed to it."""
    return {experts: partial(_routed, experts) for experts in experts_of(block).values()}


def _routed(experts: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run all experts.

    Args:
        experts: The experts.
        hidden: Hidden states, (T, I).
        *args: Experts of each token, (T, experts per token), and the factors of their outputs, of the same shape.
        **kwargs: The same, by whatever names.
    """
    chosen, factors = (*args, *kwargs.values())
    total = torch.zeros_like(hidden)
    for expert, (first, down) in enumerate(matrices_of(experts)):
        index, slot = (chosen == expert).nonzero().unbind(1)
        whole = first.borrowed > 0 or down.borrowed > 0
        x = hidden if whole else hidden[index]
        x = first(x, _routing(first, index, len(hidden), whole))
        x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
        x = down(x, _routing(down, index, len(hidden), whole))
        x = x[index] if whole else x
        if getattr(experts, "has_post_expert_norm", False):
            x = experts.post_expert_norm(x)
        total.index_add_(0, index, (x * factors[index, slot, None]).to(total.dtype))
    return total


def _routing(matrix: ExpertLinear, index: Tensor, total: int, whole: bool) -> Routing:
    if not whole:
        return Routing(index, total)
    weights = torch.full((total,), matrix.borrowed, device=index.device)
    weights[index] += 1
    return Routing(torch.arange(total, device=index.device), total, weights)


def _first_name(experts: nn.Module) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"

"""Attention distributions before and after pruning: Eq. 11-12 and 18-19 of D²Prune, and how long their tail is.

Pure functions on attention probabilities, (samples, heads, queries, keys), each query's row summing to 1, and on weights.
Masked keys have probability 0. Everything is computed in float32, sample by sample: probabilities are large.
"""

import math

import torch
from torch import Tensor

SMALLEST = torch.finfo(torch.float32).tiny
"""Replaces a probability that underflowed to 0, so that its logarithm is finite."""


def attention_divergence(pruned: Tensor, dense: Tensor) -> Tensor:
    """Return KL(pruned ‖ dense) = Σ_keys p̃ log(p̃ / p) in nats, the mean over samples, heads and queries (Eq. 12): a scalar.

    Args:
        pruned: Probabilities p̃ of the pruned attention, (samples, heads, queries, keys).
        dense: Probabilities p of the dense attention, same shape.

    Raises:
        ValueError: If the shapes differ.

    Examples:
        >>> dense = torch.tensor([[[[0.5, 0.5]]]])
        >>> attention_divergence(torch.tensor([[[[1.0, 0.0]]]]), dense)  # log 2
        tensor(0.6931)
    """
    _check(pruned, dense)
    return torch.stack([_divergence(p.float(), q.float()) for p, q in zip(pruned, dense, strict=True)]).mean()


def attention_entropy(probabilities: Tensor) -> Tensor:
    """Return −Σ_keys p log p in nats, the mean over samples, heads and queries: a scalar.

    The entropy is low where few keys carry the mass.

    Args:
        probabilities: (samples, heads, queries, keys).

    Examples:
        >>> attention_entropy(torch.full((1, 1, 1, 4), 0.25))  # log 4
        tensor(1.3863)
    """
    _check(probabilities)
    return torch.stack([torch.special.entr(p.float()).sum(-1).mean() for p in probabilities]).mean()


def attention_mass(probabilities: Tensor, shares: tuple[float, ...] = (0.01, 0.05)) -> Tensor:
    """Return the mass of the largest keys of each query, the mean over samples, heads and queries: (shares,).

    Args:
        probabilities: (samples, heads, queries, keys).
        shares: Shares of the keys that a query sees (probability above 0), in (0, 1]; at least one key each.

    Raises:
        ValueError: If a share is out of range.

    Examples:
        >>> attention_mass(torch.tensor([[[[0.7, 0.1, 0.1, 0.1]]]]), shares=(0.25, 0.5))
        tensor([0.7000, 0.8000])
    """
    _check(probabilities)
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"Argument `shares` expected to be numbers in (0, 1] but got {shares}.")
    return torch.stack([_largest_mass(p.float(), shares) for p in probabilities]).mean(0)


def outlier_ratio(weight: Tensor) -> float:
    """Return the share of the entries with |W_ij| > mean |W| (Eq. 18).

    Examples:
        >>> outlier_ratio(torch.tensor([[1.0, -1.0, 6.0, 0.0]]))
        0.25
    """
    magnitude = weight.detach().float().abs()
    return (magnitude > magnitude.mean()).float().mean().item()


def _divergence(pruned: Tensor, dense: Tensor) -> Tensor:
    ratio = pruned.clamp_min(SMALLEST).log_().sub_(dense.clamp_min(SMALLEST).log_())
    return ratio.mul_(pruned).sum(-1).mean()


def _largest_mass(probabilities: Tensor, shares: tuple[float, ...]) -> Tensor:
    largest = math.ceil(max(shares) * probabilities.shape[-1])
    cumulative = probabilities.topk(largest, dim=-1).values.cumsum(-1)
    visible = (probabilities > 0).sum(-1, keepdim=True)
    # ⌈share · visible⌉ despite binary rounding: 5 % of 20 keys is 1, not 2.
    counts = [(visible * share - 1e-6).ceil().long().clamp_min(1) for share in shares]
    return torch.stack([cumulative.gather(-1, count - 1).mean() for count in counts])


def _check(probabilities: Tensor, other: Tensor | None = None) -> None:
    if probabilities.ndim != 4 or (other is not None and other.shape != probabilities.shape):
        shapes = " and ".join(str(tuple(x.shape)) for x in (probabilities, other) if x is not None)
        raise ValueError(
            "Attention probabilities expected to have the shape (samples, heads, queries, keys), the same for both, but got "
            f"{shapes}."
        )

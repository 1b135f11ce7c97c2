"""Which experts of a layer stay: REAP (arXiv 2510.13999), Eq. 9.

The score of an expert is the mean of g · ‖f(x)‖ over the tokens x that are routed to it, with f(x) its output and g the factor
that the router gives it. It is what the layer's output loses, per routed token, without the expert.
"""

import torch
from torch import Tensor


def kept_experts(scores: Tensor, share: float, groups: int = 1) -> Tensor:
    """Return the numbers of the experts that stay, ascending, int64.

    Args:
        scores: Score of each expert, (experts,).
        share: Share of the experts that go, rounded down in each group.
        groups: Number of groups of equally many experts, next to each other, among which a router chooses first; each loses
            equally many.

    Examples:
        >>> kept_experts(torch.tensor([3.0, 1.0, 2.0, 4.0]), share=0.5).tolist()
        [0, 3]
        >>> kept_experts(torch.tensor([3.0, 1.0, 2.0, 4.0]), share=0.5, groups=2).tolist()
        [0, 3]
    """
    rows = scores.view(groups, -1)
    size = rows.shape[1]
    best = rows.sort(dim=1, descending=True, stable=True).indices[:, : size - int(size * share + 1e-9)]
    return (best + size * torch.arange(groups, device=scores.device)[:, None]).flatten().sort().values

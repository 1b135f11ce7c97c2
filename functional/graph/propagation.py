"""Features propagated beforehand, so that an encoder is an MLP on rows and an epoch needs no edges (decoupled propagation).

As in APPNP (ICLR 2019), with the propagation before the network, X ← (1 − α) P X + α X₀; under each view's operator, after
which one projection for all views may leave few dimensions: propagated features are smooth and nearly of low rank.
Shapes: N nodes, F features, d dimensions.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def propagated_features(x: Tensor, operator: Callable[[Tensor], Tensor], steps: int, teleport: float) -> Tensor:
    """Propagate features of length 1: Z ← (1 − α) P Z + α X, `steps` times from Z = X.

    Args:
        x: (N, F); rows are divided by their length first, rows of zeros stay.
        operator: P, (N, F) -> (N, F).
        steps: K.
        teleport: α.

    Returns:
        (N, F).
    """
    x = torch.nn.functional.normalize(x)
    z = x
    for _ in range(steps):
        z = (1 - teleport) * operator(z) + teleport * x
    return z


def reduced_together(views: Sequence[Tensor], dimensions: int, seed: int = 0) -> list[Tensor]:
    """Project several views on the leading right singular vectors of all their rows.

    Args:
        views: (N, F) each.
        dimensions: d, at most F and the number of all rows.
        seed: Seed of scikit-learn's randomised SVD.

    Returns:
        (N, min(d, F)) each, on the device of the first.
    """
    from sklearn.utils.extmath import randomized_svd

    rows = torch.cat([view.float() for view in views])
    width = min(dimensions, *rows.shape)
    axes = torch.from_numpy(randomized_svd(rows.cpu().numpy(), width, n_iter=4, random_state=seed)[2]).to(rows)
    return list((rows @ axes.T).split(len(views[0])))


def scaled_together(views: Sequence[Tensor], length: float | None = None) -> list[Tensor]:
    """Scale several views by one factor.

    Args:
        views: (N, d) each.
        length: Root of the mean square length that all rows get; None for √d, with which values have mean square 1.

    Returns:
        (N, d) each.
    """
    size = torch.stack([view.square().mean() for view in views]).mean().sqrt().clamp_min(1e-12)
    wanted = 1.0 if length is None else length / views[0].shape[1] ** 0.5
    return [view / size * wanted for view in views]

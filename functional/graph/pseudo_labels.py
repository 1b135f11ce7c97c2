"""Pseudo-labels of the nodes and which of them to trust (csg2l: labels for the reweighting function R).

Shapes: N nodes, C classes.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def pseudo_labels(logits: Tensor, labels: Tensor, known: Tensor, alignment: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the most probable class and its probability; on nodes whose label is known that label, and 1.

    Args:
        logits: (N, C).
        labels: (N,), read where known only.
        known: (N,) bool, the training nodes.
        alignment: Share a in [0, 1] of the correction logits − a · log(mean over nodes of the class probabilities). Models of
            few labels predict few classes, and more so when taught their own predictions; with 1 all classes are expected
            equally often (distribution alignment, Berthelot et al. 2020, with a uniform prior).

    Returns:
        Labels (N,) and confidence (N,) in [0, 1], without gradient.
    """
    by_class = logits.detach().float().t().contiguous()  # (C, N), over whose rows a CPU reduces several times as fast
    if alignment:  # log of the mean by log-sum-exp: a class that no node is given has probabilities that round to 0
        by_class = by_class - alignment * (by_class.log_softmax(0).logsumexp(1, keepdim=True) - math.log(len(logits)))
    confidence, predicted = by_class.softmax(0).max(0)
    return torch.where(known, labels, predicted), torch.where(known, 1.0, confidence)


def alignment_share(prior: float, known: int, num_classes: int) -> float:
    """Compute the share of the alignment that so many known labels leave to a prior of equally frequent classes.

    Args:
        prior: a ≥ 0, worth as many labels of each class as it says; 0 for no alignment.
        known: Number of nodes whose label is known.
        num_classes: C.

    Returns:
        a / (a + known / C), in [0, 1].
    """
    return prior / (prior + known / num_classes) if prior else 0.0


def confident_share(confidence: Tensor, labels: Tensor, share: float, num_classes: int) -> Tensor:
    """Choose the nodes of each label with the highest confidence, at most share · N / C of a label, rounded up.

    By class, since a threshold on probabilities leaves out classes that are hard while labels are few; as many of each class,
    since a class that is predicted too often would otherwise teach itself.

    Args:
        confidence: (N,).
        labels: (N,) from 0.
        share: Share of the nodes, in [0, 1].
        num_classes: C.

    Returns:
        (N,) bool. Among equal confidence earlier nodes come first.

    Raises:
        ValueError: If the share is out of range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"Argument `share` expected to be in [0, 1] but got {share}.")
    order = confidence.argsort(descending=True, stable=True)
    sorted_labels, by_label = labels[order].sort(stable=True)  # by label, within a label by confidence
    position = torch.arange(len(labels), device=labels.device) - torch.searchsorted(sorted_labels, sorted_labels)
    chosen = torch.zeros_like(labels, dtype=torch.bool)
    return chosen.index_copy(0, order[by_label], position < math.ceil(share * len(labels) / num_classes))


def confident_above_mean(confidence: Tensor, known: Tensor) -> Tensor:
    """Choose the nodes whose confidence is at least the mean of all whose label is not known (IceBerg, WWW 2025).

    Args:
        confidence: (N,).
        known: (N,) bool, the training nodes; they are chosen.

    Returns:
        (N,) bool.
    """
    others = (~known).sum().clamp_min(1)
    return (confidence >= confidence.masked_fill(known, 0.0).sum() / others) | known


def balanced_logits(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Add the logarithm of the classes' shares among some nodes (balanced softmax, Ren et al. 2020, as IceBerg has it).

    A class that is taught often then needs larger logits for the same loss, so that it does not grow by being taught.

    Args:
        logits: (N, C).
        labels: (N,).
        mask: (N,) bool, the nodes that are taught; a class that none of them has counts one.

    Returns:
        (N, C).
    """
    counts = torch.zeros(logits.shape[1], dtype=logits.dtype, device=logits.device)
    counts = counts.index_add(0, labels, mask.to(logits.dtype)).clamp_min(1)
    return logits + (counts / counts.sum()).log()


@torch.no_grad()
def node_weights(
    z_a: Tensor,
    z_b: Tensor,
    labels: Tensor,
    trusted: Tensor,
    taught: Tensor,
    num_classes: int,
    beta: float,
    block_size: int = 2048,
) -> Tensor:
    """Weigh nodes by how far their pseudo-labels and their similarities disagree: the R of the contrast, a node at a time.

        r_i = mean over j ∈ C of (R_ij + R_ji) / 2,  R_ij = |1[ŷ_i = ŷ_j] − norm(S_ij)|,  S_ij = z_i · z'_j

    with norm the min-max over S on C × C, and w_i = r_i^β over the mean of r^β on the taught nodes. With β > 0 nodes weigh more
    that are hard (unlike those of their label, or like others), as pairs do in the contrast; with β < 0 those whose label
    agrees with what they are like, so that wrong labels count less. The definition is ours. The sums over j are those over the
    classes' sums of z', so that only min and max need S, in blocks of rows.

    Args:
        z_a: (N, D), normally of unit length.
        z_b: (N, D).
        labels: (N,) pseudo-labels ŷ, from 0.
        trusted: (N,) bool, the set C.
        taught: (N,) bool, nodes that are weighed, among which the mean weight is 1; a subset of C.
        num_classes: Number of classes.
        beta: β.
        block_size: Rows of S that are held at once; any value gives the same weights.

    Returns:
        (N,), without gradient; 0 on nodes that are not taught.
    """
    extremes = [_extremes(z_a, z_b, trusted, rows) for rows in torch.arange(len(z_a), device=z_a.device).split(block_size)]
    low, high = torch.stack([low for low, _ in extremes]).min(), torch.stack([high for _, high in extremes]).max()
    span = torch.where(high > low, high - low, 1.0)
    members = z_a.new_zeros(len(z_a), num_classes).scatter(1, labels[:, None], 1.0) * trusted[:, None]
    counts = members.sum(0)

    def disagreement(z: Tensor, other: Tensor) -> Tensor:
        similar = (z @ (members.T @ other).T - low * counts) / span  # (N, C): norm(S_ij), summed over the j of a class
        own = similar.gather(1, labels[:, None])[:, 0]
        return (counts[labels] - own + similar.sum(1) - own) / counts.sum()

    r = (disagreement(z_a, z_b) + disagreement(z_b, z_a)) / 2
    weights = torch.where(taught, r.clamp_min(1e-6) ** beta, 0.0)
    return weights * taught.sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)


def _extremes(z_a: Tensor, z_b: Tensor, trusted: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Find the smallest and the largest similarity of some rows among trusted nodes; ∞ and -∞ if there are none."""
    similarity, without = z_a[rows] @ z_b.T, ~(trusted[rows, None] & trusted)
    return similarity.masked_fill(without, math.inf).min(), similarity.masked_fill(without, -math.inf).max()


def masked_cross_entropy(
    logits: Tensor, labels: Tensor, mask: Tensor, count: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Compute the mean cross-entropy of the nodes in a mask, 0 if there is none; unlike indexing, never wait for a GPU.

    Args:
        logits: (N, C).
        labels: (N,).
        mask: (N,) bool.
        count: Divisor of the sum; the number of nodes of the mask when None.
        weights: (N,) factors of the nodes' terms; None for ones.
    """
    labels = labels.where(mask, -1)
    terms = cross_entropy(logits.t()[None], labels[None], ignore_index=-1, reduction="none")[0]  # see pseudo_labels: (C, N)
    total = terms.sum() if weights is None else torch.dot(weights, terms)
    count = mask.sum() if count is None else count
    return total / count.where(count > 0, 1)


def cluster(embeddings: Tensor, num_clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    """Label nodes by k-means where no label is known, and measure how close each is to its centroid.

    Args:
        embeddings: (N, D).
        num_clusters: Number of clusters; at most N are made.
        seed: Seed of k-means++.

    Returns:
        Labels (N,) and closeness (N,) = 1 / (1 + distance), on the embeddings' device.
    """
    from sklearn.cluster import KMeans

    points = embeddings.detach().float().cpu().numpy()
    means = KMeans(min(num_clusters, len(points)), n_init=3, random_state=seed).fit(points)
    centroids = torch.as_tensor(means.cluster_centers_, dtype=torch.float32)
    labels = torch.as_tensor(means.labels_, dtype=torch.long)
    distance = (torch.as_tensor(points) - centroids[labels]).norm(dim=1)
    return labels.to(embeddings.device), (1 / (1 + distance)).to(embeddings.device)

"""Reweighted InfoNCE between two views of the nodes, in exact row blocks.

S_ij = z_i · z'_j. With pseudo-labels ŷ and a confident set C, pairs weigh R_ij = |1[ŷ_i = ŷ_j] − norm(S_ij)|^β for i, j ∈ C,
else 1; norm is min-max over S. R is large for hard pairs (positives far apart, negatives close)
and carries no gradient. It enters as

    hsan            −log( e^{R_ii S_ii / τ} / Σ_j e^{R_ij S_ij / τ} )                 (HSAN, AAAI 2023)
    negatives       −log( e^{S_ii / τ} / Σ_j R_ij e^{S_ij / τ} )
    multi_positive  −(Σ_{j∈P_i} w_ij)⁻¹ Σ_{j∈P_i} w_ij [ S_ij/τ − log Σ_k v_ik e^{S_ik/τ} ],   P_i = {i} ∪ {j ∈ C: ŷ_j = ŷ_i},
                    w_ij = R_ij, w_ii = 1; v_ij = 1 on P_i and R_ij off it

These forms are our reading; the paper's formula is not public. Shapes: N nodes, D dimensions, B rows of a block.
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Form = Literal["hsan", "negatives", "multi_positive"]
FORMS = ("hsan", "negatives", "multi_positive")


def reweighted_info_nce(
    z_a: Tensor,
    z_b: Tensor,
    labels: Tensor | None = None,
    confident: Tensor | None = None,
    form: Form = "multi_positive",
    beta: float = 1.0,
    temperature: float = 0.5,
    reweight: Literal["both", "positives", "negatives"] = "both",
    intra_view: bool = False,
    anchors: Tensor | None = None,
    block_size: int = 2048,
) -> Tensor:
    """Mean over anchors and over both directions (a against b, b against a). Memory is O(B·N), whatever N.

    Args:
        z_a: (N, D), normally of unit length.
        z_b: (N, D).
        labels: (N,) pseudo-labels ŷ; None for plain InfoNCE, R = 1 and P_i = {i}.
        confident: (N,) bool, the set C; None for all.
        form: Where R enters, see above.
        beta: Exponent β; 0 makes R = 1 but leaves multi_positive its positives.
        temperature: τ.
        reweight: Which confident pairs R weighs: those of equal pseudo-labels (positives), of different ones, or both.
        intra_view: Whether pairs i ≠ j within the anchor's own view stand in the denominators too, with R from their own S.
        anchors: (A,) nodes whose rows count, and over whose rows min-max is taken; None for all.
        block_size: B; rows that are held at once. Any value gives the same loss and gradients.

    Returns:
        A scalar.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if form not in FORMS:
        raise ValueError(f"Argument `form` expected to be one of {', '.join(FORMS)} but got {form!r}.")
    if reweight not in ("both", "positives", "negatives"):
        raise ValueError(f"Argument `reweight` expected to be both, positives or negatives but got {reweight!r}.")
    if temperature <= 0 or beta < 0 or block_size < 1:
        raise ValueError(
            "Arguments `temperature`, `beta`, `block_size` expected to be above 0, at least 0 and at least 1 but got "
            f"{temperature}, {beta}, {block_size}."
        )
    if z_a.shape != z_b.shape:
        raise ValueError(f"Arguments `z_a` and `z_b` expected to have one shape but got {z_a.shape} and {z_b.shape}.")
    if anchors is None:
        anchors = torch.arange(len(z_a), device=z_a.device)
    if labels is not None and confident is None:
        confident = torch.ones_like(labels, dtype=torch.bool)
    weights = partial(_weights, labels=labels, confident=confident, beta=beta, reweight=reweight)
    block = partial(_block_loss, weights=weights, form=form, temperature=temperature)
    total = z_a.new_zeros(())
    for own, other in ((z_a, z_b), (z_b, z_a)):
        views = [other, own] if intra_view else [other]
        needs_range = labels is not None and beta > 0
        ranges = [_extremes(own, view, anchors, block_size) if needs_range else None for view in views]
        for rows in anchors.split(block_size):
            if len(anchors) > block_size and torch.is_grad_enabled():  # forget the block, compute it again in the backward pass
                loss = checkpoint(block, own, views, rows, ranges, use_reentrant=False, preserve_rng_state=False)
            else:
                loss = block(own, views, rows, ranges)
            total = total + loss
    return total / (2 * len(anchors))


@torch.no_grad()
def pair_weights(
    z_a: Tensor, z_b: Tensor, labels: Tensor, confident: Tensor, beta: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities S, weights R and positives (j ∈ C with ŷ_i = ŷ_j) of all pairs of a few nodes, each (N, N): to look at."""
    rows = torch.arange(len(z_a), device=z_a.device)
    similarity = z_a @ z_b.T
    extremes = (similarity.min(), similarity.max())
    weights, positive = _weights(similarity, rows, extremes, labels, confident, beta, "both")
    return similarity, weights, positive


@torch.no_grad()
def _extremes(own: Tensor, view: Tensor, anchors: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest similarity of the anchors' rows; within a view without the diagonal."""
    low, high = [], []
    for rows in anchors.split(block_size):
        similarity = own[rows] @ view.T
        if view is own:
            here = (torch.arange(len(rows), device=rows.device), rows)
            low.append(similarity.index_put(here, similarity.new_tensor(float("inf"))).min())
            high.append(similarity.index_put(here, similarity.new_tensor(float("-inf"))).max())
        else:
            low.append(similarity.min())
            high.append(similarity.max())
    return torch.stack(low).min(), torch.stack(high).max()


@torch.no_grad()
def _weights(
    similarity: Tensor,
    rows: Tensor,
    extremes: tuple[Tensor, Tensor] | None,
    labels: Tensor | None,
    confident: Tensor | None,
    beta: float,
    reweight: str,
) -> tuple[Tensor | None, Tensor | None]:
    """R of some rows, (B, N), and the positives, j ∈ C with the anchor's pseudo-label; None for R = 1 and no pairs."""
    if labels is None:
        return None, None
    same = labels[rows, None] == labels
    positive = same & confident
    if extremes is None:
        return None, positive
    low, high = extremes
    # Of equal similarities none is hard or easy: norm is 0, negatives drop out and positives count in full.
    spread = torch.where(high > low, high - low, 1.0)
    norm = ((similarity - low) / spread).clamp_(0, 1)
    hardness = torch.where(same, 1 - norm, norm)
    if beta != 1:
        hardness.pow_(beta)
    weighed = confident[rows, None] & confident
    if reweight != "both":
        weighed = weighed & (same if reweight == "positives" else ~same)
    return torch.where(weighed, hardness, 1.0), positive


def _block_loss(own: Tensor, views: list[Tensor], rows: Tensor, ranges: list, weights, form: str, temperature: float) -> Tensor:
    """Sum of the losses of some anchors in one direction."""
    here = (torch.arange(len(rows), device=rows.device), rows)
    denominators = []
    for view, extremes in zip(views, ranges, strict=True):
        similarity = own[rows] @ view.T
        factor, positive = weights(similarity.detach(), rows, extremes)
        logits = similarity / temperature
        if form == "hsan" and factor is not None:
            logits = logits * factor
        if form == "multi_positive" and positive is not None:
            positive = positive.index_put(here, torch.tensor(True, device=rows.device))
        summed = logits
        if form != "hsan" and factor is not None:
            v = torch.where(positive, 1.0, factor) if form == "multi_positive" else factor
            summed = logits + v.clamp_min(torch.finfo(v.dtype).tiny).log_()
        if view is own:
            summed = summed.index_put(here, summed.new_tensor(float("-inf")))
        else:
            between, between_weights, pairs = logits, factor, positive
        denominators.append(summed)
    log_sum = torch.cat(denominators, dim=1).logsumexp(1)
    if form != "multi_positive" or pairs is None:
        return (log_sum - between[here]).sum()
    w = pairs.to(between.dtype) if between_weights is None else torch.where(pairs, between_weights, 0.0)
    w = w.index_put(here, w.new_tensor(1.0))
    return (log_sum - (w * between).sum(1) / w.sum(1)).sum()

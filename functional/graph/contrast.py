"""Reweighted InfoNCE between two views of the nodes, in exact row blocks.

S_ij = z_i · z'_j. With pseudo-labels ŷ and a confident set C, pairs weigh R_ij = |1[ŷ_i = ŷ_j] − norm(S_ij)|^β for i, j ∈ C,
else 1; norm is min-max over S. R is large for hard pairs (positives far apart, negatives close)
and carries no gradient. It enters as

    hsan            −log( e^{R_ii S_ii / τ} / Σ_j e^{R_ij S_ij / τ} )                 (HSAN, AAAI 2023)
    negatives       −log( e^{S_ii / τ} / Σ_j R_ij e^{S_ij / τ} )
    multi_positive  −(Σ_{j∈P_i} w_ij)⁻¹ Σ_{j∈P_i} w_ij [ S_ij/τ − log Σ_k v_ik e^{S_ik/τ} ],   P_i = {i} ∪ {j ∈ C: ŷ_j = ŷ_i},
                    w_ij = R_ij, w_ii = 1; v_ij = 1 on P_i and R_ij off it

These forms are our reading; the paper's formula is not public. Shapes: N nodes, D dimensions, B rows of a block.

All three are log Σ_k v_ik e^{c_ik S_ik/τ} − Σ_k w_ik c_ik S_ik/τ with constants c, v, w, so that the slope of a block of rows
is c/τ · (softmax − w): it is taken together with the value, and no block is kept or computed again for the backward pass.
"""

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    """Compute the mean loss over anchors and both directions (a against b, b against a), in O(B·N) memory.

    Args:
        z_a: (N, D), normally of unit length.
        z_b: (N, D).
        labels: (N,) pseudo-labels ŷ; None for plain InfoNCE, R = 1 and P_i = {i}.
        confident: (N,) bool, the set C; None for all.
        form: Name of the formula above, which says where R enters.
        beta: Exponent β; 0 makes R = 1 but leaves multi_positive its positives.
        temperature: τ.
        reweight: Confident pairs that R weighs: those of equal pseudo-labels (positives), of different ones, or both.
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
    weights = None
    if labels is not None:
        confident = torch.ones_like(labels, dtype=torch.bool) if confident is None else confident
        weights = partial(_weights, labels=labels, confident=confident, beta=beta, reweight=reweight)
    return _Contrast.apply(z_a, z_b, anchors, weights, form, temperature, intra_view, block_size)


@torch.no_grad()
def pair_weights(
    z_a: Tensor, z_b: Tensor, labels: Tensor, confident: Tensor, beta: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return similarities S, weights R and positives (j ∈ C with ŷ_i = ŷ_j) of all pairs of a few nodes, each (N, N).

    Args:
        z_a: (N, D), normally of unit length.
        z_b: (N, D).
        labels: (N,) pseudo-labels ŷ.
        confident: (N,) bool, the set C.
        beta: Exponent β of R.
    """
    rows = torch.arange(len(z_a), device=z_a.device)
    similarity = z_a @ z_b.T
    extremes = (similarity.min(), similarity.max())
    weights, positive = _weights(similarity, rows, extremes, labels, confident, beta, "both")
    weights = torch.ones_like(similarity) if weights is None else weights
    return similarity, weights, positive


class _Contrast(torch.autograd.Function):
    """Value and gradient of the loss in one pass over blocks of rows."""

    @staticmethod
    def forward(ctx, z_a, z_b, anchors, weights, form, temperature, intra_view, block_size):
        z, slopes = (z_a, z_b), (torch.zeros_like(z_a), torch.zeros_like(z_b))
        total = z_a.new_zeros(())
        blocks = anchors.split(block_size)
        for a, b in ((0, 1), (1, 0)):
            views = (b, a) if intra_view else (b,)
            ranges = [None] * len(views)
            if weights is not None and len(blocks) > 1:
                ranges = [_extremes(z[a], z[view], view == a, anchors, block_size) for view in views]
            for rows in blocks:
                similarities = [z[a][rows] @ z[view].T for view in views]
                parts = [_constants(s, rows, extremes, view == a, weights, form) for s, view, extremes
                         in zip(similarities, views, ranges, strict=True)]  # fmt: skip
                loss, block_slopes = _rows(similarities, parts, rows, temperature)
                total += loss
                for view, slope in zip(views, block_slopes, strict=True):
                    slopes[a].index_add_(0, rows, slope @ z[view])
                    slopes[view].addmm_(slope.T, z[a][rows])
        ctx.save_for_backward(*(slope.div_(2 * len(anchors)) for slope in slopes))
        return total / (2 * len(anchors))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return *(gradient * slope for slope in ctx.saved_tensors), *[None] * 6


def _extremes(own: Tensor, view: Tensor, within: bool, anchors: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Find the smallest and the largest similarity of the anchors' rows over all blocks."""
    found = [_range(own[rows] @ view.T, rows, within) for rows in anchors.split(block_size)]
    return torch.stack([low for low, _ in found]).min(), torch.stack([high for _, high in found]).max()


def _range(similarity: Tensor, rows: Tensor, within: bool) -> tuple[Tensor, Tensor]:
    """Find the smallest and the largest of some rows (B, N); within a view without the diagonal."""
    if not within:
        return similarity.aminmax()
    low, high = (similarity.scatter(1, rows[:, None], bound) for bound in (float("inf"), float("-inf")))
    return low.min(), high.max()


def _weights(
    similarity: Tensor,
    rows: Tensor,
    extremes: tuple[Tensor, Tensor],
    labels: Tensor,
    confident: Tensor,
    beta: float,
    reweight: str,
) -> tuple[Tensor | None, Tensor]:
    """Return R of some rows, (B, N), or None for R = 1, and the positives, j ∈ C with the anchor's pseudo-label."""
    same = labels[rows, None] == labels
    positive = same & confident
    if beta == 0:
        return None, positive
    low, high = extremes
    # Of equal similarities none is hard or easy: norm is 0, negatives drop out and positives count in full.
    hardness = (similarity - low).div_(torch.where(high > low, high - low, 1.0)).clamp_(0, 1)
    hardness.sub_(same.to(hardness.dtype)).abs_()  # |1[ŷ_i = ŷ_j] − norm|
    if beta != 1:
        hardness.pow_(beta)
    hardness.masked_fill_(~confident, 1.0).masked_fill_(~confident[rows, None], 1.0)
    if reweight != "both":
        hardness.masked_fill_(~same if reweight == "positives" else same, 1.0)
    return hardness, positive


def _constants(
    similarity: Tensor, rows: Tensor, extremes: tuple | None, within: bool, weights, form: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return c, v, w of some rows of one view, (B, N) each: factors of S, of e^S, weights of positives up to their sum.

    None for c or v stands for ones; for w, for the node itself alone. Pairs within a view are no positives.
    """
    c = v = w = None
    if weights is not None:
        factor, positive = weights(similarity, rows, extremes or _range(similarity, rows, within))
        itself = rows[:, None]
        if form == "hsan":
            c = factor
        elif form == "negatives":
            v = factor
        else:
            positive = positive.scatter(1, itself, True)
            v = None if factor is None else factor.masked_fill(positive, 1.0)
            w = positive.to(similarity.dtype) if factor is None else factor.mul_(positive)
            w.scatter_(1, itself, 1.0)
    if within:  # a node is no negative of itself
        v = torch.ones_like(similarity) if v is None else v
        v.scatter_(1, rows[:, None], 0.0)
    return c, v, w


def _rows(similarities: list[Tensor], parts: list[tuple], rows: Tensor, temperature: float) -> tuple[Tensor, list[Tensor]]:
    """Return the sum over some anchors, and its slope in each view's S, (B, N) each; the first view is the one across."""
    floor = torch.finfo(similarities[0].dtype).tiny  # of e^S's factors: log 0 would make the loss infinite
    logits, tops = [], []
    for similarity, (c, v, _) in zip(similarities, parts, strict=True):
        scaled = similarity.div_(temperature)
        scaled = scaled if c is None else scaled.mul_(c)
        logits.append(scaled)
        bound = scaled if v is None else torch.where(v > floor, scaled, scaled + math.log(floor))
        tops.append(bound.amax(1, keepdim=True))
    top = torch.stack(tops).amax(0)
    _, _, w = parts[0]
    if w is None:
        attracted = logits[0].gather(1, rows[:, None]).sum()
    else:
        w.div_(w.sum(1, keepdim=True))
        attracted = torch.dot(w.flatten(), logits[0].flatten())
    for scaled, (_, v, _) in zip(logits, parts, strict=True):
        scaled.sub_(top).exp_()
        if v is not None:
            scaled.mul_(v.clamp_min_(floor))
    total = torch.stack([scaled.sum(1, keepdim=True) for scaled in logits]).sum(0)
    for number, (scaled, (c, _, _)) in enumerate(zip(logits, parts, strict=True)):
        scaled.div_(total)
        if number == 0 and w is None:
            scaled.scatter_add_(1, rows[:, None], -torch.ones_like(total))
        elif number == 0:
            scaled.sub_(w)
        scaled.div_(temperature)
        if c is not None:
            scaled.mul_(c)
    return (top + total.log()).sum() - attracted, logits

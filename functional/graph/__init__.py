"""CSG2L (arXiv 2504.18148): low-rank global view, pseudo-labels and reweighted contrast, as functions on tensors.

The paper's full text is not public to us; where its abstract is silent, the definitions here are ours and say so.
"""

from functional.graph.contrast import pair_weights, reweighted_info_nce
from functional.graph.low_rank import Factors, SparseMatrix, low_rank_factors, normalized_adjacency, propagate, strongest_edges
from functional.graph.pseudo_labels import (
    alignment_share,
    cluster,
    confident_share,
    masked_cross_entropy,
    pseudo_labels,
)

__all__ = [
    "Factors",
    "SparseMatrix",
    "alignment_share",
    "cluster",
    "confident_share",
    "low_rank_factors",
    "masked_cross_entropy",
    "normalized_adjacency",
    "pair_weights",
    "propagate",
    "pseudo_labels",
    "reweighted_info_nce",
    "strongest_edges",
]

"""CSG2L (arXiv 2504.18148): low-rank global view, pseudo-labels and reweighted contrast, as functions on tensors.

The paper's full text is not public to us; where its abstract is silent, the definitions here are ours and say so.
"""

from functional.graph.contrast import pair_weights, reweighted_info_nce
from functional.graph.low_rank import (
    Factors,
    SparseMatrix,
    low_rank_factors,
    normalized_adjacency,
    propagate,
    purified_factors,
    strongest_edges,
)
from functional.graph.neighbors import joint_graph, nearest_neighbors
from functional.graph.propagation import propagated_features, reduced_together, scaled_together
from functional.graph.pseudo_labels import (
    alignment_share,
    balanced_logits,
    cluster,
    confident_above_mean,
    confident_share,
    masked_cross_entropy,
    node_weights,
    pseudo_labels,
)

__all__ = [
    "Factors",
    "SparseMatrix",
    "alignment_share",
    "balanced_logits",
    "cluster",
    "confident_above_mean",
    "confident_share",
    "joint_graph",
    "low_rank_factors",
    "masked_cross_entropy",
    "nearest_neighbors",
    "node_weights",
    "normalized_adjacency",
    "pair_weights",
    "propagate",
    "propagated_features",
    "pseudo_labels",
    "purified_factors",
    "reduced_together",
    "reweighted_info_nce",
    "scaled_together",
    "strongest_edges",
]

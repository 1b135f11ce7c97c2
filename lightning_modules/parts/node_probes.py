"""Measures of node embeddings: logistic regression and k-means of scikit-learn."""

import torch
from torch import Tensor

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Inverse regularisation of the regression; the validation nodes choose."""


def linear_probe(embeddings: Tensor, labels: Tensor, train: Tensor, val: Tensor, scored: Tensor) -> float:
    """Measure the accuracy of `probe_predictions` on the `scored` nodes, (N,) bool."""
    return float((probe_predictions(embeddings, labels, train, val) == labels)[scored].double().mean())


def probe_predictions(embeddings: Tensor, labels: Tensor, train: Tensor, val: Tensor) -> Tensor:
    """Predict classes (N,) by a logistic regression on unit-length embeddings of the `train` nodes.

    Args:
        embeddings: (N, D).
        labels: (N,).
        train: (N,) bool.
        val: (N,) bool; these nodes choose the regularisation.
    """
    from sklearn.linear_model import LogisticRegression

    x, y = torch.nn.functional.normalize(embeddings).numpy(), labels.numpy()
    train, val = train.numpy(), val.numpy()
    models = [LogisticRegression(C=strength, max_iter=500).fit(x[train], y[train]) for strength in STRENGTHS]
    best = max(models, key=lambda model: model.score(x[val], y[val])) if val.any() else models[2]
    return torch.as_tensor(best.predict(x))


def clustering_scores(embeddings: Tensor, labels: Tensor, num_classes: int, seed: int = 0) -> dict[str, float]:
    """Measure k-means clusters against the labels: normalised mutual information and adjusted Rand index."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    x = torch.nn.functional.normalize(embeddings).numpy()
    found = KMeans(num_classes, n_init=10, random_state=seed).fit_predict(x)
    y = labels.numpy()
    return {"nmi": float(normalized_mutual_info_score(y, found)), "ari": float(adjusted_rand_score(y, found))}

"""Nearest neighbours and joined graphs against double loops in float64."""

import math

import pytest
import torch

from functional.graph import joint_graph, nearest_neighbors, normalized_adjacency


def words(n=30, f=40, seed=0):
    """Bags of words, some rows divided by their sum, the last two empty."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 4, (n, f), generator=generator) * (torch.rand(n, f, generator=generator) < 0.2)
    x = x.float()
    x[:10] /= x[:10].sum(1, keepdim=True).clamp_min(1)
    x[-2:] = 0
    return x


def values(n=30, f=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, f, generator=generator) * torch.tensor([1, 10, 100, 1, 1, 1.0]) + 3
    x[:, 5] = 7.0  # a column that says nothing
    return x


def naive(x, k, similarity):
    """Pairs (i, j), i the source, by double loops."""
    rows = [[float(value) for value in row] for row in x.double()]
    n, f = len(rows), len(rows[0])
    for j in range(f):
        column = [row[j] for row in rows]
        if similarity == "tfidf":
            having = sum(value != 0 for value in column)
            scaled = [value * math.log(n / having) if having else 0.0 for value in column]
        elif similarity == "standardized":
            center = sum(column) / n
            deviation = math.sqrt(sum((value - center) ** 2 for value in column) / n)
            scaled = [(value - center) / deviation if deviation > 1e-12 else 0.0 for value in column]
        else:
            scaled = column
        for row, value in zip(rows, scaled, strict=True):
            row[j] = value
    found = set()
    for i in range(n):
        cosines = {}
        for j in range(n):
            lengths = math.sqrt(sum(v * v for v in rows[i]) * sum(v * v for v in rows[j]))
            if i != j and lengths > 0:
                cosines[j] = sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) / lengths
        nearest = sorted(cosines, key=lambda j: -cosines[j])[:k]
        found |= {(i, j) for j in nearest if cosines[j] > 1e-9} | {(j, i) for j in nearest if cosines[j] > 1e-9}
    return found


@pytest.mark.parametrize(
    ("x", "similarity", "means"),
    [
        (words(), "tfidf", "tfidf"),
        (words(), "auto", "tfidf"),
        (words(), "plain", "plain"),
        (values(), "standardized", "standardized"),
        (values(), "auto", "standardized"),
        (values().abs(), "auto", "standardized"),  # none is negative, but none is 0 either
    ],
    ids=["words", "words found out", "plain", "values", "values found out", "positive values"],
)
@pytest.mark.parametrize("k", [1, 4])
def test_nearest_neighbors(x, similarity, means, k):
    found = nearest_neighbors(x, k, similarity)
    assert set(map(tuple, found.T.tolist())) == naive(x, k, means) and found.dtype == torch.long
    assert found.shape[1] == len(naive(x, k, means))  # coalesced


def test_counts_of_words_and_their_shares_have_the_same_neighbours():
    x = words()
    shares = x / x.sum(1, keepdim=True).clamp_min(1)
    assert torch.equal(nearest_neighbors(x, 3), nearest_neighbors(shares, 3))


def test_nodes_without_features_or_with_nothing_in_common_have_no_neighbours():
    assert not nearest_neighbors(torch.eye(6), 2).numel()
    found = nearest_neighbors(words(), 29)
    assert found.max() < 28 and not nearest_neighbors(torch.zeros(4, 3), 1).numel()


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
def test_joint_graph_and_its_normalisation(weight):
    edges = torch.tensor([[0, 1, 1, 2, 4], [1, 0, 2, 1, 4]])
    near = torch.tensor([[0, 1, 3, 0], [1, 0, 0, 3]])
    found, weights = joint_graph(edges, near, 5, weight)
    dense = torch.zeros(5, 5, dtype=torch.float64)
    for source, target in edges.T.tolist():
        dense[target, source] += source != target
    for source, target in near.T.tolist():
        dense[target, source] += weight
    made = torch.zeros(5, 5, dtype=torch.float64)
    made[found[1], found[0]] = weights
    assert torch.equal(made, dense) and found.shape[1] == (dense > 0).sum()
    degree = dense.sum(1)
    for regularization, diagonal, degrees in ((None, torch.eye(5), degree + 1), (2.0, 0, degree + 2 * degree.mean())):
        wanted = (dense + diagonal) / (degrees[:, None] * degrees).sqrt()
        torch.testing.assert_close(normalized_adjacency(found, 5, regularization, weights).to_dense(), wanted)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nearest_neighbors(words(), 0), r"`k` expected to be in \[1, 30\), below the number of nodes, but got 0"),
        (lambda: nearest_neighbors(words(), 30), "but got 30; 15 is usual"),
        (lambda: nearest_neighbors(words(), 3, "cosine"), "`similarity` expected to be one of auto, tfidf.*'cosine'"),
        (lambda: joint_graph(*[torch.zeros(2, 0).long()] * 2, 3, 0.0), "`neighbor_weight` expected to be above 0 but got 0"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()

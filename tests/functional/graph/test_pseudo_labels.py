"""Pseudo-labels, the confident share of each class, and clusters."""

import math

import pytest
import torch

from functional.graph import (
    alignment_share,
    balanced_logits,
    cluster,
    confident_above_mean,
    confident_share,
    masked_cross_entropy,
    node_weights,
    pseudo_labels,
)


def test_known_labels_stand_and_others_are_the_most_probable():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]], requires_grad=True)
    labels, confidence = pseudo_labels(logits, torch.tensor([2, 9, 9]), torch.tensor([True, False, False]))
    assert labels.tolist() == [2, 1, 2]
    expected = [1.0, math.exp(3) / (math.exp(3) + 2), math.e / (math.e + 2)]
    assert confidence.tolist() == pytest.approx(expected) and not confidence.requires_grad


@pytest.mark.parametrize("alignment", [0.3, 1.0])
def test_alignment_favours_classes_that_are_predicted_seldom(alignment):
    logits = torch.randn(9, 3, generator=torch.Generator().manual_seed(1)) + torch.tensor([4.0, 0.0, -1.0])
    labels, confidence = pseudo_labels(logits, torch.zeros(9, dtype=torch.long), torch.zeros(9, dtype=torch.bool), alignment)
    probabilities = [[math.exp(v) / sum(math.exp(w) for w in row) for v in row] for row in logits.double().tolist()]
    mean = [sum(row[c] for row in probabilities) / 9 for c in range(3)]
    for node, row in enumerate(logits.double().tolist()):
        weighed = [math.exp(v) / mean[c] ** alignment for c, v in enumerate(row)]
        assert labels[node] == max(range(3), key=weighed.__getitem__)
        assert confidence[node].item() == pytest.approx(max(weighed) / sum(weighed), rel=1e-5)
    assert alignment < 1 or (labels > 0).sum() > (logits.argmax(1) > 0).sum()


def test_alignment_is_finite_where_a_class_has_no_probability():
    logits = torch.tensor([[0.0, -2000.0, 1.0], [3.0, -3000.0, 0.0]])
    labels, confidence = pseudo_labels(logits, torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.bool), 1.0)
    assert torch.isfinite(confidence).all() and labels[0] == 1  # of all nodes the one that is least unlike that class


@pytest.mark.parametrize(
    ("prior", "known", "share"), [(0.0, 0, 0.0), (0.0, 7, 0.0), (1.0, 0, 1.0), (1.0, 7, 0.5), (4.0, 140, 1 / 6)]
)
def test_a_prior_counts_as_so_many_labels_of_each_class(prior, known, share):
    assert alignment_share(prior, known, 7) == pytest.approx(share)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_confident_share(share, ties):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 8, (50,), generator=generator).clamp_max(4)  # the last class is the largest
    labels[labels == 3] = 4  # a class without nodes
    confidence = torch.randint(0, 3, (50,), generator=generator).float() if ties else torch.rand(50, generator=generator)
    wanted = set()
    for label in labels.unique().tolist():
        members = [i for i in range(50) if labels[i] == label]
        members.sort(key=lambda i: (-confidence[i].item(), i))
        wanted |= set(members[: math.ceil(50 * share / 5)])
    assert set(confident_share(confidence, labels, share, 5).nonzero()[:, 0].tolist()) == wanted


def test_share_out_of_range():
    with pytest.raises(ValueError, match="`share`"):
        confident_share(torch.ones(2), torch.zeros(2, dtype=torch.long), 1.5, 1)


@pytest.mark.parametrize("known", [[], [0, 3], list(range(8))])
def test_confident_above_the_mean_of_unknown_nodes(known):
    confidence = torch.tensor([1.0, 0.2, 0.6, 1.0, 0.4, 0.4, 0.9, 0.1])
    mask = torch.tensor([node in known for node in range(8)])
    others = [confidence[node].item() for node in range(8) if node not in known]
    mean = sum(others) / max(len(others), 1)
    wanted = [node in known or confidence[node].item() >= mean for node in range(8)]
    assert confident_above_mean(confidence, mask).tolist() == wanted


@pytest.mark.parametrize("chosen", [[], [0, 1, 4], list(range(6))])
def test_balanced_softmax(chosen):
    """Cross-entropy with probabilities n_c e^f_c / Σ n_k e^f_k, n the counts among the taught, at least one."""
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 0, 1, 1])
    mask = torch.tensor([node in chosen for node in range(6)])
    counts = [max(sum(labels[node].item() == c for node in chosen), 1) for c in range(3)]
    found = balanced_logits(logits, labels, mask).softmax(1)
    for node in range(6):
        weighed = [counts[c] * math.exp(logits[node, c].item()) for c in range(3)]
        assert found[node].tolist() == pytest.approx([value / sum(weighed) for value in weighed])


@pytest.mark.parametrize("beta", [-3.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("block_size", [4, 100])
def test_weights_of_nodes_by_loops(beta, block_size):
    """r_i = mean of |1[ŷ_i = ŷ_j] − norm(S_ij)| over trusted j in both directions; w = r^β over its mean on the taught."""
    generator = torch.Generator().manual_seed(0)
    z_a, z_b = (torch.nn.functional.normalize(torch.randn(15, 6, generator=generator)) for _ in range(2))
    labels = torch.randint(0, 4, (15,), generator=generator)
    trusted = torch.rand(15, generator=generator) < 0.7
    taught = trusted & (torch.arange(15) > 4)
    found = node_weights(z_a.requires_grad_(), z_b, labels, trusted, taught, 5, beta, block_size)
    s = [[math.fsum(a * b for a, b in zip(u, v, strict=True)) for v in z_b.double().tolist()] for u in z_a.double().tolist()]
    among = trusted.nonzero().flatten().tolist()
    low, high = min(s[i][j] for i in among for j in among), max(s[i][j] for i in among for j in among)

    def disagreement(i, j):
        return abs(float(labels[i] == labels[j]) - (s[i][j] - low) / (high - low))

    r = {i: sum(disagreement(i, j) + disagreement(j, i) for j in among) / (2 * len(among)) for i in among}
    nodes = taught.nonzero().flatten().tolist()
    mean = sum(r[i] ** beta for i in nodes) / len(nodes)
    assert 3 < len(nodes) < len(among) < 15 and not found.requires_grad
    assert found.tolist() == pytest.approx([r[i] ** beta / mean if i in nodes else 0.0 for i in range(15)], rel=1e-4)


def test_weights_of_nodes_whose_labels_are_wrong():
    """Two tight groups, one node of which has the other's label: hard nodes weigh more with β > 0, less with β < 0."""
    z = torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 5)
    labels, all_of_them = torch.tensor([0] * 5 + [1] * 4 + [0]), torch.ones(10, dtype=torch.bool)
    hard, agreeing = (node_weights(z, z, labels, all_of_them, all_of_them, 2, beta) for beta in (1.0, -1.0))
    assert hard.argmax() == agreeing.argmin() == 9 and agreeing[9] < 0.3
    assert float(hard.mean()) == pytest.approx(1.0) and float(agreeing.mean()) == pytest.approx(1.0)


@pytest.mark.parametrize("trusted", [[], [1]])
def test_weights_are_finite_where_nothing_differs(trusted):
    mask = torch.zeros(4, dtype=torch.bool)
    mask[trusted] = True
    weights = node_weights(torch.eye(4), torch.eye(4), torch.arange(4), mask, mask, 4, 1.0)
    assert torch.equal(weights, mask.float())


@pytest.mark.parametrize("chosen", [[], [2], [0, 1, 3]])
def test_masked_cross_entropy(chosen):
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    labels, mask = torch.tensor([2, 0, 1, 1]), torch.tensor([node in chosen for node in range(4)])
    wanted = sum(logits[node].exp().sum().log() - logits[node, labels[node]] for node in chosen) / max(len(chosen), 1)
    found = masked_cross_entropy(logits, labels, mask)
    assert found.item() == pytest.approx(float(torch.as_tensor(wanted).detach()))
    (gradient,) = torch.autograd.grad(found, logits)
    assert (gradient[~mask] == 0).all() and torch.isfinite(gradient).all()
    weights = torch.tensor([0.5, 3.0, 2.0, 7.0], dtype=torch.float64)
    wanted = sum(w * (logits[n].exp().sum().log() - logits[n, labels[n]]) for n, w in enumerate(weights) if n in chosen)
    found = masked_cross_entropy(logits, labels, mask, weights=weights)
    assert found.item() == pytest.approx(float(torch.as_tensor(wanted).detach()) / max(len(chosen), 1))


def test_clusters_of_separate_points():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = centres.repeat_interleave(5, 0) + torch.randn(15, 2, generator=torch.Generator().manual_seed(0)) * 0.1
    labels, closeness = cluster(points, 3, seed=0)
    assert all(len(set(labels[i : i + 5].tolist())) == 1 for i in (0, 5, 10)) and labels.unique().numel() == 3
    for i in range(15):
        own = points[labels == labels[i]].mean(0)
        assert closeness[i].item() == pytest.approx(1 / (1 + (points[i] - own).norm().item()), rel=1e-4)
    assert cluster(points[:2], 3, seed=0)[0].unique().numel() == 2

"""Pseudo-labels, the confident share of each class, and clusters."""

import math

import pytest
import torch

from functional.graph import cluster, confident_share, pseudo_labels


def test_known_labels_stand_and_others_are_the_most_probable():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]], requires_grad=True)
    labels, confidence = pseudo_labels(logits, torch.tensor([2, 9, 9]), torch.tensor([True, False, False]))
    assert labels.tolist() == [2, 1, 2]
    expected = [1.0, math.exp(3) / (math.exp(3) + 2), math.e / (math.e + 2)]
    assert confidence.tolist() == pytest.approx(expected) and not confidence.requires_grad


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_confident_share(share, ties):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (50,), generator=generator)
    labels[labels == 3] = 4  # a class without nodes
    confidence = torch.randint(0, 3, (50,), generator=generator).float() if ties else torch.rand(50, generator=generator)
    wanted = set()
    for label in labels.unique().tolist():
        members = [i for i in range(50) if labels[i] == label]
        members.sort(key=lambda i: (-confidence[i].item(), i))
        wanted |= set(members[: math.ceil(len(members) * share)])
    assert set(confident_share(confidence, labels, share).nonzero()[:, 0].tolist()) == wanted


def test_share_out_of_range():
    with pytest.raises(ValueError, match="`share`"):
        confident_share(torch.ones(2), torch.zeros(2, dtype=torch.long), 1.5)


def test_clusters_of_separate_points():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = centres.repeat_interleave(5, 0) + torch.randn(15, 2, generator=torch.Generator().manual_seed(0)) * 0.1
    labels, closeness = cluster(points, 3, seed=0)
    assert all(len(set(labels[i : i + 5].tolist())) == 1 for i in (0, 5, 10)) and labels.unique().numel() == 3
    for i in range(15):
        own = points[labels == labels[i]].mean(0)
        assert closeness[i].item() == pytest.approx(1 / (1 + (points[i] - own).norm().item()), rel=1e-4)
    assert cluster(points[:2], 3, seed=0)[0].unique().numel() == 2

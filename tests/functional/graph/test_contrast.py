"""Reweighted InfoNCE against loops over the formulas in float64: values, gradients, any block size, degenerate similarities."""

import math

import pytest
import torch

from functional.graph import reweighted_info_nce

FORMS = ("hsan", "negatives", "multi_positive")


def views(n=13, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    z = torch.nn.functional.normalize(z, dim=-1)
    labels = torch.randint(0, 3, (n,), generator=generator)
    confident = torch.rand(n, generator=generator) < 0.6
    return z[0].requires_grad_(), z[1].requires_grad_(), labels, confident


def extremes(values):
    return min(values), max(values)


def naive(z_a, z_b, labels, confident, form, beta=1.0, temperature=0.5, reweight="both", intra=False, anchors=None):
    """The docstring's formulas, one pair at a time; R from plain numbers, so that no gradient flows through it."""
    n, total = len(z_a), 0.0
    anchors = range(n) if anchors is None else anchors.tolist()
    for own, other in ((z_a, z_b), (z_b, z_a)):
        across = {(i, j): own[i] @ other[j] for i in anchors for j in range(n)}
        within = {(i, j): own[i] @ own[j] for i in anchors for j in range(n) if i != j}

        def weigh(pairs):
            low, high = extremes([float(value.detach()) for value in pairs.values()])
            found = {}
            for (i, j), value in pairs.items():
                same = bool(labels[i] == labels[j])
                norm = (float(value.detach()) - low) / (high - low) if high > low else 0.0
                counted = confident[i] and confident[j] and (reweight == "both" or same == (reweight == "positives"))
                found[i, j] = abs(float(same) - norm) ** beta if counted else 1.0
            return found

        r, r_within = weigh(across), weigh(within) if intra else {}
        for i in anchors:
            positives = {i} | {j for j in range(n) if confident[j] and labels[j] == labels[i]}
            if form == "hsan":
                terms = [torch.exp(r[i, j] * across[i, j] / temperature) for j in range(n)]
                terms += [torch.exp(r_within[i, j] * within[i, j] / temperature) for j in range(n) if intra and j != i]
                total = total - (torch.exp(r[i, i] * across[i, i] / temperature) / sum(terms)).log()
                continue
            spared = positives if form == "multi_positive" else set()
            terms = [(1.0 if j in spared else r[i, j]) * torch.exp(across[i, j] / temperature) for j in range(n)]
            for j in range(n):
                if intra and j != i:
                    terms.append((1.0 if j in spared else r_within[i, j]) * torch.exp(within[i, j] / temperature))
            log_sum = sum(terms).log()
            if form == "negatives":
                total = total - (across[i, i] / temperature - log_sum)
                continue
            w = {j: 1.0 if j == i else r[i, j] for j in positives}
            total = total - sum(w[j] * (across[i, j] / temperature - log_sum) for j in positives) / sum(w.values())
    return total / (2 * len(list(anchors)))


def check(z_a, z_b, labels, confident, block_size=4, tolerance=1e-9, **options):
    found = reweighted_info_nce(z_a, z_b, labels, confident, block_size=block_size, **{k: v for k, v in options.items()})
    names = {"intra_view": "intra"}
    wanted = naive(z_a, z_b, labels, confident, **{names.get(key, key): value for key, value in options.items()})
    assert found.item() == pytest.approx(wanted.item(), rel=tolerance, abs=tolerance)
    for got, expected in zip(torch.autograd.grad(found, (z_a, z_b)), torch.autograd.grad(wanted, (z_a, z_b)), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block_size", [1, 4, 13, 100])
def test_values_and_gradients(form, block_size):
    check(*views(), form=form, block_size=block_size)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("intra", [False, True])
@pytest.mark.parametrize("reweight", ["both", "positives", "negatives"])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_options(form, intra, reweight, beta):
    check(*views(seed=1), form=form, intra_view=intra, reweight=reweight, beta=beta, temperature=0.2)


@pytest.mark.parametrize("form", FORMS)
def test_anchors_are_rows_and_range(form):
    z_a, z_b, labels, confident = views(seed=2)
    check(z_a, z_b, labels, confident, form=form, anchors=torch.tensor([7, 2, 11, 0, 5]), block_size=2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chosen", ["nobody", "everybody"])
@pytest.mark.parametrize("classes", [1, 13])
def test_one_class_and_as_many_classes_as_nodes(form, chosen, classes):
    z_a, z_b, labels, confident = views(seed=3)
    labels = torch.arange(13) % classes
    check(z_a, z_b, labels, torch.full_like(confident, chosen == "everybody"), form=form)


@pytest.mark.parametrize("form", FORMS)
def test_equal_similarities_are_neither_hard_nor_easy(form):
    """Min-max of a constant: norm is 0, so negatives drop out and positives count in full."""
    z = torch.ones(6, 4, dtype=torch.float64) / 2
    z_a, z_b = z.clone().requires_grad_(), z.clone().requires_grad_()
    check(z_a, z_b, torch.tensor([0, 0, 1, 1, 2, 2]), torch.ones(6, dtype=torch.bool), form=form)


@pytest.mark.parametrize("form", FORMS)
def test_ties_and_zero_weights_stay_finite(form):
    z = torch.eye(3, dtype=torch.float64)[torch.tensor([0, 0, 1, 1, 2, 2])]
    z_a, z_b = z.clone().requires_grad_(), z.clone().requires_grad_()
    if form != "negatives":  # where each weight of a denominator is zero, the formula itself is minus infinity
        check(z_a, z_b, torch.tensor([0, 0, 1, 1, 2, 2]), torch.ones(6, dtype=torch.bool), form=form, beta=2.0)
    loss = reweighted_info_nce(z_a, z_b, torch.tensor([0, 0, 1, 1, 2, 2]), form=form)
    assert all(torch.isfinite(value).all() for value in (loss, *torch.autograd.grad(loss, (z_a, z_b))))
    z_a, z_b = (torch.nn.functional.normalize(torch.eye(2, dtype=torch.float64) + 0.5).requires_grad_() for _ in range(2))
    loss = reweighted_info_nce(z_a, z_b, torch.tensor([0, 0]), form=form)
    assert all(torch.isfinite(value).all() for value in (loss, *torch.autograd.grad(loss, (z_a, z_b))))


@pytest.mark.parametrize("form", FORMS)
def test_without_labels_it_is_plain_info_nce(form):
    z_a, z_b, *_ = views(seed=4)
    n = len(z_a)
    wanted = sum(torch.nn.functional.cross_entropy(scores / 0.3, torch.arange(n)) / 2 for scores in (z_a @ z_b.T, z_b @ z_a.T))
    assert reweighted_info_nce(z_a, z_b, form=form, temperature=0.3, block_size=5).item() == pytest.approx(wanted.item())


def test_blocks_give_the_gradient_of_the_whole_through_an_encoder():
    x = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    labels, confident = torch.arange(40) % 4, torch.arange(40) % 3 > 0
    gradients = []
    for block_size in (7, 40):
        torch.manual_seed(6)
        encoder = torch.nn.Linear(6, 3).double()
        z = torch.nn.functional.normalize(encoder(x))
        reweighted_info_nce(z, z.flip(1), labels, confident, block_size=block_size).backward()
        gradients.append(encoder.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


def test_extreme_temperatures_do_not_overflow_in_single_precision():
    z_a, z_b, labels, confident = views(seed=7)
    for form in FORMS:
        loss = reweighted_info_nce(z_a.float(), z_b.float(), labels, confident, form, temperature=1e-3)
        assert math.isfinite(loss.item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "simclr"}, "`form` expected to be one of hsan, negatives, multi_positive but got 'simclr'"),
        ({"reweight": "hard"}, "`reweight` expected"),
        ({"temperature": 0.0}, "`temperature`"),
        ({"beta": -1.0}, "`beta`"),
        ({"block_size": 0}, "`block_size`"),
    ],
)
def test_wrong_arguments(options, message):
    z_a, z_b, labels, confident = views()
    with pytest.raises(ValueError, match=message):
        reweighted_info_nce(z_a, z_b, labels, confident, **options)
    with pytest.raises(ValueError, match="one shape"):
        reweighted_info_nce(z_a, z_b[:-1])

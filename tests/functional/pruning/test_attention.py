"""Attention measures against sums written out entry by entry in Python floats, which are float64."""

import math

import pytest
import torch

from functional.pruning.attention import attention_divergence, attention_entropy, attention_mass, outlier_ratio


def probabilities(seed, shape=(2, 3, 5, 5), causal=True, dtype=torch.float32, sharpness=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * sharpness
    if causal:
        hidden = torch.ones(shape[-2:], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(hidden, -math.inf)
    return logits.softmax(-1).to(dtype)


def rows(p):
    return [row.double().tolist() for row in p.reshape(-1, p.shape[-1])]


@pytest.mark.parametrize("causal", [True, False])
def test_divergence_by_hand(causal):
    pruned, dense = probabilities(0, causal=causal), probabilities(1, causal=causal)
    by_hand = [
        sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
        for p, q in zip(rows(pruned), rows(dense), strict=True)
    ]
    assert attention_divergence(pruned, dense).item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)
    assert attention_divergence(dense, pruned).item() != pytest.approx(sum(by_hand) / len(by_hand), rel=1e-2)


def test_divergence_of_equal_attention_is_zero_and_else_positive():
    p = probabilities(0, sharpness=40.0)  # some probabilities underflow to 0
    assert (p == 0).sum() > 60 and attention_divergence(p, p).item() == 0.0
    for seed in range(5):
        assert attention_divergence(probabilities(seed), probabilities(seed + 9)) > 0


def test_divergence_is_finite_where_the_dense_probability_underflowed():
    """A key that only the pruned model sees: finite, and larger than without it."""
    dense = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)
    far = attention_divergence(torch.tensor([0.5, 0.5]).reshape(1, 1, 1, 2), dense)
    near = attention_divergence(torch.tensor([0.9, 0.1]).reshape(1, 1, 1, 2), dense)
    assert math.isfinite(far) and far > near > 0


def test_half_precision_is_computed_in_float32():
    pruned, dense = probabilities(0, dtype=torch.bfloat16), probabilities(1, dtype=torch.bfloat16)
    assert attention_divergence(pruned, dense).dtype == torch.float32
    torch.testing.assert_close(attention_divergence(pruned, dense), attention_divergence(pruned.float(), dense.float()))


def test_entropy_by_hand():
    p = probabilities(2)
    by_hand = [-sum(a * math.log(a) for a in row if a > 0) for row in rows(p)]
    assert attention_entropy(p).item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)
    assert attention_entropy(torch.full((1, 1, 4, 8), 1 / 8)).item() == pytest.approx(math.log(8))


def test_mass_by_hand():
    """⌈share · keys that the query sees⌉ largest keys, in exact integers."""
    p = probabilities(3, shape=(2, 2, 50, 50))
    for share, (numerator, denominator) in {0.01: (1, 100), 0.05: (1, 20), 0.2: (1, 5), 1.0: (1, 1)}.items():
        by_hand = []
        for row in rows(p):
            seen = sorted((a for a in row if a > 0), reverse=True)
            count = -(-len(seen) * numerator // denominator)
            by_hand.append(sum(seen[:count]))
        assert attention_mass(p, (share,)).item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5), share
    assert attention_mass(p, (0.01, 1.0))[1].item() == pytest.approx(1.0)


def test_outlier_ratio_by_hand():
    weight = torch.randn(7, 11, generator=torch.Generator().manual_seed(4)) ** 3
    entries = [abs(x) for row in weight.double().tolist() for x in row]
    mean = sum(entries) / len(entries)
    assert outlier_ratio(weight) == pytest.approx(sum(x > mean for x in entries) / len(entries))
    assert outlier_ratio(torch.ones(3, 3)) == 0.0
    assert outlier_ratio(weight) < outlier_ratio(weight.sign() * weight.abs() ** (1 / 3)), "a longer tail has fewer outliers"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: attention_divergence(p, p[..., :4]), r"same for both, but got \(2, 3, 5, 5\) and \(2, 3, 5, 4\)"),
        (lambda p: attention_entropy(p[0]), r"but got \(3, 5, 5\)"),
        (lambda p: attention_mass(p, (0.0,)), r"`shares` expected to be numbers in \(0, 1\] but got \(0.0,\)"),
        (lambda p: attention_mass(p, ()), r"`shares`"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(probabilities(0))

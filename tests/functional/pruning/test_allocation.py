"""Allocation of zeros against naive float64 references and brute force, and its sums for any sizes."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional.pruning import METHODS, prune_linear, prune_linears, zeros_wanted
from functional.pruning.allocation import (
    GRID,
    bounds,
    depth_sparsities,
    equal_slopes,
    error_curve,
    outlier_ratio_of_scores,
    owl_sparsities,
    unit_tokens,
    whole_numbers,
    written_share,
)
from tests.helpers.problems import collect, problem

ANY = settings(max_examples=100, deadline=None, derandomize=True)


def naive_errors(weight, square_norm):
    """Relative error after each number of zeros, in float64: (numel + 1,)."""
    scores = sorted(
        w**2 * n for row in weight.double().tolist() for w, n in zip(row, square_norm.double().tolist(), strict=True)
    )
    return np.concatenate([[0], np.cumsum(scores)]) / sum(scores)


def test_outlier_ratio_counts_over_the_whole_part():
    scores = [torch.rand(7, 5) ** 8, 3 * torch.rand(4, 3) ** 8]
    values = [value for part in scores for value in part.flatten().tolist()]
    mean = sum(values) / len(values)
    for threshold in (1.0, 3.0, 5.0):
        expected = sum(value > threshold * mean for value in values) / len(values)
        assert outlier_ratio_of_scores(scores, threshold) == pytest.approx(expected)


def test_owl_is_linear_in_the_outliers():
    ratios, sizes = [0.02, 0.05, 0.04], [100, 100, 100]
    found = owl_sparsities(ratios, sizes, 0.7, 0.08)
    plain = np.array([0.78, 0.62, 0.62 + 0.16 / 3])
    np.testing.assert_allclose(found, plain + 0.7 - plain.mean(), atol=1e-12)
    assert owl_sparsities([0.1, 0.1], [3, 5], 0.6, 0.08) == pytest.approx([0.6, 0.6])


@ANY
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=12), st.floats(0.2, 0.8), st.floats(-0.1, 0.1))
def test_depth_is_linear_and_keeps_the_mean(sizes, sparsity, slope):
    found = depth_sparsities(sizes, sparsity, slope)
    last = max(len(sizes) - 1, 1)
    line = [sparsity + slope * (1 - 2 * part / last) if len(sizes) > 1 else sparsity for part in range(len(sizes))]
    shift = sparsity - sum(share * size for share, size in zip(line, sizes, strict=True)) / sum(sizes)
    if len(set(sizes)) == 1:
        assert abs(shift) < 1e-9
    assert all(0 <= share + shift <= 1 for share in line)
    assert found == pytest.approx([share + shift for share in line])


@ANY
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**6)), min_size=1, max_size=8),
    st.floats(0.05, 0.95),
    st.floats(0, 0.05),
)
def test_owl_keeps_the_mean_and_the_order(parts, sparsity, spread):
    ratios, sizes = zip(*parts, strict=True)
    found = owl_sparsities(ratios, sizes, sparsity, spread)
    assert np.dot(found, sizes) == pytest.approx(sparsity * sum(sizes), rel=1e-9)
    assert all(0 <= share <= 1 and abs(share - sparsity) <= 2 * spread + 1e-9 for share in found)
    order = np.argsort(ratios)
    assert (np.diff(np.array(found)[order]) <= 1e-9).all()


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_error_curve_is_that_of_the_sorted_scores(scale):
    weight, x = problem("outliers", rows=7, columns=12, samples=2, tokens=9, seed=0)
    square_norm = x.square().sum((0, 1))
    expected = naive_errors(weight, square_norm)
    curve = error_curve(weight * scale, square_norm * scale).numpy()
    np.testing.assert_allclose(curve, np.interp(np.arange(GRID + 1) / GRID, np.arange(85) / 84, expected), atol=1e-6)
    assert curve[0] == 0 and curve[-1] == 1 and (np.diff(curve, 2) > -1e-9).all()


def test_error_curve_of_nothing_and_of_very_many():
    assert torch.equal(error_curve(torch.zeros(2, 3), torch.ones(3)), error_curve(torch.ones(2, 3), torch.zeros(3)))
    weight, norms = torch.randn(3000, 200, generator=torch.Generator().manual_seed(0)), torch.rand(200)
    np.testing.assert_allclose(error_curve(weight, norms), error_curve(weight[:1310], norms), atol=5e-3)


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_unit_tokens_and_written_share(scale):
    before, after = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3, 5)
    before[0, 0], after[1, 1] = 0, 0
    b, a = before.double(), after.double()
    expected = sum(((a[i, j] - b[i, j]).norm() / a[i, j].norm()) ** 2 for i in range(2) for j in range(3) if a[i, j].any())
    assert written_share(before, after).item() == pytest.approx(expected.item(), rel=1e-5)
    lengths = unit_tokens(before * scale).norm(dim=-1)
    torch.testing.assert_close(lengths, (before != 0).any(-1).float())
    torch.testing.assert_close(unit_tokens(before[1] * scale), before[1] / before[1].norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("seed", range(8))
def test_equal_slopes_by_brute_force(seed):
    """Every combination of grid points with the same number of zeros, parts of equal size."""
    generator = np.random.default_rng(seed)
    curves = [np.concatenate([[0], np.cumsum(np.sort(generator.random(10) ** 4))]) for _ in range(3)]
    low, high, zeros = 0.2, 0.9, int(generator.integers(9, 24))
    found = equal_slopes(curves, [50] * 3, zeros / 30, low, high)
    combinations = [k for k in itertools.product(range(2, 10), repeat=3) if sum(k) == zeros]
    best = min(combinations, key=lambda k: sum(curve[i] for curve, i in zip(curves, k, strict=True)))
    np.testing.assert_allclose(found, np.array(best) / 10, atol=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_equal_slopes_of_unequal_parts(seed):
    """Two parts: a fine scan of what is left of freedom finds nothing better, and the slopes per weight are equal."""
    generator = np.random.default_rng(seed)
    grid, sizes, sparsity = np.arange(201) / 200, [300, 1100], float(generator.uniform(0.3, 0.8))
    curves = [grid ** generator.uniform(2, 6) for _ in sizes]
    low, high = bounds(sparsity)
    found = equal_slopes(curves, sizes, sparsity, low, high)
    assert np.dot(found, sizes) == pytest.approx(sparsity * sum(sizes)) and all(low - 1e-9 <= s <= high + 1e-9 for s in found)

    def total(first, second):
        return np.interp(first, grid, curves[0]) + np.interp(second, grid, curves[1])

    first = np.linspace(low, high, 20001)
    second = (sparsity * sum(sizes) - sizes[0] * first) / sizes[1]
    inside = (second >= low) & (second <= high)
    assert total(*found) <= total(first[inside], second[inside]).min() + 1e-9
    if all(low + 0.01 < share < high - 0.01 for share in found):
        slopes = [np.interp(s + 0.005, grid, c) - np.interp(s - 0.005, grid, c) for s, c in zip(found, curves, strict=True)]
        assert slopes[0] / sizes[0] == pytest.approx(slopes[1] / sizes[1], rel=0.1)


linears = st.tuples(st.integers(1, 40), st.integers(2, 40), st.booleans(), st.floats(0, 1))


@ANY
@given(st.lists(linears, min_size=1, max_size=9), st.integers(0, 100))
def test_zeros_sum_up_exactly(parts, hundredths):
    """Where one linear at least can have any number of zeros; else less than a row's worth is missing."""
    sizes = [rows * columns for rows, columns, *_ in parts]
    units = [rows if by_rows else 1 for rows, _, by_rows, _ in parts]
    most = sum(size - unit for size, unit in zip(sizes, units, strict=True))
    zeros = min(zeros_wanted(sum(sizes), hundredths / 100), most)
    found = whole_numbers([share for *_, share in parts], sizes, units, zeros)
    assert all(0 <= number <= size - unit for number, size, unit in zip(found, sizes, units, strict=True))
    assert not any(number % unit for number, unit in zip(found, units, strict=True))
    missing = zeros - sum(found)
    room = [unit for number, size, unit in zip(found, sizes, units, strict=True) if number + unit < size]
    assert missing == 0 or (missing > 0 and all(unit > missing for unit in room))


@ANY
@given(st.integers(2, 30), st.integers(2, 40), st.integers(10, 90), st.integers(0, 10**6))
def test_zeros_are_near_the_shares(number, columns, hundredths, seed):
    """With shares that sum up, no linear is further from its own than its unit and its part of what the others left."""
    generator = np.random.default_rng(seed)
    sizes = (generator.integers(1, 20, number) * columns).tolist()
    units = [size // columns if i % 2 else 1 for i, size in enumerate(sizes)]
    shares = owl_sparsities(generator.random(number), sizes, hundredths / 100, 0.05)
    found = whole_numbers(shares, sizes, units, zeros_wanted(sum(sizes), hundredths / 100))
    missing = zeros_wanted(sum(sizes), hundredths / 100) - sum(found)
    full = all(zeros == size - 1 for zeros, size, unit in zip(found, sizes, units, strict=True) if unit == 1)
    assert missing == 0 or (full and 0 < missing < max(units))
    evenly = sum(units) / units.count(1) + 2
    for share, size, unit, zeros in zip(shares, sizes, units, found, strict=True):
        assert abs(zeros - share * size) <= unit + evenly or zeros == size - unit


@pytest.mark.parametrize("method", METHODS)
def test_linears_with_shares_of_their_own(method):
    """Pruned together as one by one, each exactly as many zeros as was said."""
    from fractions import Fraction

    weight, x = problem("correlated", rows=18, columns=24, samples=4, tokens=20, seed=1)
    weights = list(weight.split(6))
    statistics = [collect(part, x) for part in weights]
    by_rows = method in ("wanda", "d2_wanda")
    shares = [Fraction(zeros, 144) for zeros in ([60, 60, 90] if by_rows else [61, 61, 97])]
    together = prune_linears(
        weights, statistics[0][0], [y for _, y in statistics], method=method, sparsity=shares, block_size=7
    )
    for part, (inputs, y), share, result in zip(weights, statistics, shares, together, strict=True):
        alone = prune_linear(part, inputs, y, method=method, sparsity=share, block_size=7)
        assert torch.equal(alone.mask, result.mask) and int((~result.mask).sum()) == share * 144
        torch.testing.assert_close(alone.weight, result.weight, rtol=1e-4, atol=1e-5)


def test_a_fraction_of_a_large_number_is_exact():
    from fractions import Fraction

    numel = 4096 * 11008
    assert all(zeros_wanted(numel, Fraction(zeros, numel)) == zeros for zeros in (1, numel // 3, numel - 1))

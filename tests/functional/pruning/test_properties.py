"""Properties of prune_linear that hold for any weight, any calibration data and any setting."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional.pruning import METHODS, InputStatistics, OutputStatistics, prune_linear
from tests.helpers.problems import KINDS, collect, energy, problem

FEW = settings(max_examples=60, deadline=None, derandomize=True)
methods = st.sampled_from(METHODS)
sparsities = st.integers(0, 99).map(lambda hundredths: hundredths / 100)
problems = st.builds(
    problem,
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 10),
    columns=st.integers(1, 6).map(lambda groups: 4 * groups),
    samples=st.integers(1, 4),
    tokens=st.integers(1, 12),
    seed=st.integers(0, 10**6),
)
arguments = st.fixed_dictionaries(
    {"method": methods, "block_size": st.integers(1, 32), "damping": st.sampled_from([0.0, 0.01, 1.0])},
    optional={"lambda1": st.floats(0, 100), "lambda2": st.floats(0, 100), "activation_norm": st.just("official")},
)


@FEW
@given(problems, arguments, sparsities)
def test_sparsity_is_exact_and_zeros_are_where_the_mask_says(given_problem, options, sparsity):
    weight, x = given_problem
    result = prune_linear(weight, *collect(weight, x), sparsity=sparsity, **options)
    rows, columns = weight.shape
    hundredths = round(100 * sparsity)
    if options["method"] in ("wanda", "d2_wanda"):
        assert ((~result.mask).sum(1) == columns * hundredths // 100).all()
    else:
        assert (~result.mask).sum() == rows * columns * hundredths // 100
    assert result.weight.isfinite().all() and (result.weight[~result.mask] == 0).all()
    assert result.weight.dtype == weight.dtype and result.mask.shape == weight.shape


@FEW
@given(problems, arguments, st.sampled_from(["1:2", "2:4", "1:4", "3:4"]))
def test_patterns_are_exact_in_every_group(given_problem, options, pattern):
    weight, x = given_problem
    zeros, group = map(int, pattern.split(":"))
    result = prune_linear(weight, *collect(weight, x), pattern=pattern, **options)
    assert ((~result.mask).reshape(-1, group).sum(1) == zeros).all()
    assert result.weight.isfinite().all() and (result.weight[~result.mask] == 0).all()


@FEW
@given(problems, arguments, st.one_of(sparsities, st.sampled_from(["1:2", "2:4", "3:4"])))
def test_the_error_is_never_above_that_of_zeroing_the_same_mask(given_problem, options, target):
    weight, x = given_problem
    target = {"pattern": target} if isinstance(target, str) else {"sparsity": target}
    result = prune_linear(weight, *collect(weight, x), **target, **options)
    error = energy(weight - result.weight, x)
    rounding = 1e-6 * (weight.square().sum() * x.square().sum()).item()  # float32; what cancels in sums is larger than they
    assert error <= energy(weight * ~result.mask, x) * (1 + 1e-4) + rounding
    assert result.error == pytest.approx(error, rel=1e-3, abs=rounding)
    assert result.norm == pytest.approx(energy(weight, x), rel=1e-3, abs=rounding)


@settings(FEW, max_examples=40)
@given(
    seed=st.integers(0, 10**6), method=methods, samples=st.integers(2, 8), target=st.sampled_from([0.3, 0.7, "2:4"]),
    order=st.randoms(use_true_random=False), cuts=st.sets(st.integers(1, 7)),
)  # fmt: skip
def test_order_and_shards_of_the_samples_do_not_matter(seed, method, samples, target, order, cuts):
    """Under rms norms the positions of samples play no part, so shards may number theirs as they like."""
    weight, x = problem("correlated", rows=12, columns=24, samples=samples, tokens=16, seed=seed)
    target = {"pattern": target} if isinstance(target, str) else {"sparsity": target}
    expected = prune_linear(weight, *collect(weight, x), method=method, **target)

    positions = list(range(samples))
    order.shuffle(positions)
    bounds = [0, *sorted(cut for cut in cuts if cut < samples), samples]
    inputs, outputs = InputStatistics(24), OutputStatistics(12)
    for start, end in itertools.pairwise(bounds):
        shard = x[positions[start:end]]
        part = collect(weight, shard)
        inputs.merge(part[0])
        outputs.merge(part[1])
    found = prune_linear(weight, inputs, outputs, method=method, **target)
    assert (found.mask == expected.mask).double().mean() >= 0.999
    np.testing.assert_allclose(found.weight.numpy(), expected.weight.numpy(), rtol=1e-2, atol=1e-3 * weight.abs().max().item())
    assert found.error == pytest.approx(expected.error, rel=1e-3)
    assert torch.allclose(inputs.gram, collect(weight, x)[0].gram, rtol=1e-5, atol=1e-3)

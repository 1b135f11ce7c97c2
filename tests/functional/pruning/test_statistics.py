"""InputStatistics and OutputStatistics: sums that do not depend on order, batching or where they were taken."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional.pruning import InputStatistics, OutputStatistics, derived_outputs, prune_linear
from functional.pruning.gram import in_half
from tests.helpers.problems import KINDS, collect, problem

SAMPLES, TOKENS, FEATURES = 6, 5, 4
X = torch.randn(SAMPLES, TOKENS, FEATURES, generator=torch.Generator().manual_seed(1))


def running_rescale(samples, scale, updated):
    """The order-dependent recursion of the released code, in float64: rescale by n/(n+1), then add un-normalised."""
    total = torch.zeros(samples.shape[-1], dtype=torch.float64)
    for n, sample in enumerate(samples.double()):
        total *= n / (n + 1)
        total += (2 / (n + 1)) ** 0.5 * sample.norm(dim=0) / scale if updated else sample.norm(dim=0) / scale
    return total


def test_gram_hessian_and_norms():
    statistics = InputStatistics(FEATURES).update(X, 0)
    tokens = X.double().reshape(-1, FEATURES)
    gram = sum(torch.outer(token, token) for token in tokens)
    torch.testing.assert_close(statistics.gram.double(), gram, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.hessian().double(), 2 / SAMPLES * gram, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.mean_square_norm().double(), gram.diagonal() / SAMPLES, rtol=1e-5, atol=1e-6)
    assert (statistics.num_samples, statistics.num_tokens) == (SAMPLES, SAMPLES * TOKENS)


def test_official_norms_equal_the_recursion_of_the_released_code():
    inputs, outputs = InputStatistics(FEATURES).update(X, 0), OutputStatistics(FEATURES).update(X, 0)
    without, updated = running_rescale(X, 3.0, False), running_rescale(X, 3.0, True)
    torch.testing.assert_close(inputs.activation_norm("official", 3.0).double(), without, rtol=1e-5, atol=0)
    torch.testing.assert_close(inputs.updated_activation_norm("official", 3.0).double(), updated, rtol=1e-5, atol=0)
    torch.testing.assert_close(outputs.activation_norm("official", 3.0).double(), without, rtol=1e-5, atol=0)


def test_rms_with_the_number_of_tokens_as_scale_is_the_root_mean_square():
    expected = X.double().square().mean((0, 1)).sqrt()
    for statistics in (InputStatistics(FEATURES), OutputStatistics(FEATURES)):
        norm = statistics.update(X, 0).activation_norm("rms", TOKENS)
        torch.testing.assert_close(norm.double(), expected, rtol=1e-5, atol=0)


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(SAMPLES)), cuts=st.sets(st.integers(1, SAMPLES - 1)), contiguous=st.booleans())
def test_any_order_batching_and_split_gives_the_same_sums(order, cuts, contiguous):
    """Batches of any size in any order, each into a part of its own, merged: the parts know only global positions."""
    if contiguous:
        order = list(range(SAMPLES))
    bounds = [0, *sorted(cuts), SAMPLES]
    parts = []
    for start, end in itertools.pairwise(bounds):
        chosen = torch.tensor(order[start:end])
        parts.append(InputStatistics(FEATURES).update(X[chosen], start if contiguous else chosen))
    merged = parts.pop()
    while parts:
        merged.merge(parts.pop())
    whole = InputStatistics(FEATURES).update(X, 0)
    assert (merged.num_samples, merged.num_tokens) == (whole.num_samples, whole.num_tokens)
    for name, value in whole.sums().items():
        torch.testing.assert_close(merged.sums()[name], value, rtol=2e-6, atol=1e-6, msg=name)


def test_official_depends_on_positions_and_rms_does_not():
    reversed_positions = InputStatistics(FEATURES).update(X.flip(0), 0)
    in_order = InputStatistics(FEATURES).update(X, 0)
    assert not torch.allclose(
        reversed_positions.activation_norm("official", 1.0), in_order.activation_norm("official", 1.0), rtol=1e-3
    )
    torch.testing.assert_close(reversed_positions.activation_norm("rms", 1.0), in_order.activation_norm("rms", 1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_float32(dtype):
    x = (X * 300).to(dtype)  # squares and sums leave float16's range
    statistics = InputStatistics(FEATURES).update(x, 0)
    assert statistics.gram.dtype == torch.float32 and statistics.gram.isfinite().all()
    torch.testing.assert_close(statistics.gram, InputStatistics(FEATURES).update(x.float(), 0).gram)
    assert statistics.square_norm.isfinite().all()


@pytest.mark.parametrize(
    ("precision", "dtype", "expected"),
    [
        ("auto", torch.float32, "highest"),
        ("auto", torch.bfloat16, "high"),
        ("auto", torch.float16, "high"),
        ("high", torch.float32, "high"),
        ("highest", torch.float16, "highest"),
    ],
)
def test_auto_is_as_exact_as_the_inputs(precision, dtype, expected):
    statistics = InputStatistics(FEATURES, precision).update(X.to(dtype), 0)
    assert statistics.precision == expected
    assert InputStatistics(FEATURES, precision).merge(statistics).precision == expected  # of a process without samples
    assert statistics.merge(InputStatistics(FEATURES, precision)).precision == expected


def test_merging_nothing_changes_nothing():
    statistics = InputStatistics(FEATURES).update(X, 0)
    before = statistics.gram.clone()
    statistics.merge(InputStatistics(FEATURES))
    assert torch.equal(statistics.gram, before) and statistics.num_samples == SAMPLES
    empty = InputStatistics(FEATURES).merge(statistics)
    assert torch.equal(empty.gram, before) and empty.num_tokens == SAMPLES * TOKENS


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: InputStatistics(0), "`features` expected to be a positive integer but got 0"),
        (lambda: InputStatistics(4).update(X[0], 0), r"shape \(samples, tokens, 4\) but got \(5, 4\)"),
        (lambda: InputStatistics(3).update(X, 0), r"shape \(samples, tokens, 3\)"),
        (lambda: InputStatistics(4).update(X, -1), "`sample_index` expected to be a position from 0 on.*-1"),
        (lambda: InputStatistics(4).update(X, torch.arange(3)), "`sample_index`.*6 of them"),
        (lambda: InputStatistics(4).activation_norm("rms", 1.0), "hold no tokens. Call `update`"),
        (lambda: InputStatistics(4).hessian(), "hold no tokens"),
        (lambda: InputStatistics(4).update(X, 0).merge(InputStatistics(3)), r"expected to be InputStatistics\(4\)"),
        (lambda: InputStatistics(4).update(X, 0).merge(OutputStatistics(4)), r"but got OutputStatistics\(4\)"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_float64_inputs_and_autocast_are_summed_in_float32():
    plain = InputStatistics(FEATURES).update(X, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = InputStatistics(FEATURES).update(X.double(), 0)
    for name, value in plain.sums().items():
        torch.testing.assert_close(mixed.sums()[name], value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [4, 0, 5, 2, 1, 3]])
def test_a_gram_matrix_of_the_first_samples_measures_errors(order):
    """Whatever the order of samples: positions decide. What it cannot serve is refused."""
    part = InputStatistics(FEATURES, gram_samples=2)
    for sample in order:
        part.update(X[sample : sample + 1], sample)
    first = X[:2].reshape(-1, FEATURES).double()
    torch.testing.assert_close(part.gram.double(), first.T @ first, rtol=1e-5, atol=1e-6)
    assert (part.gram_tokens, part.num_tokens) == (2 * TOKENS, SAMPLES * TOKENS)
    whole = InputStatistics(FEATURES).update(X, 0)
    torch.testing.assert_close(part.square_norm, whole.square_norm)
    weight = torch.randn(3, FEATURES, generator=torch.Generator().manual_seed(1))
    result = prune_linear(weight, part, method="wanda", sparsity=0.5)
    dropped = (weight * ~result.mask).double()
    share = (2 * TOKENS) / (SAMPLES * TOKENS)
    assert result.error == pytest.approx((first @ dropped.T).square().sum().item() / share, rel=1e-5)
    assert torch.equal(result.mask, prune_linear(weight, whole, method="wanda", sparsity=0.5).mask)
    with pytest.raises(ValueError, match=rf"holds {2 * TOKENS} of {SAMPLES * TOKENS} tokens, but a weight update needs all"):
        prune_linear(weight, part, method="sparsegpt", sparsity=0.5)
    with pytest.raises(ValueError, match="`gram_samples` expected to be a positive number or None but got 0"):
        InputStatistics(FEATURES, gram_samples=0)
    with pytest.raises(ValueError, match="`precision` expected to be auto, highest or high but got 'low'"):
        InputStatistics(FEATURES, precision="low")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 7e5, 1e30])
def test_numbers_are_rounded_in_units_in_which_they_fit(dtype, scale):
    x = scale * torch.cat([torch.randn(100, generator=torch.Generator().manual_seed(0)), torch.tensor([40.0, -64.0])])
    rounded, unit = in_half(x, dtype)
    assert rounded.dtype == dtype and rounded.isfinite().all() and torch.log2(unit) == torch.log2(unit).round()
    assert torch.allclose(rounded.double() * unit.double(), x.double(), rtol=torch.finfo(dtype).eps)
    assert in_half(rounded, dtype) == (rounded, 1.0)


def test_zeros_stay_zeros_in_half_precision():
    """Their unit is a normal number: divided by a subnormal one, which a GPU may take for 0, they would be NaN."""
    for dtype in (torch.float16, torch.bfloat16):
        rounded, unit = in_half(torch.zeros(3), dtype)
        assert rounded.tolist() == [0.0] * 3 and unit > torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_that_follow_from_the_inputs(kind):
    """Norms of y = W x from W and the Gram matrix of x are those of y itself."""
    weight, x = problem(kind, rows=7, columns=12, samples=3, tokens=20, seed=4)
    inputs, outputs = collect(weight, x)
    found = derived_outputs(weight, inputs)
    expected = (x.double() @ weight.double().T).square().sum((0, 1)) / (3 * 20)
    torch.testing.assert_close(found.activation_norm("rms", 20.0).double(), expected.sqrt(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.activation_norm("rms", 20.0), outputs.activation_norm("rms", 20.0), rtol=1e-3, atol=1e-5)
    assert (found.num_samples, found.num_tokens) == (3, 60)


def test_outputs_that_follow_from_the_inputs_have_no_norms_of_samples():
    weight, x = problem("independent", rows=3, columns=4, samples=2, tokens=5, seed=0)
    found = derived_outputs(weight, InputStatistics(4).update(x, 0))
    with pytest.raises(ValueError, match=r"`activation_norm` expected to be rms where .* but got 'official'"):
        found.activation_norm("official", 5.0)
    with pytest.raises(ValueError, match=r"holds 5 of 10 tokens, but a weight update needs all"):
        derived_outputs(weight, InputStatistics(4, gram_samples=1).update(x, 0))

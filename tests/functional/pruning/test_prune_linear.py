"""prune_linear against independent float64 references written out naively here, and against exhaustive search.

The references know nothing of Cholesky factors: they invert what is left of the Hessian at every column.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functional.pruning import METHODS, InputStatistics, NotPositiveDefiniteError, OutputStatistics, prune_linear

LAMBDA1, LAMBDA2, SCALE = 1.5, 0.25, 7.0


def calibration(out_features=6, in_features=10, samples=4, tokens=12, seed=0):
    """A weight and correlated inputs with unequal channel energies; float32."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    mix = torch.randn(in_features, in_features, generator=generator) + 2 * torch.eye(in_features)
    x = torch.randn(samples, tokens, in_features, generator=generator) @ mix * torch.linspace(0.3, 2, in_features)
    return weight, x


def collect(weight, x, bias=None):
    inputs, outputs = InputStatistics(weight.shape[1]), OutputStatistics(weight.shape[0])
    inputs.update(x, 0)
    outputs.update(torch.nn.functional.linear(x, weight.to(x.dtype), bias), 0)
    return inputs, outputs


def naive_norms(samples, mode, scale, updated):
    """x̂ or ŷ by the closed forms, one channel and one sample at a time."""
    count, channels = len(samples), samples.shape[-1]
    norms = np.zeros(channels)
    for j in range(channels):
        for n, sample in enumerate(samples, start=1):
            length = math.sqrt(sum(float(value) ** 2 for value in sample[:, j]))
            if mode == "rms":
                norms[j] += length**2 / (count * scale)
            elif updated:
                norms[j] += n / count * math.sqrt(2 / n) * length / scale
            else:
                norms[j] += n / count * length / scale
    return np.sqrt(norms) if mode == "rms" else norms


def naive_prune(weight, x, method, sparsity, pattern, mode, block_size, damping=0.01):
    """(weights, mask) in float64, for every method; see the table in functional/pruning/prune.py."""
    w, x = weight.double().numpy().copy(), x.double().numpy()
    y = x @ w.T
    rows, columns = w.shape
    n_zeros, m = (int(part) for part in pattern.split(":")) if pattern else (None, None)
    mask = np.ones((rows, columns), dtype=bool)
    updated = method.endswith("sparsegpt")
    x_hat, y_hat = naive_norms(x, mode, SCALE, updated), naive_norms(y, mode, SCALE, False)

    def extra(i, j):
        if not method.startswith("d2_"):
            return 0.0
        return LAMBDA1 * y_hat[i] * abs(w[i, j]) * x_hat[j] - LAMBDA2 * w[i, j] ** 2 * x_hat[j] ** 2

    def drop(entries, count, score):
        for i, j in sorted(entries, key=lambda entry: (score(*entry), entry))[:count]:
            mask[i, j] = False

    tokens = x.reshape(-1, columns)
    if not updated:
        energy = np.array([(tokens[:, j] ** 2).sum() / len(x) for j in range(columns)])

        def score(i, j):
            return abs(w[i, j]) if method == "magnitude" else w[i, j] ** 2 * energy[j] + extra(i, j)

        if pattern:
            for i in range(rows):
                for g in range(0, columns, m):
                    drop([(i, j) for j in range(g, g + m)], n_zeros, score)
        elif method == "magnitude":
            drop([(i, j) for i in range(rows) for j in range(columns)], int(rows * columns * sparsity), score)
        else:
            for i in range(rows):
                drop([(i, j) for j in range(columns)], int(columns * sparsity), score)
        return np.where(mask, w, 0), mask

    hessian = 2 / len(x) * sum(np.outer(token, token) for token in tokens)
    for j in range(columns):
        if hessian[j, j] == 0:
            hessian[j, j] = 1
            w[:, j] = 0
    hessian += damping * hessian.diagonal().mean() * np.eye(columns)
    conditional = [np.linalg.inv(hessian[j:, j:]) for j in range(columns)]

    def saliency(i, j):
        return w[i, j] ** 2 / conditional[j][0, 0] + extra(i, j)

    for j in range(columns):
        if pattern and j % m == 0:
            for i in range(rows):
                drop([(i, g) for g in range(j, j + m)], n_zeros, saliency)
        if not pattern and j % block_size == 0:
            end = min(j + block_size, columns)
            count = int(rows * end * sparsity) - int(rows * j * sparsity)
            drop([(i, g) for i in range(rows) for g in range(j, end)], count, saliency)
        for i in range(rows):
            if not mask[i, j]:
                w[i, j:] -= w[i, j] / conditional[j][0, 0] * conditional[j][0]
                w[i, j] = 0
    return w, mask


@pytest.mark.parametrize("mode", ["rms", "official"])
@pytest.mark.parametrize(
    ("sparsity", "pattern"), [(0.5, None), (0.7, None), (0.0, None), (0.5, "2:4"), (0.5, "3:4"), (0.5, "1:3")]
)
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_naive_reference(method, sparsity, pattern, mode):
    weight, x = calibration(in_features=12)
    inputs, outputs = collect(weight, x)
    result = prune_linear(
        weight, inputs, outputs, method=method, sparsity=sparsity, pattern=pattern, lambda1=LAMBDA1, lambda2=LAMBDA2,
        scale=SCALE, activation_norm=mode, block_size=5 if pattern is None else 4,
    )  # fmt: skip
    expected, mask = naive_prune(weight, x, method, sparsity, pattern, mode, block_size=5)
    assert np.array_equal(result.mask.numpy(), mask)
    np.testing.assert_allclose(result.weight.double().numpy(), expected, rtol=2e-3, atol=2e-4)
    residual = (weight.double().numpy() - expected) @ x.double().numpy().reshape(-1, 12).T
    assert result.error == pytest.approx((residual**2).sum(), rel=1e-3, abs=1e-4)
    assert result.norm == pytest.approx(((x.double() @ weight.double().T) ** 2).sum().item(), rel=1e-4)


def test_activation_terms_change_the_mask():
    """The parametrised comparison would be idle if the D² terms never decided anything."""
    weight, x = calibration()
    x[0, :, ::2] *= 5  # channels with their energy in one sample, or `official` would order a row like `rms`
    statistics = collect(weight, x)
    for plain, dual, mode in [("wanda", "d2_wanda", "official"), ("sparsegpt", "d2_sparsegpt", "rms")]:
        first = prune_linear(weight, *statistics, method=plain)
        second = prune_linear(weight, *statistics, method=dual, lambda1=1e4, scale=1.0, activation_norm=mode)
        assert not torch.equal(first.mask, second.mask)
        off = prune_linear(weight, *statistics, method=dual, lambda1=0.0, lambda2=0.0)
        assert torch.equal(first.mask, off.mask) and torch.equal(first.weight, off.weight)


@pytest.mark.parametrize("lambda1", [1.0, 1e4])
def test_d2_wanda_with_rms_norms_orders_a_row_like_wanda(lambda1):
    """x̂_j² is proportional to Wanda's energy, so with λ2 = 0 the score of a row is increasing in |W_ij| x̂_j alone."""
    weight, x = calibration(out_features=16, in_features=24)
    statistics = collect(weight, x)
    wanda = prune_linear(weight, *statistics, method="wanda")
    assert torch.equal(wanda.mask, prune_linear(weight, *statistics, method="d2_wanda", lambda1=lambda1).mask)


def test_single_block_mask_by_exhaustive_search():
    """Independent inputs: among all masks with k zeros, SparseGPT's has the least output error."""
    weight = calibration(out_features=2, in_features=5, seed=3)[0]
    x = torch.diag(torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1]))[None]  # one sample of five orthogonal tokens
    inputs, _ = collect(weight, x)
    result = prune_linear(weight, inputs, method="sparsegpt", sparsity=0.4, damping=0.0)
    energy = (weight.double() ** 2 * x[0].diagonal().double() ** 2).flatten()
    best = min(itertools.combinations(range(10), 4), key=lambda zeros: sum(energy[list(zeros)]))
    assert sorted((~result.mask).flatten().nonzero().flatten().tolist()) == list(best)
    assert result.error == pytest.approx(energy[list(best)].sum().item(), rel=1e-5)


@pytest.mark.parametrize("method", ["sparsegpt", "d2_sparsegpt"])
def test_two_by_two_groups_by_exhaustive_search(method):
    """One row, one group: of all masks with N zeros, the one whose dropped scores sum to least."""
    weight, x = calibration(out_features=1, in_features=4, seed=5)
    inputs, outputs = collect(weight, x)
    result = prune_linear(weight, inputs, outputs, method=method, pattern="2:4", lambda1=40.0, scale=1.0)
    hessian = inputs.hessian().double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(4)
    scores = [weight[0, j].double() ** 2 / torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(4)]
    if method.startswith("d2"):
        y = (x @ weight.T).double().norm() / 2
        scores = [s + 40 * y * weight[0, j].abs() * x[..., j].double().norm() / 2 for j, s in enumerate(scores)]
    best = min(itertools.combinations(range(4), 2), key=lambda zeros: sum(scores[j] for j in zeros))
    assert sorted((~result.mask[0]).nonzero().flatten().tolist()) == list(best)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 40), block_size=st.integers(1, 17),
    sparsity=st.floats(0, 0.99).map(lambda value: round(value, 2)), method=st.sampled_from(METHODS), seed=st.integers(0, 99),
)  # fmt: skip
def test_unstructured_sparsity_is_exact(rows, columns, block_size, sparsity, method, seed):
    weight, x = calibration(rows, columns, samples=2, tokens=3, seed=seed)
    result = prune_linear(weight, *collect(weight, x), method=method, sparsity=sparsity, block_size=block_size)
    hundredths = round(sparsity * 100)
    by_row = method in ("wanda", "d2_wanda")
    expected = rows * (columns * hundredths // 100) if by_row else rows * columns * hundredths // 100
    assert (~result.mask).sum() == expected
    if by_row:
        assert set((~result.mask).sum(1).tolist()) == {columns * hundredths // 100}
    assert (result.weight[~result.mask] == 0).all() and result.weight.isfinite().all()
    assert result.sparsity == pytest.approx(expected / (rows * columns))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6), groups=st.integers(1, 8), shape=st.sampled_from([(1, 2), (2, 4), (3, 4), (1, 4), (4, 8), (2, 3)]),
    block_size=st.integers(1, 17), method=st.sampled_from(METHODS),
)  # fmt: skip
def test_pattern_is_exact_in_every_group(rows, groups, shape, block_size, method):
    zeros, size = shape
    weight, x = calibration(rows, groups * size, samples=2, tokens=5)
    statistics = collect(weight, x)
    result = prune_linear(weight, *statistics, method=method, pattern=f"{zeros}:{size}", block_size=block_size)
    assert ((~result.mask).reshape(rows, groups, size).sum(-1) == zeros).all()
    whole = prune_linear(weight, *statistics, method=method, pattern=f"{zeros}:{size}", block_size=128)
    assert torch.equal(result.mask, whole.mask)
    torch.testing.assert_close(result.weight, whole.weight, rtol=1e-3, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), sparsity=st.sampled_from([0.3, 0.5, 0.8]), pattern=st.sampled_from([None, "2:4"]))
def test_update_is_no_worse_than_zeroing_the_same_mask(seed, sparsity, pattern):
    weight, x = calibration(out_features=8, in_features=16, samples=3, tokens=40, seed=seed)
    inputs, outputs = collect(weight, x)
    result = prune_linear(weight, inputs, outputs, sparsity=sparsity, pattern=pattern)
    zeroed = (((weight * ~result.mask) @ x.reshape(-1, 16).T) ** 2).sum()
    assert result.error <= zeroed.item() * 1.01


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weight_keeps_its_dtype_and_the_solve_is_float32(dtype, method):
    weight, x = calibration(out_features=16, in_features=32)
    weight = weight.to(dtype)
    statistics = collect(weight, x)
    result = prune_linear(weight, *statistics, method=method)
    in_float32 = prune_linear(weight.float(), *statistics, method=method)
    assert result.weight.dtype == dtype and torch.equal(result.mask, in_float32.mask)
    assert torch.equal(result.weight, in_float32.weight.to(dtype))


@pytest.mark.parametrize(("rows", "columns"), [(1, 12), (12, 1), (1, 1), (5, 131), (3, 128), (3, 129)])
@pytest.mark.parametrize("method", METHODS)
def test_odd_shapes(rows, columns, method):
    weight, x = calibration(rows, columns, samples=3, tokens=60)
    result = prune_linear(weight, *collect(weight, x), method=method, sparsity=0.5)
    assert result.weight.shape == (rows, columns) and result.weight.isfinite().all()


def test_inputs_are_not_modified():
    weight, x = calibration()
    inputs, outputs = collect(weight, x)
    before = weight.clone(), inputs.gram.clone()
    prune_linear(weight, inputs, outputs)
    assert torch.equal(weight, before[0]) and torch.equal(inputs.gram, before[1])


def test_dead_inputs_become_zero_and_are_pruned_first():
    weight, x = calibration(in_features=12)
    x[..., [2, 7]] = 0
    for method in ("sparsegpt", "d2_sparsegpt"):
        result = prune_linear(weight, *collect(weight, x), method=method, sparsity=0.5)
        assert (result.weight[:, [2, 7]] == 0).all() and not result.mask[:, [2, 7]].any()
        expected, mask = naive_prune(weight, x, method.replace("d2_", ""), 0.5, None, "rms", block_size=128)
        if method == "sparsegpt":
            assert np.array_equal(result.mask.numpy(), mask)
            np.testing.assert_allclose(result.weight.double().numpy(), expected, rtol=2e-3, atol=2e-4)


def test_damping_escalates_is_logged_and_reported(caplog):
    weight, x = calibration(in_features=64, samples=1, tokens=3)  # rank 3 of 64
    statistics = collect(weight, x)
    result = prune_linear(weight, *statistics, method="sparsegpt", damping=0.0)
    assert result.damping > 0 and "not positive definite with damping 0" in caplog.text
    assert result.weight.isfinite().all()
    assert prune_linear(weight, *statistics, method="sparsegpt", damping=0.05).damping == 0.05


def test_damping_ends_in_an_error():
    weight, x = calibration()
    inputs, _ = collect(weight, x)
    inputs.gram.diagonal().mul_(-1).sub_(1)  # negative definite: no damping makes this positive
    with pytest.raises(NotPositiveDefiniteError, match=r"damping of .* \(limit 10\).*more calibration tokens"):
        prune_linear(weight, inputs, method="sparsegpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "obd"}, r"`method` expected to be one of magnitude, .* but got 'obd'"),
        ({"sparsity": 1.0}, r"`sparsity` expected to be a share of zeros in \[0, 1\) but got 1.0"),
        ({"sparsity": -0.1}, r"`sparsity`.*-0.1"),
        ({"sparsity": math.nan}, r"`sparsity`.*nan"),
        ({"pattern": "4:2"}, r"`pattern` expected to be N:M, .* but got '4:2'"),
        ({"pattern": "2of4"}, r"`pattern`.*'2of4'"),
        ({"pattern": "2:7"}, r"2:7 needs rows that fall into groups of 7, but in_features is 10"),
        ({"activation_norm": "l1"}, r"`activation_norm` expected to be rms or official but got 'l1'"),
        ({"scale": 0.0}, r"`scale` expected to be auto or a positive number but got 0"),
        ({"lambda1": math.inf}, r"`lambda1`.*inf"),
        ({"block_size": 0}, r"`block_size`.*0"),
        ({"damping": -1.0}, r"`damping`.*-1"),
        ({"outputs": None}, r"`outputs` expected to be OutputStatistics\(6\) for method d2_sparsegpt but got None"),
        ({"outputs": OutputStatistics(6)}, r"hold no tokens"),
        ({"inputs": InputStatistics(10)}, r"hold no tokens"),
        ({"inputs": InputStatistics(9)}, r"`weight` expected to be floating point of shape \(out_features, 9\)"),
        ({"weight": torch.full((6, 10), math.nan)}, r"`weight` holds NaN or Inf"),
        ({"weight": torch.ones(6, 10, dtype=torch.int64)}, r"`weight` expected to be floating point"),
    ],
)
def test_wrong_arguments(arguments, message):
    weight, x = calibration()
    inputs, outputs = collect(weight, x)
    with pytest.raises(ValueError, match=message):
        prune_linear(**({"weight": weight, "inputs": inputs, "outputs": outputs} | arguments))


def test_not_finite_inputs():
    weight, x = calibration()
    x[0, 0, 0] = math.inf
    with pytest.raises(ValueError, match="`inputs` holds NaN or Inf"):
        prune_linear(weight, *collect(weight, x))

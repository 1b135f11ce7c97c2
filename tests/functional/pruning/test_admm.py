"""ADMM against exact least squares in float64, and what prune_linear promises of it: the same mask, never a larger error."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functional.pruning.admm as admm
from functional.pruning import METHODS, InputStatistics, partial_update, prune_linear, prune_linears
from functional.pruning.admm import admm_update, precondition
from tests.helpers.problems import KINDS, collect, energy, problem

FEW = settings(max_examples=60, deadline=None, derandomize=True)
TARGETS = ({"sparsity": 0.5}, {"sparsity": 0.8}, {"pattern": "2:4"}, {"pattern": "3:4"})


def damped(hessian, damping=0.01):
    """H of the solvers, in float64."""
    hessian = hessian.double()
    hessian += torch.diag((hessian.diagonal() == 0).double())
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def objective(weight, new, hessian):
    difference = weight.double() - new.double()
    return ((difference @ hessian) * difference).sum().item()


def least_squares(weight, mask, hessian):
    """The best kept weights of each row: H_kk z_k = H_k: w."""
    best = torch.zeros_like(weight, dtype=torch.float64)
    for i, kept in enumerate(mask):
        best[i, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight[i].double())
    return best


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("kind", ["independent", "correlated", "duplicated", "rank 1", "outliers", "dead channels"])
def test_reaches_exact_least_squares(kind, target):
    weight, x = problem(kind, rows=12, columns=32, samples=4, tokens=30, seed=3)
    inputs, outputs = collect(weight, x)
    start = prune_linear(weight, inputs, outputs, **target)
    hessian = damped(inputs.hessian())
    live = start.mask & (x.square().sum((0, 1)) > 0)
    best = objective(weight, least_squares(weight, live, hessian), hessian)
    found = [
        objective(weight, admm_update(weight, start.weight, start.mask, precondition(inputs.hessian(), 0.01), n), hessian)
        for n in (20, 40, 80, 160, 2000)
    ]
    scale = 1e-6 * objective(weight, torch.zeros_like(weight), hessian)  # what float32 may add
    assert all(later <= earlier * (1 + 1e-3) + scale for earlier, later in itertools.pairwise(found))
    assert best * (1 - 1e-6) - scale <= found[-1] <= best * (1 + 1e-3) + scale
    if kind not in ("outliers", "rank 1"):  # where 20 iterations are not enough
        assert found[0] <= best * 1.05 + scale


def test_equals_the_formulas_written_out():
    """Every row and iteration in numpy, with systems solved anew."""
    weight, x = problem("correlated", rows=3, columns=8, samples=2, tokens=20, seed=5)
    inputs, _ = collect(weight, x)
    start = prune_linear(weight, inputs, method="sparsegpt", sparsity=0.5)
    found = admm_update(weight, start.weight, start.mask, precondition(inputs.hessian(), 0.01), 7)
    hessian = damped(inputs.hessian()).numpy()
    root = np.sqrt(hessian.diagonal())
    gram = hessian / np.outer(root, root)
    for i, kept in enumerate(start.mask.numpy()):
        w, z = weight[i].double().numpy() * root, start.weight[i].double().numpy() * root
        u = np.where(kept, 0, gram @ (w - z))
        for _ in range(7):
            v = np.linalg.solve(gram + np.eye(8), gram @ w + z - u)
            z = np.where(kept, v + u, 0)
            u = u + v - z
        np.testing.assert_allclose(found[i].numpy(), z / root, rtol=1e-3, atol=1e-5)


@FEW
@given(
    problem_=st.builds(
        problem, kind=st.sampled_from(KINDS), rows=st.integers(1, 10), columns=st.integers(1, 6).map(lambda groups: 4 * groups),
        samples=st.integers(1, 4), tokens=st.integers(1, 12), seed=st.integers(0, 10**6),
    ),
    target=st.sampled_from(TARGETS), damping=st.sampled_from([0.0, 0.01, 1.0]), method=st.sampled_from(METHODS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)  # fmt: skip
def test_never_above_obs(problem_, target, damping, method, dtype):
    weight, x = problem_[0].to(dtype), problem_[1]
    inputs, outputs = collect(weight.float(), x)
    options = {"method": method, "damping": damping, **target}
    obs, found = (prune_linear(weight, inputs, outputs, **options, solver=solver) for solver in ("obs", "admm"))
    assert torch.equal(found.mask, obs.mask) and (found.weight[~found.mask] == 0).all() and found.weight.dtype == dtype
    assert found.weight.isfinite().all() and found.error <= obs.error
    rounding = 1e-6 * (weight.double().square().sum() * x.double().square().sum()).item()
    before, after = (energy(weight.double() - result.weight.double(), x) for result in (obs, found))
    assert after <= before * (1 + 1e-6) or (after - before) <= rounding
    assert found.error == pytest.approx(after, rel=1e-3, abs=rounding)
    if not method.endswith("sparsegpt"):
        assert torch.equal(found.weight, obs.weight)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_lowers_the_error_where_inputs_are_correlated(target):
    weight, x = problem("correlated", rows=24, columns=64, samples=8, tokens=40, seed=0)
    inputs, outputs = collect(weight, x)
    obs, found = (prune_linear(weight, inputs, outputs, **target, solver=solver) for solver in ("obs", "admm"))
    assert found.error < 0.9 * obs.error and found.damping == obs.damping
    halves = partial_update(found, weight, inputs, 0.5)
    assert found.error < halves.error and torch.equal(halves.mask, found.mask)


@pytest.mark.parametrize(("w_scale", "x_scale"), [(1e-20, 1.0), (1e18, 1.0), (1.0, 1e-15), (1.0, 1e15), (1e-18, 1e15)])
def test_scales_do_not_matter(w_scale, x_scale):
    weight, x = problem("correlated", rows=8, columns=24, samples=4, tokens=30, seed=2)
    plain = prune_linear(weight, collect(weight, x)[0], method="sparsegpt", sparsity=0.6, solver="admm")
    inputs = InputStatistics(24).update(x * x_scale, 0)
    scaled = prune_linear(weight * w_scale, inputs, method="sparsegpt", sparsity=0.6, solver="admm")
    assert torch.equal(scaled.mask, plain.mask)
    torch.testing.assert_close(scaled.weight / w_scale, plain.weight, rtol=1e-3, atol=1e-5)
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-3)


def test_dead_inputs_become_zero():
    weight, x = problem("independent", rows=6, columns=12, samples=3, tokens=30, seed=0)
    x[..., [2, 7]] = 0
    found = prune_linear(weight, *collect(weight, x), sparsity=0.1, solver="admm")
    assert (found.weight[:, [2, 7]] == 0).all() and found.mask[:, [2, 7]].any()


def test_linears_of_one_input_share_the_factorisation(monkeypatch):
    weight, x = problem("correlated", rows=18, columns=24, samples=4, tokens=20, seed=1)
    weights = list(weight.split([4, 4, 10]))
    statistics = [collect(part, x) for part in weights]
    outputs = [y for _, y in statistics]
    alone = [
        prune_linear(w, inputs, y, sparsity=0.6, solver="admm") for w, (inputs, y) in zip(weights, statistics, strict=True)
    ]
    calls = []
    original = torch.cholesky_inverse
    monkeypatch.setattr(admm.torch, "cholesky_inverse", lambda factor: calls.append(1) or original(factor))
    fresh = InputStatistics(24).update(x, 0)
    together = prune_linears(weights, fresh, outputs, sparsity=0.6, solver="admm")
    prune_linears(weights[:1], fresh, outputs[:1], sparsity=0.5, solver="admm")
    assert len(calls) == 1
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.mask, other.mask) and one.error == pytest.approx(other.error, rel=1e-4)
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-3, atol=1e-4)
    fresh.update(x, 0)
    prune_linears(weights[:1], fresh, outputs[:1], sparsity=0.5, solver="admm")
    assert len(calls) == 2  # other statistics, another Hessian


def test_an_unknown_solver():
    weight, x = problem("independent", rows=2, columns=4, samples=1, tokens=8, seed=0)
    with pytest.raises(ValueError, match="`solver` expected to be obs, admm or joint but got 'als'"):
        prune_linear(weight, *collect(weight, x), solver="als")


@pytest.mark.parametrize("size", [1, 7, 40])
def test_triangular_inverse(size, monkeypatch):
    monkeypatch.setattr(admm, "SMALLEST_HALF", 3)
    generator = torch.Generator().manual_seed(0)
    lower = torch.rand(size, size, generator=generator).tril() + torch.eye(size)
    assert torch.allclose(admm.triangular_inverse(lower).double(), torch.linalg.inv(lower.double()), rtol=1e-4, atol=1e-5)

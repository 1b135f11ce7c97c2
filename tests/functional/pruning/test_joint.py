"""The joint solver against its formulas in float64, against every mask of a small row, and against ADMM on D²'s mask."""

import itertools

import pytest
import torch

from functional.pruning import InputStatistics, prune_linear, prune_linears
from functional.pruning.admm import precondition
from functional.pruning.joint import ITERATIONS, PENALTIES, joint_prune, least_squares
from functional.pruning.scores import ScoreTerms
from tests.helpers.problems import KINDS, collect, problem


def damped(inputs, damping=0.01):
    """H of the solvers, in float64."""
    hessian = inputs.hessian().double()
    hessian += torch.diag((hessian.diagonal() == 0).double())
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def correlated(rows, columns, seed, tokens=1600):
    """A weight, and inputs whose covariance has a condition number of 10⁴, as those of language models."""
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(columns, columns, generator=generator))
    mixing = u @ torch.diag(torch.logspace(0, -2, columns)) @ v
    return torch.randn(rows, columns, generator=generator), torch.randn(8, tokens // 8, columns, generator=generator) @ mixing


def row_errors(weight, new, hessian):
    difference = weight.double() - new.double()
    return ((difference @ hessian) * difference).sum(1)


def best_weights(weight, mask, hessian):
    """Least squares of each row on its mask: H_kk z_k = H_k: w."""
    best = torch.zeros_like(weight, dtype=torch.float64)
    for i, kept in enumerate(mask):
        best[i, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight[i].double())
    return best


def by_the_formulas(weight, hessian, num_zeros):
    """The iteration of functional/pruning/joint.py's head, written out; ends in exact least squares."""
    scale = hessian.diagonal().rsqrt()
    gram = scale[:, None] * hessian * scale
    b0 = weight.double() / scale
    z, u, previous = b0, torch.zeros_like(b0), PENALTIES[0]
    for penalty in (penalty for penalty in PENALTIES for _ in range(ITERATIONS)):
        u, previous = u * (previous / penalty), penalty
        inverse = torch.linalg.inv(gram + penalty * torch.eye(len(gram), dtype=torch.float64))
        b = b0 - penalty * (b0 - z + u) @ inverse
        mask = torch.ones(b.numel(), dtype=torch.bool)
        mask[(b + u).abs().flatten().argsort()[:num_zeros]] = False
        mask = mask.view_as(b)
        z = mask * (b + u)
        u = u + b - z
    return best_weights(weight, mask, hessian), mask


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_formulas_written_out(seed):
    weight, x = correlated(8, 24, seed)
    inputs = InputStatistics(24).update(x, 0)
    found = prune_linear(weight, inputs, method="sparsegpt", sparsity=0.5, solver="joint")
    hessian = damped(inputs)
    expected, mask = by_the_formulas(weight, hessian, 96)
    assert (found.mask == mask).double().mean() > 0.98  # equal here; float32 may decide near ties otherwise
    errors = [row_errors(weight, new, hessian).sum().item() for new in (found.weight, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=5e-3)
    if torch.equal(found.mask, mask):
        assert (found.weight - expected).norm() <= 2e-2 * expected.norm()  # after three steps of conjugate gradients


@pytest.mark.parametrize("kind", ["independent", "correlated"])
def test_every_mask_of_a_small_row(kind):
    """At most 5 % above the best of all 252 masks in the median."""
    weight, x = (
        problem(kind, rows=40, columns=10, samples=8, tokens=40, seed=1) if kind == "independent" else correlated(40, 10, 1)
    )
    inputs = InputStatistics(10).update(x, 0)
    hessian = damped(inputs)
    best = torch.full((40,), torch.inf, dtype=torch.float64)
    for kept in itertools.combinations(range(10), 5):
        mask = torch.zeros(40, 10, dtype=torch.bool)
        mask[:, kept] = True
        best = torch.minimum(best, row_errors(weight, best_weights(weight, mask, hessian), hessian))
    found = prune_linear(weight, inputs, method="sparsegpt", sparsity=0.5, solver="joint", compared="row")
    assert (row_errors(weight, found.weight, hessian) / best).median() <= 1.05


@pytest.mark.parametrize("seed", range(3))
def test_error_of_correlated_inputs_is_far_below_admm_on_the_mask_of_d2(seed):
    weight, x = correlated(64, 96, seed)
    inputs, outputs = collect(weight, x)
    admm = prune_linear(weight, inputs, outputs, sparsity=0.7, solver="admm")
    joint = prune_linear(weight, inputs, outputs, sparsity=0.7, solver="joint")
    assert joint.error <= 0.6 * admm.error


@pytest.mark.parametrize(
    "target", [{"sparsity": 0.0}, {"sparsity": 0.37}, {"sparsity": 0.9}, {"pattern": "2:4"}, {"pattern": "3:4"}], ids=str
)
@pytest.mark.parametrize("compared", ["matrix", "row"])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_sparsity_whatever_the_inputs(kind, compared, target):
    weight, x = problem(kind, rows=12, columns=32, samples=4, tokens=30, seed=3)
    found = prune_linear(weight, *collect(weight, x), **target, solver="joint", compared=compared, lambda1=10.0)
    assert found.weight.isfinite().all() and not found.weight[~found.mask].any()
    dropped = (~found.mask).double()
    if "pattern" in target:
        assert (dropped.view(12, -1, 4).sum(2) == int(target["pattern"][0])).all()
    elif compared == "row":
        assert (dropped.sum(1) == int(32 * target["sparsity"] + 1e-9)).all()
    else:
        assert dropped.sum() == int(384 * target["sparsity"] + 1e-9)
    dead = x.square().sum((0, 1)) == 0
    if not dead.all():
        assert not found.weight[:, dead].any()


@pytest.mark.parametrize("kind", ["independent", "correlated", "duplicated", "dead channels"])
def test_weights_are_the_least_squares_of_the_mask(kind):
    weight, x = problem(kind, rows=12, columns=32, samples=4, tokens=30, seed=5)
    inputs, _ = collect(weight, x)
    found = prune_linear(weight, inputs, method="sparsegpt", sparsity=0.6, solver="joint")
    hessian = damped(inputs)
    live = found.mask & (x.square().sum((0, 1)) > 0)
    best = row_errors(weight, best_weights(weight, live, hessian), hessian).sum()
    assert row_errors(weight, found.weight, hessian).sum() <= best * 1.002 + 1e-6


def test_conjugate_gradients_reach_the_minimum():
    weight, x = problem("correlated", rows=6, columns=12, samples=4, tokens=30, seed=0)
    inputs = InputStatistics(12).update(x, 0)
    gram = precondition(inputs.hessian(), 0.01).gram
    mask = torch.rand(6, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    found = least_squares(weight, torch.zeros_like(weight), mask, gram, steps=30)
    assert (found - best_weights(weight, mask, gram.double())).abs().max() <= 1e-3


def test_no_step_where_nothing_is_left_to_gain():
    """Zero residuals and directions of no curvature divide by 0 nowhere."""
    gram = torch.ones(4, 4)  # rank 1
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False, False]] * 2)
    found = least_squares(weight, torch.zeros_like(weight), mask, gram)
    assert found.isfinite().all() and found[0].sum() == pytest.approx(10.0, rel=1e-5) and not found[1].any()


def test_activation_term_chooses_weights_between_active_channels():
    weight, x = problem("independent", rows=16, columns=16, samples=4, tokens=50, seed=0)
    x[..., :4] *= 5
    weight = weight.sign()  # so that only inputs and outputs tell weights apart
    weight[:4] *= 1.001
    inputs, outputs = collect(weight, x)
    outputs.sums()["square_norm"][:4] *= 100
    plain, dual = (prune_linear(weight, inputs, outputs, sparsity=0.5, solver="joint", lambda1=value) for value in (0.0, 1e4))
    assert dual.mask[:4].double().mean() > plain.mask[:4].double().mean() + 0.2


def test_score_is_that_of_d2prune():
    """S = B² diag(H) + λ1 ŷ |B| x̂ of the weights that the iteration has reached."""
    weight, x = correlated(6, 8, 0)
    inputs, outputs = collect(weight, x)
    found = prune_linear(weight, inputs, outputs, sparsity=0.0, solver="joint", lambda1=3.0)  # keeps all: B stays W
    x_norm, y_norm = (x.double().square().mean((0, 1)).sqrt(), (x.double() @ weight.double().T).square().mean((0, 1)).sqrt())
    expected = weight.double().square() * damped(inputs).diagonal() + 3 * y_norm[:, None] * weight.double().abs() * x_norm
    assert torch.allclose(found.scores.double(), expected, rtol=1e-3)


@pytest.mark.parametrize("target", [{"sparsity": [0.3, 0.6, 0.9]}, {"pattern": "2:4"}], ids=str)
def test_together_as_alone(target):
    weights = [correlated(rows, 32, seed)[0] for seed, rows in enumerate((8, 16, 24))]
    x = correlated(1, 32, 9)[1]
    collected = [collect(weight, x) for weight in weights]
    inputs, outputs = collected[0][0], [outputs for _, outputs in collected]
    together = prune_linears(weights, inputs, outputs, **target, solver="joint")
    for i, (weight, found) in enumerate(zip(weights, together, strict=True)):
        own = {"sparsity": target["sparsity"][i]} if "sparsity" in target else target
        alone = prune_linear(weight, inputs, outputs[i], **own, solver="joint")
        assert (found.mask == alone.mask).double().mean() > 0.98  # products of other shapes round otherwise
        assert found.error == pytest.approx(alone.error, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_repeated_and_scaled(dtype):
    weight, x = correlated(8, 32, 0)
    weight = weight.to(dtype)
    results = [
        prune_linear(
            weight * factor, InputStatistics(32).update(x / factor, 0), method="sparsegpt", sparsity=0.5, solver="joint"
        )
        for factor in (1.0, 1.0, 2.0**6)
    ]
    assert results[0].weight.dtype == dtype and torch.equal(results[0].weight, results[1].weight)
    assert torch.equal(results[0].mask, results[2].mask) and torch.equal(results[0].weight * 2.0**6, results[2].weight)


def test_extreme_units():
    weight, x = correlated(8, 32, 0)
    results = [
        prune_linear(weight * up, InputStatistics(32).update(x * down, 0), method="sparsegpt", sparsity=0.5, solver="joint")
        for up, down in ((1.0, 1.0), (2.0**100, 2.0**-60))
    ]
    assert torch.equal(results[0].mask, results[1].mask) and torch.allclose(
        results[0].weight, results[1].weight / 2.0**100, atol=1e-3
    )


def test_penalties_may_be_any_number(monkeypatch):
    """One penalty alone is plain ADMM with masks chosen inside."""
    monkeypatch.setattr("functional.pruning.joint.PENALTIES", (1.0,))
    weight, x = correlated(8, 32, 0)
    preconditioned = precondition(InputStatistics(32).update(x, 0).hessian(), 0.01)
    terms = ScoreTerms(preconditioned.scale.square().reciprocal())
    _, mask, _ = joint_prune(weight, preconditioned, terms, [0.5], None, [8], by_rows=False)
    assert mask.sum() == 128


def test_unknown_group():
    weight, x = correlated(8, 32, 0)
    with pytest.raises(ValueError, match="`compared` expected to be matrix or row but got 'column'"):
        prune_linear(weight, InputStatistics(32).update(x, 0), method="sparsegpt", solver="joint", compared="column")


def test_a_transposed_weight_gives_what_its_copy_gives():
    weight, x = problem("correlated", rows=24, columns=24, samples=4, tokens=30, seed=2)
    statistics = collect(weight, x)
    plain = prune_linear(weight, *statistics, sparsity=0.5, solver="joint")
    transposed = prune_linear(weight.T.contiguous().T, *statistics, sparsity=0.5, solver="joint")
    assert torch.equal(plain.weight, transposed.weight) and torch.equal(plain.mask, transposed.mask)

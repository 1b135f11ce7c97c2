"""What prune_linear makes of numbers at the edge of floating point: a defined result, or an error that says so."""

import itertools

import pytest
import torch

from functional.pruning import METHODS, InputStatistics, OutputStatistics, prune_linear
from functional.pruning.masks import zeros_of
from tests.helpers.problems import collect, energy, problem

TARGETS = ({"sparsity": 0.0}, {"sparsity": 0.5}, {"sparsity": 0.99}, {"pattern": "2:4"})


def prune(weight, x, method, target, **options):
    """Prune, and check what must hold whatever the numbers are."""
    result = prune_linear(weight, *collect(weight, x), method=method, **target, **options)
    wanted = zeros_of(weight.shape, method in ("wanda", "d2_wanda"), target.get("sparsity", 0.0), target.get("pattern"))
    assert (~result.mask).sum() == wanted
    assert result.weight.isfinite().all() and (result.weight[~result.mask] == 0).all() and result.scores.isfinite().all()
    error, zeroed = energy(weight - result.weight, x), energy(weight * ~result.mask, x)
    assert error <= zeroed * (1 + 1e-4) + 1e-6 * energy(weight, x)
    if target.get("sparsity") == 0:
        live = x.any(1).any(0) | (not x.any()) | (not method.endswith("sparsegpt"))  # else dead ones become 0
        torch.testing.assert_close(result.weight[:, live], weight[:, live], rtol=1e-6, atol=0)
    return result


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["rank 1", "constant", "ones", "zero", "dead channels", "duplicated", "outliers"])
def test_degenerate_inputs(kind, method):
    weight, x = problem(kind, rows=6, columns=12, samples=3, tokens=10, seed=1)
    for target, damping in itertools.product(TARGETS, (0.0, 0.01)):
        prune(weight, x, method, target, damping=damping)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rows", "columns", "samples", "tokens"), [(6, 12, 1, 1), (1, 12, 2, 9), (6, 1, 2, 9), (1, 1, 1, 1)])
def test_one_token_one_row_one_column(rows, columns, samples, tokens, method):
    weight, x = problem("independent", rows, columns, samples, tokens, seed=2)
    for target in TARGETS if columns > 1 else TARGETS[:-1]:
        prune(weight, x, method, target)


@pytest.mark.parametrize("method", METHODS)
def test_without_any_live_input_the_magnitude_decides_and_kept_weights_stay(method, caplog):
    weight, x = problem("zero", rows=5, columns=8, samples=2, tokens=4, seed=3)
    result = prune(weight, x, method, {"pattern": "2:4"})
    groups = weight.abs().reshape(-1, 4)
    expected = groups >= groups.sort(1).values[:, 2:3]
    assert torch.equal(result.mask.reshape(-1, 4), expected)
    assert torch.equal(result.weight, weight * result.mask) and result.error == result.relative_error == 0
    assert "so small that their squares are" in caplog.text


def test_kept_weights_of_dead_inputs_become_zero():
    weight, x = problem("independent", rows=4, columns=12, samples=2, tokens=20, seed=4)
    x[..., 3:] = 0
    result = prune(weight, x, "sparsegpt", {"sparsity": 0.5})
    dead = torch.arange(12) >= 3
    assert result.mask[:, ~dead].all()
    assert result.mask[:, dead].any() and not result.weight[:, dead].any()
    assert result.error == 0 and result.mask.sum() == 24


@pytest.mark.parametrize("x_scale", [1e-30, 1e-22, 1e-15, 1.0, 1e12, 1e17])
@pytest.mark.parametrize("w_scale", [1e-30, 1e-10, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_scales_of_inputs_and_weights(method, w_scale, x_scale):
    """Any scale has a result; where squares stay in the range of float32 it is that of the same numbers near 1."""
    weight, x = problem("correlated", rows=6, columns=12, samples=3, tokens=20, seed=5)
    expected = prune(weight, x, method, {"sparsity": 0.5}, scale=20.0)
    result = prune(weight * w_scale, x * x_scale, method, {"sparsity": 0.5}, scale=20.0)
    if x_scale >= 1e-15 and w_scale * x_scale >= 1e-20:
        assert torch.equal(result.mask, expected.mask)
        torch.testing.assert_close(result.weight / w_scale, expected.weight, rtol=1e-3, atol=1e-4)
        assert result.error == pytest.approx(expected.error * w_scale**2 * x_scale**2, rel=1e-3)
        assert result.relative_error == pytest.approx(expected.relative_error, rel=1e-3)


@pytest.mark.parametrize("w_scale", [0.0, 1e25, 1e38])
def test_weights_that_are_zero_or_huge(w_scale):
    weight, x = problem("correlated", rows=6, columns=12, samples=3, tokens=20, seed=6)
    weight = weight / weight.abs().max()
    for method in ("magnitude", "wanda", "sparsegpt"):
        expected = prune(weight, x, method, {"sparsity": 0.5})
        result = prune(weight * w_scale, x, method, {"sparsity": 0.5})
        if w_scale:
            assert torch.equal(result.mask, expected.mask)
            torch.testing.assert_close(result.weight / w_scale, expected.weight, rtol=1e-3, atol=1e-4)
        else:
            assert not result.weight.any() and result.error == result.norm == result.relative_error == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e18, 1e19, 3e38])
def test_squares_of_inputs_that_overflow(scale, method):
    weight, x = problem("constant", rows=6, columns=12, samples=4, tokens=400, seed=7)
    x = (x / x.abs().max() * scale).clamp(-3e38, 3e38)
    with pytest.raises(ValueError, match=r"^Argument `inputs` reaches .*e\+(18|19|38) in magnitude, .* overflow float32"):
        prune_linear(weight, *collect(weight, x), method=method)


def test_squares_of_outputs_that_overflow():
    weight, x = problem("independent", rows=6, columns=12, samples=4, tokens=4, seed=8)
    inputs, _ = collect(weight, x)
    for large, message in ((1e25, "reaches .*e[+]25 in magnitude"), (torch.nan, "holds NaN or Inf")):
        outputs = OutputStatistics(6).update(large * torch.ones(4, 4, 6), 0)
        with pytest.raises(ValueError, match=f"^Argument `outputs` {message}"):
            prune_linear(weight, inputs, outputs)
        assert prune_linear(weight, inputs, outputs, method="sparsegpt").weight.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_numbers_that_are_none(dtype, method, value):
    weight, x = problem("independent", rows=6, columns=12, samples=4, tokens=4, seed=9)
    good = collect(weight, x)
    x[2, 3, 4] = value
    with pytest.raises(ValueError, match=r"^Argument `inputs` holds NaN or Inf"):
        prune_linear(weight, collect(weight, x.to(dtype))[0], good[1], method=method)
    weight[1, 2] = value
    with pytest.raises(ValueError, match=r"^Argument `weight` holds NaN or Inf"):
        prune_linear(weight.to(dtype), *good, method=method)


def test_float64_that_float32_cannot_hold():
    weight, x = problem("independent", rows=6, columns=12, samples=4, tokens=4, seed=10)
    inputs, outputs = collect(weight, x)
    with pytest.raises(ValueError, match=r"^Argument `weight` holds NaN or Inf as float32"):
        prune_linear(weight.double() * 1e300, inputs, outputs)
    with pytest.raises(ValueError, match=r"^Argument `inputs` holds NaN or Inf"):
        prune_linear(weight, InputStatistics(12).update(x.double() * 1e300, 0), outputs)


def test_an_update_that_leaves_float16():
    """Two nearly equal inputs: the weight of the pruned one goes to the other."""
    weight = torch.tensor([[6e4, 5.5e4]], dtype=torch.float16)
    x = torch.randn(2, 30, 1, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 2)
    x[..., 1] *= 1.001
    inputs = InputStatistics(2).update(x, 0)
    with pytest.raises(ValueError, match=r"^Argument `weight`: .*does not fit into torch.float16, it reaches 1.15e\+05. Use"):
        prune_linear(weight, inputs, method="sparsegpt", damping=0.001)
    assert prune_linear(weight.float(), inputs, method="sparsegpt", damping=0.001).weight.max() > 1.1e5
    assert prune_linear(weight, inputs, method="wanda").weight.max() == 6e4


@pytest.mark.parametrize("options", [{"lambda1": 3e38}, {"lambda2": 3e38}, {"scale": 1e-300}])
def test_settings_that_make_scores_overflow(options):
    weight, x = problem("correlated", rows=6, columns=12, samples=3, tokens=20, seed=11)
    with pytest.raises(ValueError, match=r"`lambda1` = .*`lambda2` = .*`scale` = .* overflow float32. Use smaller λ"):
        prune_linear(weight * 100, *collect(weight * 100, x * 100), **options)


def test_an_update_worse_than_none_is_not_made(caplog):
    """The first column, pruned, moves the second; that one makes the third, which is pruned too, far more costly."""
    root = torch.tensor([[1.0, 0.1, 0.0], [0.0, 0.1, 5.0], [0.0, 0.0, 1.0]])  # H = R Rᵀ, R upper triangular
    x = root.T[None]  # tokens whose Gram matrix that is
    weight = torch.tensor([[1.0, 10.0, 1.0]])
    inputs = InputStatistics(3).update(x, 0)
    result = prune_linear(weight, inputs, method="sparsegpt", sparsity=0.67, damping=0.0)
    assert result.mask.tolist() == [[False, True, False]]
    assert torch.equal(result.weight, weight * result.mask) and "1 of 1 rows stay without" in caplog.text
    assert result.error == pytest.approx(energy(weight * ~result.mask, x), rel=1e-5)


def test_statistics_remember_the_peak_of_each_update_through_a_merge():
    first, second = InputStatistics(2).update(torch.full((1, 3, 2), -4.0), 0), InputStatistics(2)
    second.update(torch.tensor([[[1.0, torch.nan]]]), 1)
    second.update(torch.zeros(1, 0, 2), 2)
    peaks = [peak.item() for peak in first.merge(second).peaks]
    assert peaks[0] == 4 and peaks[1] != peaks[1] and peaks[2] == 0

"""W⁺ and its sums against exact least squares over the tokens, in float64."""

import pytest
import torch

from functional.pruning import (
    InputStatistics,
    Perturbation,
    measured_against,
    partial_update,
    prune_linear,
    target_of,
)
from functional.pruning.hessian import inverse_factor_of
from functional.pruning.perturbation import corrected_target

ROWS, COLUMNS = 5, 12


@pytest.fixture
def tokens():
    """Inputs x of a pruned model, x_dense of the dense one, what hidden states h lack, and a weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 40, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    x_dense = x + 0.3 * torch.randn(x.shape, generator=generator) + 0.2 * x.roll(1, 2)
    lack = 0.5 * torch.randn(6, 40, ROWS, generator=generator) + x[..., :ROWS]
    return x, x_dense, lack, torch.randn(ROWS, COLUMNS, generator=generator)


def perturbed(tokens, with_stream=True):
    """Sums of what outputs and hidden states lack, or the inputs."""
    x, x_dense, lack, weight = tokens
    if not with_stream:
        return Perturbation(COLUMNS).update(x, x_dense - x)
    return Perturbation(COLUMNS, ROWS).update(x, (x_dense - x) @ weight.T + lack)


@pytest.mark.parametrize("with_stream", [True, False])
def test_whole_correction_gives_what_the_dense_model_gives(tokens, with_stream):
    """α = 1 without damping is the least squares fit of the dense model's outputs, and of what hidden states lack."""
    x, x_dense, lack, weight = tokens
    inputs, perturbation = InputStatistics(COLUMNS).update(x, 0), perturbed(tokens, with_stream)
    found = corrected_target(weight, perturbation, inverse_factor_of(inputs, damping=0.0)[0], share=1.0)
    wanted = x_dense.double() @ weight.double().T + (lack.double() if with_stream else 0)
    expected = torch.linalg.lstsq(x.double().flatten(0, 1), wanted.flatten(0, 1)).solution.T
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.35, 1.0])
def test_share_and_damping(tokens, share):
    inputs, perturbation = InputStatistics(COLUMNS).update(tokens[0], 0), perturbed(tokens)
    x, x_dense, lack, weight = (value.double() for value in tokens)
    found = corrected_target(weight.float(), perturbation, inverse_factor_of(inputs, damping=0.1)[0], share)
    hessian = 2 / 6 * torch.einsum("nti,ntj->ij", x, x)
    hessian += 0.1 * hessian.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    c = 2 / 6 * torch.einsum("nti,ntj->ij", x_dense - x, x)
    e = 2 / 6 * torch.einsum("nto,nti->oi", lack, x)
    assert torch.allclose(found.double(), weight + share * (weight @ c + e) @ torch.linalg.inv(hessian), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("solver", ["obs", "admm", "joint"])
def test_every_solver_takes_the_target(tokens, solver):
    """As if the weight were W⁺; error and norm are those of W⁺."""
    x, _, _, weight = tokens
    inputs, perturbation = InputStatistics(COLUMNS).update(x, 0), perturbed(tokens)
    found = prune_linear(weight, inputs, method="sparsegpt", solver=solver, perturbation=perturbation, dense_share=0.5)
    target = corrected_target(weight, perturbation, inverse_factor_of(inputs, 0.01)[0], 0.5)
    same = prune_linear(target, inputs, method="sparsegpt", solver=solver)
    assert torch.equal(found.mask, same.mask) and torch.allclose(found.weight, same.weight, atol=1e-5)
    error = ((target - found.weight).double() @ x.double().flatten(0, 1).T).square().sum().item()
    assert found.error == pytest.approx(error, rel=1e-3) and found.norm == pytest.approx(same.norm, rel=1e-5)


def energy(weight, x):
    """Σ ‖w x‖² over the tokens."""
    return (weight.double() @ x.double().flatten(0, 1).T).square().sum().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_error_of_a_share_of_the_update_belongs_to_the_target(tokens, share, dtype):
    """Of the same target as the whole update; without any update the weights are those of W, not of W⁺."""
    x, x_dense, lack, weight = tokens
    weight, inputs = weight.to(dtype), InputStatistics(COLUMNS).update(x, 0)
    perturbation = perturbed((x, x_dense, lack, weight.float()))
    whole = prune_linear(weight, inputs, method="sparsegpt", damping=0.05, perturbation=perturbation, dense_share=0.5)
    target = target_of(weight, inputs, perturbation, whole.damping, 0.5)
    x64, w64 = x.double().flatten(0, 1), weight.double()
    hessian = 2 / 6 * x64.T @ x64
    hessian += 0.05 * hessian.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    c = 2 / 6 * (x_dense.double().flatten(0, 1) - x64).T @ x64
    e = 2 / 6 * lack.double().flatten(0, 1).T @ x64
    expected = w64 + 0.5 * (w64 @ c + e) @ torch.linalg.inv(hessian)
    assert torch.allclose(target.double(), expected, rtol=1e-3, atol=1e-4)
    found = partial_update(whole, weight, inputs, share, target)
    kept = w64 * whole.mask
    mixed = kept + share * (whole.weight.double() - kept)
    assert found.weight.dtype == dtype and torch.allclose(found.weight.double(), mixed, rtol=1e-2, atol=1e-6)
    assert found.error == pytest.approx(energy(expected - found.weight.double(), x), rel=1e-3)
    assert found.norm == pytest.approx(energy(expected, x), rel=1e-3) == pytest.approx(whole.norm, rel=1e-3)
    if share == 1:
        assert found.error == pytest.approx(whole.error, rel=1e-3)
    without = partial_update(whole, weight, inputs, share)
    assert without.error == pytest.approx(energy(w64 - found.weight.double(), x), rel=1e-3)


def test_any_result_is_measured_against_a_target(tokens):
    x, _, _, weight = tokens
    inputs = InputStatistics(COLUMNS).update(x, 0)
    held = prune_linear(weight, inputs, method="wanda")
    found = measured_against(held, 2 * weight, inputs)
    assert found.error == pytest.approx(energy(2 * weight - held.weight, x), rel=1e-4) and found.weight is held.weight
    assert found.norm == pytest.approx(4 * energy(weight, x), rel=1e-4)
    with pytest.raises(ValueError, match=r"`target` expected to have the shape \(5, 12\) of the weight but got \(4, 12\)"):
        measured_against(held, weight[1:], inputs)
    with pytest.raises(ValueError, match="`perturbation` expected to be"):
        target_of(weight, inputs, Perturbation(COLUMNS, ROWS + 1), 0.01)


def test_nothing_lacks_nothing_changes(tokens):
    x, _, lack, weight = tokens
    inputs, perturbation = InputStatistics(COLUMNS).update(x, 0), Perturbation(COLUMNS, ROWS).update(x, 0 * lack)
    pair = [prune_linear(weight, inputs, method="sparsegpt", perturbation=given) for given in (perturbation, None)]
    assert torch.equal(pair[0].weight, pair[1].weight)


def test_methods_without_update_have_no_target(tokens):
    x, x_dense, _, weight = tokens
    inputs, perturbation = InputStatistics(COLUMNS).update(x, 0), Perturbation(COLUMNS).update(x, x_dense - x)
    pair = [prune_linear(weight, inputs, method="wanda", perturbation=given) for given in (perturbation, None)]
    assert torch.equal(pair[0].weight, pair[1].weight) and pair[0].error == pair[1].error


def test_units_do_not_matter(tokens):
    x, x_dense, lack, weight = tokens
    found = []
    for up, down in ((1.0, 1.0), (2.0**50, 2.0**-55)):
        inputs = InputStatistics(COLUMNS).update(x * down, 0)
        perturbation = perturbed((x * down, x_dense * down, lack * up * down, weight * up))
        result = prune_linear(weight * up, inputs, method="sparsegpt", solver="joint", perturbation=perturbation)
        found.append((result.mask, result.weight / up))
    assert torch.equal(found[0][0], found[1][0]) and torch.allclose(found[0][1], found[1][1])


@pytest.mark.parametrize("with_stream", [True, False])
def test_order_and_processes_leave_no_trace(tokens, with_stream):
    x, x_dense, lack, _ = tokens
    lack, rows = (lack, ROWS) if with_stream else (x_dense - x, 0)
    whole, parts = Perturbation(COLUMNS, rows), [Perturbation(COLUMNS, rows) for _ in range(2)]
    for i in range(6):
        whole.update(x[i : i + 1], lack[i : i + 1])
    for i in (5, 0, 3, 2, 4, 1):
        parts[i % 2].update(x[i : i + 1], lack[i : i + 1])
    merged = parts[1].merge(parts[0])
    assert torch.equal(merged.mean(), whole.mean())
    assert merged.counts() == whole.counts() == {"num_samples": 6, "num_tokens": 240}


@pytest.mark.parametrize("channels", [(ROWS, 0), (0, ROWS), (ROWS, ROWS + 1)])
def test_sums_of_other_hidden_states_are_not_merged(tokens, channels):
    x = tokens[0]
    mine, other = (Perturbation(COLUMNS, n).update(x, torch.ones(*x.shape[:2], n or COLUMNS)) for n in channels)
    before = {name: value.clone() for name, value in mine.sums().items()}
    message = rf"`other` expected to be Perturbation\(12, {channels[0]}\) but got Perturbation\(12, {channels[1]}\)"
    with pytest.raises(ValueError, match=message):
        mine.merge(other)
    assert mine.num_samples == 6 and all(torch.equal(value, before[name]) for name, value in mine.sums().items())
    with pytest.raises(ValueError, match=r"`other` expected to be .* but got InputStatistics\(12\)"):
        mine.merge(InputStatistics(COLUMNS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_multiplied_exactly(tokens, dtype):
    x, x_dense, *_ = (value.to(dtype) for value in tokens)
    found = Perturbation(COLUMNS).update(x, x_dense - x).mean()
    moved = (x_dense - x).double()
    assert torch.allclose(found.double(), 2 / 6 * torch.einsum("nti,ntj->ij", moved, x.double()), rtol=1e-3, atol=1e-2)


def test_wrong_shapes_are_named(tokens):
    x, x_dense, _, weight = tokens
    with pytest.raises(ValueError, match=r"`lack` expected to have the shape \(6, 40, 12\) but got \(6, 39, 12\)"):
        Perturbation(COLUMNS).update(x, x_dense[:, 1:])
    with pytest.raises(ValueError, match=r"`lack` expected to have the shape \(6, 40, 5\) but got \(6, 40, 12\)"):
        Perturbation(COLUMNS, ROWS).update(x, x_dense)
    with pytest.raises(ValueError, match="`out_features` expected"):
        Perturbation(COLUMNS, -1)
    inputs = InputStatistics(COLUMNS).update(x, 0)
    with pytest.raises(ValueError, match=r"`perturbation` expected to be Perturbation\(12\) or Perturbation\(12, 5\) but got"):
        prune_linear(weight, inputs, method="sparsegpt", perturbation=Perturbation(COLUMNS, ROWS + 1))
    with pytest.raises(ValueError, match="`perturbation` holds 40 tokens, but `inputs` hold 240"):
        prune_linear(weight, inputs, method="sparsegpt", perturbation=Perturbation(COLUMNS).update(x[:1], x_dense[:1] - x[:1]))
    with pytest.raises(ValueError, match=r"`dense_share` expected to be in \[0, 1\] but got 1.5"):
        prune_linear(weight, inputs, method="sparsegpt", dense_share=1.5)
    with pytest.raises(ValueError, match="`perturbation` holds NaN or Inf"):
        bad = Perturbation(COLUMNS).update(x, (x_dense - x) * torch.nan)
        prune_linear(weight, inputs, method="sparsegpt", perturbation=bad)

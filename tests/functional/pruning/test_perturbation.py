"""W⁺ and its sums against exact least squares over the tokens, in float64."""

import pytest
import torch

from functional.pruning import InputStatistics, Perturbation, prune_linear
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

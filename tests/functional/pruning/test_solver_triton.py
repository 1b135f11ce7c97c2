"""The GPU kernel against the column-by-column sweep and a naive float64 loop; through Triton's interpreter without a GPU."""

import pytest
import torch

from functional.pruning import InputStatistics, OutputStatistics, Pattern, prune_linear, solver
from functional.pruning.scores import ScoreTerms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(rows, columns, seed=0, with_terms=True):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(4 * columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    factor, _, _ = solver.inverse_factor(x.T @ x, 0.01)
    linear = torch.rand(columns, generator=generator) if with_terms else None
    terms = ScoreTerms(factor.diagonal().square().reciprocal(), linear, torch.rand(rows, generator=generator))
    return weight, factor, terms


def naive_sweep(weight, keep, factor, terms, pattern):
    """float64, entry by entry."""
    w, u = weight.double().clone(), factor.double()
    keep, errors = keep.clone(), torch.zeros_like(w)
    for j in range(w.shape[1]):
        if pattern and j % pattern.group == 0:
            for i in range(len(w)):
                linear = 0 if terms.linear is None else terms.linear.double()
                rows = 0 if terms.linear is None else terms.rows[i].item()
                score = terms.square.double() * w[i] ** 2 + rows * linear * w[i].abs()
                order = sorted(range(j, j + pattern.group), key=lambda k, score=score: (score[k].item(), k))
                keep[i, j : j + pattern.group] = True
                keep[i, order[: pattern.zeros]] = False
        for i in range(len(w)):
            if not keep[i, j]:
                errors[i, j] = w[i, j] / u[j, j]
                w[i, j] = 0
                w[i, j + 1 :] -= errors[i, j] * u[j, j + 1 :]
    return w, keep, errors


@pytest.mark.parametrize("shape", [(7, 16), (4, 24), (1, 4), (10, 32)])
@pytest.mark.parametrize("pattern", [None, Pattern(2, 4), Pattern(3, 4), Pattern(1, 2)])
@pytest.mark.parametrize("with_terms", [True, False])
def test_kernel_equals_sweep_and_naive_loop(shape, pattern, with_terms):
    from functional.pruning.solver_triton import sweep

    weight, factor, terms = problem(*shape, with_terms=with_terms)
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    w, kept, errors = naive_sweep(weight, keep, factor, terms, pattern)
    coefficients = terms.coefficients(slice(None), shape[0])
    on_device = [x.to(DEVICE) for x in (weight, keep, factor)]
    kernel = sweep(*on_device, tuple(x.to(DEVICE) for x in coefficients), *(pattern or (0, 0)))
    given = weight.clone(), keep.clone()
    plain = solver._sweep(weight, keep, factor, terms, slice(0, shape[1]), pattern)
    for result in (kernel, plain):
        torch.testing.assert_close(result[0].cpu().double(), w, rtol=1e-4, atol=1e-5)
        assert torch.equal(result[1].cpu(), kept)
        torch.testing.assert_close(result[2].cpu().double(), errors, rtol=1e-4, atol=1e-5)
    if pattern:
        torch.testing.assert_close(kernel[3].cpu(), plain[3], rtol=1e-4, atol=1e-6)
    for left in (on_device, (weight, keep)):
        assert all(torch.equal(x.cpu(), y) for x, y in zip(left, given, strict=False)), "arguments stay as they are"


def test_ties_lose_from_the_left():
    from functional.pruning.solver_triton import sweep

    terms = ScoreTerms(torch.ones(8))
    ones, keep = torch.ones(3, 8), torch.ones(3, 8, dtype=torch.bool)
    identity = torch.eye(8)
    coefficients = tuple(x.to(DEVICE) for x in terms.coefficients(slice(None), 3))
    _, kept, _, _ = sweep(ones.to(DEVICE), keep.to(DEVICE), identity.to(DEVICE), coefficients, 2, 4)
    assert kept.int().tolist() == [[0, 0, 1, 1, 0, 0, 1, 1]] * 3


@pytest.mark.parametrize("target", [{"sparsity": 0.6}, {"pattern": "2:4"}])
@pytest.mark.parametrize("block_size", [16, 20, 128])
def test_prune_linear_through_the_kernel(target, block_size, monkeypatch):
    """The whole solve, once with either sweep: block borders, trailing updates, dead inputs."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 30, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
    x[..., 5] = 0
    weight = torch.randn(9, 40, generator=generator)
    inputs = InputStatistics(40).update(x.to(DEVICE), 0)
    outputs = OutputStatistics(9).update((x @ weight.T).to(DEVICE), 0)
    results = []
    for sweep in (solver._sweep_on_gpu, solver._sweep):
        monkeypatch.setattr(solver, "_sweep", sweep)
        monkeypatch.setattr(solver, "_fits_kernel", lambda *_: False)
        results.append(prune_linear(weight.to(DEVICE), inputs, outputs, block_size=block_size, **target))
        monkeypatch.undo()
    assert torch.equal(results[0].mask, results[1].mask)
    torch.testing.assert_close(results[0].weight, results[1].weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(results[0].scores, results[1].scores, rtol=1e-3, atol=1e-4)


def test_wide_blocks_and_groups_do_not_go_through_the_kernel():
    assert not solver._fits_kernel(512, None) and not solver._fits_kernel(128, Pattern(32, 64))
    assert solver._fits_kernel(128, None) and solver._fits_kernel(128, Pattern(2, 4))

"""GPU kernels against the column-by-column sweep and a naive float64 loop; through Triton's interpreter without a GPU."""

import pytest
import torch

from functional.pruning import InputStatistics, OutputStatistics, Pattern, prune_linear, prune_linears, solver
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


def prune(kernels, weight, factor, terms, sparsity=0.5, pattern=None, block_size=16, parts=None):
    """obs_prune with or without the kernels."""
    blocks = [(start, min(start + block_size, weight.shape[1])) for start in range(0, weight.shape[1], block_size)]
    function = solver._prune_by_kernels if kernels else solver._prune_by_columns
    terms = ScoreTerms(*(None if x is None else x.to(DEVICE) for x in (terms.square, terms.linear, terms.rows)))
    parts = parts or [len(weight)]
    task = solver.Task(factor.to(DEVICE), terms, pattern, blocks, solver._spans(parts, [sparsity] * len(parts)))
    return [x.cpu() for x in function(weight.to(DEVICE, copy=True), task)]


@pytest.mark.parametrize("shape", [(7, 16), (4, 24), (1, 4), (10, 32), (21, 48)])
@pytest.mark.parametrize("pattern", [None, Pattern(2, 4), Pattern(3, 4), Pattern(1, 2)])
@pytest.mark.parametrize("with_terms", [True, False])
def test_kernels_and_columns_equal_a_naive_loop(shape, pattern, with_terms):
    """One block: the mask by sorting Python numbers, the sweep entry by entry."""
    weight, factor, terms = problem(*shape, with_terms=with_terms)
    keep = torch.ones(shape, dtype=torch.bool)
    if pattern is None:
        scores = terms(weight).flatten().tolist()
        keep.view(-1)[sorted(range(len(scores)), key=lambda k: (scores[k], k))[: len(scores) // 2]] = False
    w, kept, _ = naive_sweep(weight, keep, factor, terms, pattern)
    found = [prune(kernels, weight, factor, terms, pattern=pattern, block_size=shape[1]) for kernels in (True, False)]
    for new, mask, _ in found:
        torch.testing.assert_close(new.double(), w, rtol=1e-4, atol=1e-5)
        assert torch.equal(mask, kept)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", [{"sparsity": 0.0}, {"sparsity": 0.37}, {"sparsity": 0.97}, {"pattern": Pattern(2, 4)}])
@pytest.mark.parametrize("block_size", [12, 16, 48])
def test_kernels_equal_columns_over_many_blocks_and_parts(target, block_size):
    weight, factor, terms = problem(14, 40, seed=2)
    parts = [3, 3, 1, 7]
    kernels, columns = (prune(x, weight, factor, terms, **target, block_size=block_size, parts=parts) for x in (True, False))
    assert torch.equal(kernels[1], columns[1])
    torch.testing.assert_close(kernels[0], columns[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(kernels[2], columns[2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", [{"sparsity": 0.4}, {"pattern": "2:4"}])
@pytest.mark.parametrize("method", ["d2_sparsegpt", "sparsegpt", "wanda", "d2_wanda", "magnitude"])
def test_together_is_as_one_by_one(target, method):
    """Parts of one size and of others, in units of their own; on a GPU through the kernels."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(5, 30, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    weights = [torch.randn(rows, 24, generator=generator).to(DEVICE) * 10.0**size for rows, size in ((6, 0), (6, -30), (3, 1))]
    inputs = InputStatistics(24).update(x.to(DEVICE), 0)
    outputs = [OutputStatistics(len(w)).update(x.to(DEVICE) @ w.T, 0) for w in weights]
    together = prune_linears(weights, inputs, outputs, method=method, block_size=8, **target)
    for weight, y, result in zip(weights, outputs, together, strict=True):
        alone = prune_linear(weight, inputs, y, method=method, block_size=8, **target)
        assert torch.equal(alone.mask, result.mask)
        torch.testing.assert_close(result.weight, alone.weight, rtol=1e-4, atol=1e-4 * weight.abs().max().item())
        assert result.error == pytest.approx(alone.error, rel=1e-3) and result.norm == pytest.approx(alone.norm, rel=1e-3)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
def test_ties_lose_from_the_left(kernels, pattern):
    _, mask, _ = prune(kernels, torch.ones(3, 8), torch.eye(8), ScoreTerms(torch.ones(8)), pattern=pattern, block_size=8)
    if pattern:
        assert mask.int().tolist() == [[0, 0, 1, 1, 0, 0, 1, 1]] * 3
    else:
        assert mask.flatten().int().tolist() == [0] * 12 + [1] * 12


@pytest.mark.parametrize("target", [{"sparsity": 0.6}, {"pattern": "2:4"}])
@pytest.mark.parametrize("block_size", [16, 20, 128])
def test_prune_linear_through_the_kernels(target, block_size, monkeypatch):
    """The whole solve, both ways: block borders, trailing updates, dead inputs."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 30, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
    x[..., 5] = 0
    weight = torch.randn(9, 40, generator=generator)
    inputs = InputStatistics(40).update(x.to(DEVICE), 0)
    outputs = OutputStatistics(9).update((x @ weight.T).to(DEVICE), 0)
    results = []
    for way in (solver._prune_by_kernels, solver._prune_by_columns):
        monkeypatch.setattr(solver, "_prune_by_columns", way)
        monkeypatch.setattr(solver, "_fits_kernel", lambda *_: False)
        results.append(prune_linear(weight.to(DEVICE), inputs, outputs, block_size=block_size, **target))
        monkeypatch.undo()
    assert torch.equal(results[0].mask, results[1].mask)
    torch.testing.assert_close(results[0].weight, results[1].weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(results[0].scores, results[1].scores, rtol=1e-3, atol=1e-4)


def test_wide_blocks_and_groups_do_not_go_through_the_kernels():
    assert not solver._fits_kernel(512, None) and not solver._fits_kernel(128, Pattern(32, 64))
    assert solver._fits_kernel(128, None) and solver._fits_kernel(128, Pattern(2, 4))

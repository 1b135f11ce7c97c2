"""Splitting F = B + U: operators and GPU kernel against a float64 loop; through Triton's interpreter without a GPU."""

import pytest
import torch

from functional.pruning import joint_split, parse_pattern
from functional.pruning.joint_split import Limits, split
from functional.pruning.joint_triton import split_by_kernel
from functional.pruning.scores import ScoreTerms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(rows, columns, with_terms=True, device="cpu"):
    generator = torch.Generator().manual_seed(rows * columns)
    free, dense = torch.randn(2, rows, columns, generator=generator)
    square, linear = torch.rand(2, columns, generator=generator) + 0.1
    terms = ScoreTerms(square, linear, torch.rand(rows, generator=generator)) if with_terms else ScoreTerms(square)
    terms = ScoreTerms(*(None if term is None else term.to(device) for term in (terms.square, terms.linear, terms.rows)))
    return free.to(device), dense.to(device), terms


def scores_of(free, terms):
    """a_j f² + r_i c_j |f|, entry by entry."""
    linear = torch.zeros_like(terms.square) if terms.linear is None else terms.linear
    rows = torch.zeros(len(free)) if terms.rows is None else terms.rows
    found = torch.zeros(free.shape, dtype=torch.float64)
    for i, row in enumerate(free.tolist()):
        for j, f in enumerate(row):
            found[i, j] = terms.square[j].item() * f**2 + rows[i].item() * linear[j].item() * abs(f)
    return found


def naive(free, dense, dropped, ratio):
    """B₀ + r U and Z − r U − B₀ from their definitions."""
    z = torch.where(dropped, 0, free.double())
    u = free.double() - z
    return dense.double() + ratio * u, z - ratio * u - dense.double()


@pytest.mark.parametrize("function", [split, split_by_kernel])
@pytest.mark.parametrize("ratio", [1.0, 0.42])
@pytest.mark.parametrize("with_terms", [True, False])
def test_equals_the_definitions(function, ratio, with_terms, monkeypatch):
    monkeypatch.setattr(joint_split, "CACHED", 100)  # several parts
    free, dense, terms = problem(7, 45, with_terms, DEVICE)
    limits = torch.linspace(0.1, 0.9, 7, device=DEVICE)[:, None]
    base, change = torch.full((2, 7, 45), torch.nan, device=DEVICE)
    function(free, dense, terms, limits, ratio, base, change)
    host = ScoreTerms(*(None if term is None else term.cpu() for term in (terms.square, terms.linear, terms.rows)))
    expected = naive(free.cpu(), dense.cpu(), scores_of(free.cpu(), host) < limits.cpu(), ratio)
    torch.testing.assert_close(base.cpu().double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(change.cpu().double(), expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [split, split_by_kernel])
@pytest.mark.parametrize("pattern", ["1:2", "2:4", "3:4", "5:8", "2:3", "7:16"])
def test_patterns(function, pattern):
    groups = parse_pattern(pattern)
    free, dense, terms = problem(6, 48, device=DEVICE)
    base, change = torch.full((2, 6, 48), torch.nan, device=DEVICE)
    function(free, dense, terms, groups, 1.0, base, change)
    host = ScoreTerms(terms.square.cpu(), terms.linear.cpu(), terms.rows.cpu())
    order = scores_of(free.cpu(), host).view(6, -1, groups.group).argsort(-1)
    dropped = torch.zeros(order.shape, dtype=torch.bool).scatter(-1, order[..., : groups.zeros], True).view(6, 48)
    expected = naive(free.cpu(), dense.cpu(), dropped, 1.0)
    torch.testing.assert_close(base.cpu().double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(change.cpu().double(), expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [split, split_by_kernel])
def test_ties_of_a_group_lose_from_the_left(function):
    free = torch.ones(1, 8, device=DEVICE)
    base, change = torch.empty(2, 1, 8, device=DEVICE)
    terms = ScoreTerms(torch.ones(8, device=DEVICE))
    function(free, torch.zeros_like(free), terms, parse_pattern("2:4"), 1.0, base, change)
    assert base[0].tolist() == [1, 1, 0, 0] * 2 and change[0].tolist() == [-1, -1, 1, 1] * 2


def test_a_large_matrix_of_several_tiles():
    free, dense, terms = problem(9, 1100, device=DEVICE)
    limits = torch.full((9, 1), 0.3, device=DEVICE)
    found, expected = torch.empty(2, 9, 1100, device=DEVICE), torch.empty(2, 9, 1100, device=DEVICE)
    split_by_kernel(free, dense, terms, limits, 0.5, *found)
    for rows in range(9):  # row by row
        one = slice(rows, rows + 1)
        split(free[one], dense[one], terms.of_rows(one), limits[one], 0.5, *expected[:, one])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by_rows", [True, False])
def test_limits_of_small_matrices_are_exact(by_rows):
    free, _, terms = problem(11, 30)
    shares, parts = [0.5, 0.0, 0.71], [4, 2, 5]
    limits = Limits(terms, shares, None, parts, by_rows, free).of(free)
    scores = scores_of(free, terms).float()
    for part, share, limit in zip(scores.split(parts), shares, limits.split(parts), strict=True):
        dropped = (part < limit - 1e-6).sum(1)
        assert (dropped == int(30 * share)).all() if by_rows else dropped.sum() == int(part.numel() * share)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.8])
def test_limits_of_a_sample_are_near(share):
    free, _, terms = problem(1200, 1000)
    free *= torch.linspace(0.1, 3, 1000)  # columns differ, and so do rows
    free *= torch.linspace(0.1, 3, 1200)[:, None]
    limits = Limits(terms, [share] * 2, None, [700, 500], False, free).of(free)
    dropped = terms(free) < limits
    for part in dropped.split([700, 500]):
        assert part.double().mean().item() == pytest.approx(share, abs=0.008)  # four standard deviations of the sample


def test_samples_walk_through_all_columns():
    """Every 18th of 1,215 x 999 scores would leave out eight of nine columns, which here are all large ones."""
    free, _, terms = problem(1215, 999)
    free[:, ::9] *= 0.01
    limits = Limits(terms, [0.5], None, [1215], False, free).of(free)
    assert (terms(free) < limits).double().mean().item() == pytest.approx(0.5, abs=0.008)


def test_patterns_have_no_limits():
    free, _, terms = problem(4, 8)
    pattern = parse_pattern("2:4")
    assert Limits(terms, [0.5], pattern, [4], False, free).of(free) == pattern

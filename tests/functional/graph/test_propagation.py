"""Features propagated beforehand against loops in float64."""

import pytest
import torch

from functional.graph import propagated_features, reduced_together, scaled_together


@pytest.mark.parametrize(("steps", "teleport"), [(0, 0.1), (1, 0.0), (7, 0.3), (3, 1.0)])
def test_propagated_features(steps, teleport):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.rand(5, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    x[4] = 0
    start = [[value / max(sum(v * v for v in row) ** 0.5, 1e-300) for value in row] for row in x.tolist()]
    z = [row[:] for row in start]
    for _ in range(steps):
        z = [
            [(1 - teleport) * sum(matrix[i, k].item() * z[k][j] for k in range(5)) + teleport * start[i][j] for j in range(3)]
            for i in range(5)
        ]
    found = propagated_features(x, lambda h: matrix @ h, steps, teleport)
    torch.testing.assert_close(found, torch.tensor(z, dtype=torch.float64))


def test_reduction_keeps_what_the_best_projection_keeps():
    """The rows of both views, projected on the leading right singular vectors of all: same inner products."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.tensor([9.0, 6, 4, 0.5, 0.3, 0.2, 0.1, 0.05])
    views = [torch.randn(20, 8, generator=generator) * spread for _ in range(2)]
    rows = torch.cat(views).double()
    _, _, vt = torch.linalg.svd(rows, full_matrices=False)
    wanted = rows @ vt[:3].T
    found = torch.cat(reduced_together(views, 3)).double()
    torch.testing.assert_close(found @ found.T, wanted @ wanted.T, rtol=1e-3, atol=1e-3)
    again = torch.cat(reduced_together(views, 3)).double()
    assert torch.equal(found, again)


def test_as_many_dimensions_as_there_are():
    views = [torch.randn(4, 6, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    found = reduced_together(views, 50)
    assert [tuple(view.shape) for view in found] == [(4, 6), (4, 6)]


@pytest.mark.parametrize("length", [None, 0.5, 3.0])
def test_one_factor_scales_all_views(length):
    """All rows together get a mean square length, √d without one, and keep their proportions."""
    generator = torch.Generator().manual_seed(3)
    views = [size * torch.randn(6, 4, generator=generator, dtype=torch.float64) for size in (0.2, 5.0)]
    found = scaled_together(views, length)
    squares = [sum(value * value for value in row) for view in found for row in view.tolist()]
    assert (sum(squares) / len(squares)) ** 0.5 == pytest.approx(2.0 if length is None else length)
    factors = torch.cat([after / before for before, after in zip(views, found, strict=True)])
    torch.testing.assert_close(factors, factors[0, 0].expand(12, 4))


def test_views_of_zeros_stay():
    assert not scaled_together([torch.zeros(3, 2)])[0].any() and not reduced_together([torch.zeros(3, 2)], 2)[0].any()

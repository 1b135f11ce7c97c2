"""GPU kernels of statistics against float64, and where kernels are used; through Triton's interpreter without a GPU."""

import logging
import math

import pytest
import torch

from functional.pruning import dispatch
from functional.pruning.dispatch import by_kernels
from functional.pruning.statistics_triton import norms_and_peak

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 70, 5), (3, 64, 130)])
def test_norms_and_peak_equal_float64(dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    norm, peak = norms_and_peak(x.to(DEVICE))
    torch.testing.assert_close(norm.cpu().double(), x.double().square().sum(1).sqrt(), rtol=1e-6, atol=0)
    assert norm.dtype == torch.float32 and peak.item() == x.abs().max().item()


def test_norms_of_slices_and_transposed_batches():
    x = torch.randn(3, 20, 24, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    for part in (x[..., 8:16], x.transpose(1, 2), x[:, ::2]):
        norm, peak = norms_and_peak(part)
        torch.testing.assert_close(norm.double(), part.double().square().sum(1).sqrt(), rtol=1e-6, atol=0)
        assert peak == part.abs().max()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_shows_in_the_peak(bad):
    x = torch.ones(2, 80, 6)
    x[1, 70, 4] = bad
    norm, peak = norms_and_peak(x.to(DEVICE))
    assert torch.equal(norm.cpu().isfinite(), torch.tensor([[True] * 6, [True] * 4 + [False, True]]))
    assert peak.isnan() if math.isnan(bad) else peak == math.inf


def test_a_large_number_whose_square_overflows_keeps_its_size():
    norm, peak = norms_and_peak(torch.full((1, 3, 2), 1e20).to(DEVICE))
    assert norm.isinf().all() and peak.item() == pytest.approx(1e20)


class OnGpu:
    is_cuda = True


def test_without_a_compiler_the_plain_way_is_taken_and_said_once(caplog, monkeypatch):
    tried = []

    def fails():
        tried.append(1)
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    monkeypatch.setattr(dispatch, "MISSING", [])
    assert by_kernels(OnGpu(), lambda: "kernel", fails) == "kernel"
    assert by_kernels(torch.ones(1), fails, lambda: "plain") == "plain" and not tried
    with caplog.at_level(logging.WARNING):
        assert by_kernels(OnGpu(), fails, lambda: "plain") == by_kernels(OnGpu(), fails, lambda: "plain") == "plain"
    assert caplog.text.count("Triton finds no C compiler") == len(tried) == 1


def test_other_errors_of_a_kernel_are_not_hidden():
    def fails():
        raise RuntimeError("out of registers")

    with pytest.raises(RuntimeError, match="out of registers"):
        by_kernels(OnGpu(), fails, lambda: "plain")

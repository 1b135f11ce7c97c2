"""LaneLinear against the dense linear."""

import copy

import pytest
import torch
from torch import nn

from lightning_modules.parts import lane_linear
from lightning_modules.parts.lane_linear import LaneLinear, try_lanes
from tests.helpers.sparse_linears import DEVICE, sparse_linear


def test_buffers_are_saved_and_moved():
    linear = sparse_linear()
    lanes = LaneLinear.from_linear(linear)
    again = LaneLinear.from_linear(sparse_linear(bias=True))
    again.load_state_dict(copy.deepcopy(lanes.state_dict()))
    assert torch.equal(again.dense(), linear.weight) and torch.equal(lanes.dense(), linear.weight)
    assert lanes.nbytes == sum(value.nbytes for value in lanes.state_dict().values())
    assert str(lanes) == "LaneLinear(in_features=64, out_features=48, bias=True)" and not list(lanes.parameters())


def test_which_linears_fit():
    assert LaneLinear.fits(sparse_linear()) and LaneLinear.fits(sparse_linear(torch.float16))
    assert not LaneLinear.fits(sparse_linear(torch.float32))
    assert not LaneLinear.fits(nn.Linear(64, 48, dtype=torch.bfloat16))  # no zeros
    long = nn.Linear(40_000, 1, dtype=torch.bfloat16).requires_grad_(False)
    long.weight[:] = 0
    assert not LaneLinear.fits(long)


def test_kernels_that_do_not_run(monkeypatch):
    try_lanes(torch.device(DEVICE))

    def fails(*arguments):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(lane_linear, "decode", fails)
    with pytest.raises(ValueError, match=r"`compressed` = unstructured needs Triton .* \(no C compiler\). Install them"):
        try_lanes(torch.device(DEVICE))

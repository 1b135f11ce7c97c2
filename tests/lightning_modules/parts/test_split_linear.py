"""SplitLinear against the dense linear."""

import copy

import pytest
import torch
from torch import nn

from lightning_modules.parts import split_linear
from lightning_modules.parts.merged_linears import MergedLinears, MergedPart, concatenated
from lightning_modules.parts.split_linear import SplitLinear, try_split
from tests.helpers.sparse_linears import DEVICE, sparse_linear


def test_buffers_are_saved_and_moved():
    linear = sparse_linear()
    split = SplitLinear.from_linear(linear)
    again = copy.deepcopy(split)
    assert torch.equal(again.dense(), linear.weight) and torch.equal(split.dense(), linear.weight)
    assert again.rounds == split.rounds
    assert split.nbytes == sum(value.nbytes for value in split.state_dict().values())
    assert str(split) == "SplitLinear(in_features=64, out_features=48, bias=True)" and not list(split.parameters())


def of_rows(rows, dtype=torch.bfloat16):
    """Some full rows of 64 weights, half of them rest, among 32; rows 0 to 15 are one patch, the others another."""
    linear = nn.Linear(64, 32, bias=False, dtype=dtype).requires_grad_(False)
    linear.weight.zero_()[rows] = 1
    return SplitLinear.from_linear(linear.to(DEVICE))


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_words_are_all_multiplied(monkeypatch, assign):
    """As many words as before, but all in one patch, so that a lane takes more of them."""
    monkeypatch.setattr(split_linear, "on_gpu", lambda x: True)
    again, split = of_rows([0, 16]), of_rows([0, 1])
    assert len(again.words) == len(split.words) and again.rounds < split.rounds
    nn.Sequential(again).load_state_dict({f"0.{name}": value for name, value in split.state_dict().items()}, assign=assign)
    x = torch.randn(1, 64, device=DEVICE, dtype=torch.bfloat16)
    assert torch.equal(again(x), split(x)) and torch.equal(again.dense(), split.dense())


def test_values_of_another_dtype_are_not_loaded():
    split = of_rows([0])
    with pytest.raises(TypeError, match=r"load values of torch.bfloat16 but got torch.float16. Compress"):
        split.load_state_dict(of_rows([0], torch.float16).state_dict())
    assert split.values.dtype == torch.bfloat16


@pytest.mark.parametrize("kernel", [True, False])
@torch.inference_mode()
def test_compiled_in_one_piece(kernel, monkeypatch):
    monkeypatch.setattr(split_linear, "on_gpu", lambda x: kernel)
    linear = sparse_linear()
    split = SplitLinear.from_linear(linear)
    x = torch.randn(2, 64, device=DEVICE, dtype=torch.bfloat16)
    compiled = torch.compile(split, fullgraph=True, backend="eager" if DEVICE == "cpu" else "inductor")
    torch.testing.assert_close(compiled(x), linear(x), rtol=2e-2, atol=2e-2)


def test_merged_with_others(monkeypatch):
    monkeypatch.setattr(split_linear, "on_gpu", lambda x: True)
    linears = [sparse_linear(bias=False, outputs=40), sparse_linear(outputs=24)]
    merged = MergedLinears(SplitLinear.from_linear(concatenated(linears)), [40, 24])
    x = torch.randn(1, 2, 64, device=DEVICE, dtype=torch.bfloat16)
    for index, linear in enumerate(linears):
        torch.testing.assert_close(MergedPart(merged, index)(x), linear(x), rtol=2e-2, atol=2e-2)


def test_a_cast_is_refused_and_a_move_is_not():
    split = SplitLinear.from_linear(sparse_linear())
    before = split.dense()
    with pytest.raises(TypeError, match=r"stay torch.bfloat16 but is cast to torch.float16. Cast the model before"):
        nn.Sequential(split).half()
    assert torch.equal(split.to(DEVICE, torch.bfloat16).dense(), before)


def test_which_linears_fit():
    assert SplitLinear.fits(sparse_linear()) and SplitLinear.fits(sparse_linear(torch.float16))
    assert not SplitLinear.fits(sparse_linear(torch.float32))
    assert not SplitLinear.fits(nn.Linear(64, 48, dtype=torch.bfloat16))  # no zeros
    assert not SplitLinear.fits(sparse_linear(inputs=62))
    linear = sparse_linear()
    linear.weight[:, ::2] = 0
    assert not SplitLinear.fits(linear)  # it is 2:4 as it is


def test_kernels_that_do_not_run(monkeypatch):
    try_split(torch.device(DEVICE))

    def fails(*arguments):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(split_linear, "decode", fails)
    with pytest.raises(ValueError, match=r"`compressed` = auto needs Triton, .* \(no C compiler\). Install them"):
        try_split(torch.device(DEVICE))

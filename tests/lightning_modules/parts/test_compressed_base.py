"""What LaneLinear and SplitLinear have in common, against the dense linear."""

import pytest
import torch

from lightning_modules.parts import lane_linear, split_linear
from lightning_modules.parts.lane_linear import LaneLinear
from lightning_modules.parts.split_linear import SplitLinear
from tests.helpers.sparse_linears import DEVICE, sparse_linear

FORMS = {"lanes": (LaneLinear, lane_linear, 32), "2:4 and rest": (SplitLinear, split_linear, 32)}
"""Form -> its module, the file that it is in, and the most tokens of its kernel."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (2, 4, 64), (3, 7, 64)], ids=str)
def test_equals_the_dense_linear(shape, bias, form):
    linear = sparse_linear(bias=bias)
    x = torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)
    y = FORMS[form][0].from_linear(linear)(x)
    assert y.shape == (*shape[:-1], 48)
    torch.testing.assert_close(y, linear(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("form", FORMS)
def test_few_tokens_go_through_the_kernel_and_many_do_not(monkeypatch, form):
    kind, file, most = FORMS[form]
    seen, decode = [], file.decode

    def counted(x, *others):
        seen.append(len(x))
        return decode(x, *others)

    monkeypatch.setattr(file, "decode", counted)
    monkeypatch.setattr(file, "on_gpu", lambda x: True)
    linear = sparse_linear()
    compressed = kind.from_linear(linear)
    for tokens in (1, most, most + 1):
        x = torch.randn(tokens, 64, device=DEVICE, dtype=torch.bfloat16)
        torch.testing.assert_close(compressed(x), linear(x), rtol=2e-2, atol=2e-2)
    assert seen == [1, most]
    assert compressed(x[:1].float()).dtype == torch.float32 and seen == [1, most]

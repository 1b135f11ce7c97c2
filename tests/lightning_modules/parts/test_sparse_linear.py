"""SparseLinear and CsrLinear against the dense linear, and against a product that is written out in float64."""

import copy

import pytest
import torch
from torch import nn

from lightning_modules.parts.csr_linear import CsrLinear
from lightning_modules.parts.sparse_linear import SparseLinear, zeros_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def linear_of(share, inputs=61, outputs=48, dtype=torch.float32, bias=True, device=DEVICE):
    torch.manual_seed(inputs + outputs)
    linear = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    linear.weight.masked_fill_(torch.rand_like(linear.weight) < share, 0)
    return linear.to(device, dtype)


def in_float64(linear, x):
    """Row by row and weight by weight, those that are zero left out."""
    found = torch.zeros(len(x), linear.out_features, dtype=torch.float64)
    weight, x = linear.weight.double().cpu(), x.double().cpu()
    for row, column in weight.nonzero().tolist():
        found[:, row] += weight[row, column] * x[:, column]
    return found if linear.bias is None else found + linear.bias.double().cpu()


@pytest.mark.parametrize("form", [SparseLinear, CsrLinear])
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_equals_the_product_in_float64(form, tokens, bias):
    linear = linear_of(0.6, bias=bias, device="cpu")
    x = torch.randn(tokens, 61)
    torch.testing.assert_close(form.from_linear(linear)(x).double(), in_float64(linear, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(61,), (1, 1, 61), (16, 61), (2, 9, 61), (0, 61)])
@torch.inference_mode()
def test_equals_the_dense_linear(shape, dtype):
    linear = linear_of(0.6, dtype=dtype)
    compressed = SparseLinear.from_linear(linear)
    x = torch.randn(shape, device=DEVICE, dtype=dtype)
    y = compressed(x)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 48)
    torch.testing.assert_close(y, linear(x))
    assert torch.equal(compressed.dense(), linear.weight)


@pytest.mark.parametrize("shape", [(61,), (1, 1, 61), (2, 9, 61)])
@torch.inference_mode()
def test_sparse_rows_keep_the_shape(shape):
    linear = linear_of(0.6, device="cpu")
    compressed = CsrLinear.from_linear(linear)
    x = torch.randn(shape)
    torch.testing.assert_close(compressed(x), linear(x))
    assert torch.equal(compressed.dense(), linear.weight)
    for module in (compressed, linear):
        module.to(torch.bfloat16)  # for which torch has no sparse product
    torch.testing.assert_close(compressed(x.bfloat16()), linear(x.bfloat16()))


def test_sparse_rows_under_autocast():
    linear = linear_of(0.6, device="cpu")
    x = torch.randn(3, 61)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(CsrLinear.from_linear(linear)(x.bfloat16()), linear(x))


@pytest.mark.parametrize("form", [SparseLinear, CsrLinear])
def test_stored_like_any_module(form):
    linear = linear_of(0.6, bias=False, device="cpu")
    compressed = form.from_linear(linear)
    assert not list(compressed.parameters())
    assert str(compressed).startswith(f"{form.__name__}(in_features=61, out_features=48, bias=False, zeros=")
    other = copy.deepcopy(compressed)
    for buffer in other.buffers():
        buffer.zero_()
    assert not other.dense().any()
    other.load_state_dict(compressed.state_dict())
    assert torch.equal(other.dense(), linear.weight)


def test_bytes():
    linear = nn.Linear(80, 40, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.fill_(1)[:, :40] = 0
    assert SparseLinear.from_linear(linear).nbytes * 16 == linear.weight.nbytes * 9
    assert CsrLinear.from_linear(linear.float()).nbytes == linear.weight.nbytes + 4 * 41  # and a number for each row


def test_which_linears_have_enough_zeros():
    assert [SparseLinear.fits(linear_of(share)) for share in (0.1, 0.25, 0.35, 0.9)] == [False, False, True, True]
    fits = [CsrLinear.fits(linear_of(share, device="cpu")) for share in (0.3, 0.45, 0.55, 0.9)]
    assert fits == [False, False, torch.backends.mkl.is_available(), torch.backends.mkl.is_available()]
    assert not CsrLinear.fits(linear_of(0.9, dtype=torch.bfloat16, device="cpu"))
    assert zeros_of(nn.Linear(4, 4).requires_grad_(False)) == 0

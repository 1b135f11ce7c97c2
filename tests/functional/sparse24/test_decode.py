"""The decoding kernels against a naive float64 product; through Triton's interpreter without a GPU."""

import pytest
import torch

from functional.pruning.masks import Pattern, keep_largest_of_groups
from functional.sparse24 import Config, compress, decode, default_config, expand, prefill

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One rounding of the result; the interpreter cuts off what a GPU rounds, hence a whole unit.
UNIT = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}
CONFIGS = {
    "whole": Config(1, rows=32, bytes=32, splits=1, warps=4, stages=2),
    "split": Config(1, rows=16, bytes=16, splits=3, warps=2, stages=3),
    "more splits than blocks": Config(1, rows=64, bytes=32, splits=9, warps=4, stages=2),
}
OF_ONE = {
    "whole": Config(0, rows=8, bytes=32, splits=1, warps=4, stages=2),
    "split": Config(0, rows=4, bytes=16, splits=3, warps=2, stages=3),
}


def problem(rows, inputs, tokens, dtype, with_bias=True):
    generator = torch.Generator().manual_seed(rows + inputs + tokens)
    weight = torch.randn(rows, inputs, generator=generator)
    weight *= keep_largest_of_groups(weight.abs(), Pattern(2, 4))
    weight[:, 4:8] = 0
    x, bias = torch.randn(tokens, inputs, generator=generator), torch.randn(rows, generator=generator)
    moved = [tensor.to(DEVICE, dtype) for tensor in (weight, x, bias)]
    return (*moved[:2], moved[2] if with_bias else None)


def assert_rounded(y, weight, x, bias=None):
    """Equal to the product in float64, but for sums in float32 and one rounding."""
    bias = torch.zeros(len(weight), device=DEVICE) if bias is None else bias
    expected = x.double() @ weight.double().T + bias.double()
    terms = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    assert y.dtype == x.dtype and y.shape == expected.shape
    assert ((y.double() - expected).abs() <= UNIT[x.dtype] * expected.abs() + 2e-6 * terms).all()


def check(weight, x, bias, config):
    y = decode(x, *compress(weight), bias, config)
    assert_rounded(y, weight, x, bias)
    again = decode(x, *compress(weight), bias, config)
    assert torch.equal(y, again)


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize("config", [*CONFIGS, None])
@pytest.mark.parametrize("width", [41, 42])
def test_equals_the_product_in_float64(dtype, tokens, config, width):
    """37 rows of `width` bytes, which no tile divides; an even width goes by two groups at a time."""
    check(*problem(37, 8 * width, tokens, dtype), CONFIGS.get(config))


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("config", OF_ONE)
def test_one_token_without_tensor_cores(dtype, config):
    check(*problem(37, 8 * 41, 1, dtype), OF_ONE[config])


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("rows", "inputs"), [(64, 512), (1, 8), (16, 128)])
def test_shapes_that_tiles_divide_and_the_smallest(rows, inputs, tokens):
    for dtype in (torch.float32, torch.bfloat16):
        for config in (CONFIGS["whole"], None):
            check(*problem(rows, inputs, tokens, dtype, with_bias=False), config)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # of the interpreter
def test_what_is_not_finite_stays_with_its_token():
    weight, x, _ = problem(20, 8 * 9, 3, torch.float32)
    expected = decode(x, *compress(weight), None, CONFIGS["whole"])
    x[1] = float("inf")
    y = decode(x, *compress(weight), None, CONFIGS["whole"])
    assert torch.equal(y[[0, 2]], expected[[0, 2]]) and not y[1].isfinite().any()


def test_no_token():
    weight, x, bias = problem(20, 64, 0, torch.float32)
    assert decode(x, *compress(weight), bias).shape == (0, 20)


@pytest.mark.parametrize("operator", ["decode", "expand"])
def test_operators_pass_torchs_own_checks(operator):
    """Schema, shapes of fake tensors, and that they can be traced."""
    weight, x, bias = problem(16, 64, 3, torch.float32)
    values, indices = compress(weight)
    arguments = (x, values, indices, bias, list(CONFIGS["split"])) if operator == "decode" else (values, indices)
    torch.library.opcheck(getattr(torch.ops.sparse24, operator).default, arguments)


def test_wrong_arguments():
    weight, x, _ = problem(16, 64, 3, torch.float32)
    values, indices = compress(weight)
    with pytest.raises(ValueError, match=r"`x` expected to be \(tokens, 64\) but got \(3, 32\)"):
        decode(x[:, :32], values, indices)
    with pytest.raises(ValueError, match=r"at most 16 tokens but got 18. Multiply more by the dense weight"):
        decode(x.repeat(6, 1), values, indices)
    with pytest.raises(ValueError, match=r"one dtype of bfloat16, float16, float32 but got torch.float16 and torch.float32"):
        decode(x.half(), values, indices)
    with pytest.raises(ValueError, match="tensor_cores = 0 is for one token, but there are 3"):
        decode(x, values, indices, config=OF_ONE["whole"])
    for wrong in (
        (values[:, :, 1:], indices, None),
        (values[:, 1:], indices, None),
        (values, indices.int(), None),
        (values, indices, x[0, :15]),
    ):
        with pytest.raises(ValueError, match=r"Arguments `values`, `indices` and `bias` expected .* Take the first two from"):
            decode(x, *wrong)


def test_strides_do_not_matter():
    weight, x, bias = problem(16, 64, 3, torch.float32)
    values, indices = compress(weight)
    strided = torch.stack([values, values], -1)[..., 0], torch.stack([indices, indices], -1)[..., 0]
    assert torch.equal(decode(x, *strided, bias), decode(x, values, indices, bias))
    assert torch.equal(expand(*strided), weight)


def test_float32_has_narrower_tiles():
    """64 bytes of float32, three stages of them, need more shared memory than most GPUs have."""
    narrow, wide = (default_config(4, 4096, 512, itemsize) for itemsize in (4, 2))
    assert 2 * narrow.bytes == wide.bytes and narrow.bytes >= 2 * 16


@pytest.mark.parametrize("tokens", [1, 2, 16])
@pytest.mark.parametrize(("rows", "width"), [(4096, 512), (11008, 512), (4096, 1376), (1, 1)])
def test_the_default_has_tiles_that_triton_takes(tokens, rows, width):
    config = default_config(tokens, rows, width)
    assert config.tensor_cores or tokens == 1
    for size in (config.rows, config.bytes, config.warps):
        assert size & (size - 1) == 0
    assert not config.tensor_cores or (config.rows >= 16 and config.bytes >= 16)
    assert 1 <= config.splits <= max(1, width // config.bytes)


def test_prefill_needs_a_gpu():
    with pytest.raises(ValueError, match=r"on a GPU, bfloat16 or float16, .* but got torch.float32 of shape \(16, 64\) on"):
        prefill.pack(torch.zeros(16, 64, device=DEVICE))


@pytest.mark.skipif(DEVICE == "cpu", reason="cuSPARSELt is for GPUs only; test_linear24 has a stand-in")
@pytest.mark.parametrize("tokens", [17, 64])
def test_prefill_equals_the_product_in_float64(tokens):
    weight, x, _ = problem(64, 128, tokens, torch.bfloat16)
    packed = prefill.pack(weight)
    for algorithm in ([0, 1, -1], prefill.fastest(packed, x)):
        y = prefill.multiply(x, packed, 64, algorithm)
        assert_rounded(y, weight, x)

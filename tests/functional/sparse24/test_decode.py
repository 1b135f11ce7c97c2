"""The decoding kernels against a naive float64 product; through Triton's interpreter without a GPU."""

import re
from unittest.mock import Mock

import pytest
import torch

from functional.launches import overlapping
from functional.pruning.masks import Pattern, keep_largest_of_groups
from functional.sparse24 import Compressed, Config, compress, decode, default_config, expand, prefill
from tests.helpers.compiling import compiled, steps_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One rounding of the result; the interpreter cuts off what a GPU rounds, hence a whole unit.
UNIT = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
CONFIGS = {
    "one tile": Config(tiles=1, warps=4, unroll=1),
    "two tiles": Config(tiles=2, warps=2, unroll=2),
    "four tiles": Config(tiles=4, warps=2, unroll=2),
    "more warps than strips": Config(tiles=1, warps=16, unroll=4),
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
    assert_rounded(decode(x, compress(weight), bias, config), weight, x, bias)


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 16])
@pytest.mark.parametrize(
    ("config", "dtype"), [*((name, torch.bfloat16) for name in (*CONFIGS, None)), (None, torch.float16)], ids=str
)
def test_equals_the_product_in_float64(dtype, tokens, config):
    """Three tiles of 37 rows, six strips of 356 inputs: neither is filled, nor divided by warps."""
    check(*problem(37, 356, tokens, dtype), CONFIGS.get(config))


@pytest.mark.parametrize("tokens", [1, 5, 13])
@pytest.mark.parametrize(("rows", "inputs"), [(32, 256), (1, 4), (16, 64)])
def test_full_strips_and_the_smallest(rows, inputs, tokens):
    for config in (CONFIGS["one tile"], CONFIGS["two tiles"], CONFIGS["four tiles"], None):
        check(*problem(rows, inputs, tokens, torch.bfloat16, with_bias=False), config)


@pytest.mark.parametrize("tokens", [1, 16])
def test_a_product_is_the_same_each_time(tokens):
    weight, x, bias = problem(37, 356, tokens, torch.bfloat16)
    first = decode(x, compress(weight), bias)
    assert torch.equal(first, decode(x, compress(weight), bias))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # of the interpreter
def test_what_is_not_finite_stays_with_its_token():
    weight, x, _ = problem(20, 72, 3, torch.float16)
    expected = decode(x, compress(weight), None, CONFIGS["one tile"])
    x[1] = float("inf")
    y = decode(x, compress(weight), None, CONFIGS["one tile"])
    assert torch.equal(y[[0, 2]], expected[[0, 2]]) and not y[1].isfinite().any()


def test_no_token():
    weight, x, bias = problem(20, 64, 0, torch.bfloat16)
    assert decode(x, compress(weight), bias).shape == (0, 20)


@pytest.mark.parametrize("operator", ["decode", "expand"])
def test_operators_pass_torchs_own_checks(operator):
    """Schema, shapes of fake tensors, and that they can be traced."""
    weight, x, bias = problem(16, 64, 3, torch.bfloat16)
    values, indices, *sizes = compress(weight)
    arguments = (values, indices, None, None, *sizes, 0)
    if operator == "decode":
        arguments = (x, *arguments[:4], bias, 16, 0, list(CONFIGS["two tiles"]))
    torch.library.opcheck(getattr(torch.ops.sparse24, operator).default, arguments)


def test_wrong_arguments():
    weight, x, _ = problem(16, 64, 3, torch.float16)
    compressed = compress(weight)
    with pytest.raises(ValueError, match=r"`x` expected to be \(tokens, 64\) with at most 32 tokens but got \(3, 32\)"):
        decode(x[:, :32], compressed)
    with pytest.raises(ValueError, match=r"\(tokens, 64\) with at most 32 tokens but got \(33, 64\). Give the inputs"):
        decode(x.repeat(11, 1), compressed)
    with pytest.raises(ValueError, match=r"one dtype of bfloat16, float16 but got torch.bfloat16 and torch.float16"):
        decode(x.bfloat16(), compressed)
    with pytest.raises(ValueError, match=r"one dtype of bfloat16, float16 but got torch.float32 and torch.float32"):
        decode(x.float(), compress(weight.float()))
    for bias, got in ((x[0, :15], r"\(15,\) of torch.float16"), (x[0, :16].float(), r"\(16,\) of torch.float32")):
        with pytest.raises(ValueError, match=rf"`bias` expected \(16,\) of torch.float16 but got {got}. Cast it"):
            decode(x, compressed, bias)
    for config in (Config(3, 4, 1), Config(1, 3, 1), Config(1, 64, 1), Config(2, 4, 0)):
        with pytest.raises(ValueError, match=r"`config` expected 1, 2 or 4 tiles, .* but got Config.* Leave it"):
            decode(x, compressed, None, config)
    with pytest.raises(ValueError, match="at most 16, the tokens of one pass, but got 17"):
        default_config(17, 16, 64)
    with pytest.raises(ValueError, match=r"bfloat16 or float16 but got torch.float32\. Use"):
        expand(compress(weight.float()))
    values, indices, rows, columns = compressed
    for wrong in ((values[:, :, 1:], indices, rows), (values, indices.long(), rows), (values, indices, 17)):
        with pytest.raises(
            ValueError, match=r"`values` and `indices` of a weight \(1[67], 64\) expected .* Take them from `compress`"
        ):
            decode(x, Compressed(*wrong, columns))


def test_more_words_than_32_bits_count():
    """Tensors without memory: the largest weight that kernels address passes, and one more tile does not."""
    for tiles in (2**17, 2**17 + 1):
        values = torch.empty(tiles, 64, 2, 32, 4, 2, dtype=torch.bfloat16, device="meta")
        indices = torch.empty(tiles, 64, 32, dtype=torch.int32, device="meta")
        weight = Compressed(values, indices, 16 * tiles, 4096)
        if tiles == 2**17:
            assert expand(weight).shape == (16 * tiles, 4096)
            continue
        for call in (expand, lambda weight: decode(torch.empty(1, 4096, dtype=torch.bfloat16, device="meta"), weight)):
            with pytest.raises(ValueError, match=r"at most 8388608 strips of 16 x 64 but \(2097168, 4096\) has 8388672"):
                call(weight)


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize(("rows", "inputs"), [(1, 4), (15, 60), (16, 64), (20, 68), (37, 356)])
def test_expanding(dtype, rows, inputs):
    """Rows of whole 16 bytes and others, tiles and strips that are filled and others."""
    weight = problem(rows, inputs, 1, dtype)[0]
    assert torch.equal(expand(compress(weight)), weight)


def test_strides_and_alignment_do_not_matter():
    weight, x, bias = problem(16, 64, 3, torch.bfloat16)
    compressed = compress(weight)
    values, indices = (torch.stack([part, part], -1)[..., 0] for part in compressed[:2])
    strided = Compressed(values, indices, 16, 64)
    expected = decode(x, compressed, bias)
    assert torch.equal(decode(x, strided, bias), expected) and torch.equal(expand(strided), weight)
    assert torch.equal(decode(x, compressed, torch.stack([bias, bias + 100], -1)[:, 0]), expected)
    shifted = torch.cat([values.flatten()[:1], values.flatten()])[1:].view_as(values)
    assert shifted.data_ptr() % 4 == 2 and torch.equal(decode(x, Compressed(shifted, indices, 16, 64), bias), expected)
    odd = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(3, 64)
    assert odd.data_ptr() % 4 == 2 and torch.equal(decode(odd, compressed, bias), expected)
    assert torch.equal(decode(torch.stack([x, x], -1)[..., 0], compressed, bias), expected)


@pytest.mark.parametrize("tokens", [1, 2, 16])
@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096), (1, 4), (16, 192)])
def test_the_default_is_one_that_triton_takes(tokens, rows, columns):
    config = default_config(tokens, rows, columns)
    assert config.tiles in (1, 2, 4) and config.warps in (1, 2, 4, 8, 16) and config.warps <= -(-columns // 64)
    assert min(config) >= 1


@pytest.mark.parametrize(
    ("arguments", "threads", "products"),
    [("tiles=2, warps=4, tokens=16", 128, 8), ("tiles=1, warps=2, tokens=8, rounds=2, unroll=4", 64, 16)],
)
def test_the_compiler_keeps_an_element_for_each_thread(arguments, threads, products):
    """The instruction of a whole warp counts on it; the interpreter cannot see it, so the compiler's own text is read.

    Products: tiles, times eights of tokens, times strips, times two steps, twice if there is a rest.
    """
    text = compiled(f"decode_kernel_for({arguments})")
    lines = [line for line in text.splitlines() if "mma.sp" in line]
    assert len(lines) == products
    (name,) = {re.search(rf"tensor<{threads}xf32, (#\w+)>", line)[1] for line in lines}
    layout = re.search(rf"^{name} = (.*)$", text, re.MULTILINE)[1]
    each = f"sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [{threads // 32}], order = [0]"
    assert layout == f"#ttg.blocked<{{{each}}}>"


def test_inputs_are_read_after_the_wait_for_the_kernel_ahead():
    """A step loads weights, waits, and loads inputs: two loads for eight tokens of a strip. Older GPUs have no such wait."""
    found = {}
    for capability in (80, 90):
        steps = steps_of(compiled(f"decode_kernel_for(tiles=1, warps=2, tokens=8, capability={capability})"))
        found[capability] = steps[: steps.index("product")]
        assert steps.index("store") > steps.index("product")
    assert found[90] == ["wait", "for", *["load"] * 3, "wait", *["load"] * 2, "barrier"]
    assert found[80] == ["for", *["load"] * 5, "barrier"]


@pytest.mark.parametrize("rounds", [0, 1, 4])
def test_the_threads_of_a_program_share_one_memory(rounds):
    """With two elements for each thread the compiler would reserve it twice."""
    text = compiled(f"expand_kernel_for(rounds={rounds})")
    assert text.count(".b8 memory[") == (rounds > 0)
    assert text.count("bar.sync") >= 2 * (rounds > 0)


def test_weights_are_constant_unless_a_kernel_copies_them(monkeypatch):
    """Nothing but a CUDA graph lets a kernel read weights early, and there only those that are not copied first."""
    x, weights = torch.zeros(1, 4), [torch.zeros(4), torch.zeros(3)]
    assert overlapping(x, weights, weights) == (False, {"OVERLAPS": False, "launch_pdl": False})
    on_gpu = Mock(is_cuda=True)
    for capability, capturing, read, expected in (
        ((9, 0), True, weights, (True, True)),
        ((9, 0), False, weights, (False, True)),
        ((9, 0), True, [weights[0], weights[1].clone()], (False, True)),
        ((8, 9), True, weights, (False, False)),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, value=capability: value)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda value=capturing: value)
        early, able = expected
        assert overlapping(on_gpu, weights, read) == (early, {"OVERLAPS": able, "launch_pdl": able})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "7.0")  # a capability of AMD, whose GPUs have no such instruction
    assert overlapping(on_gpu, weights, weights) == (False, {"OVERLAPS": False, "launch_pdl": False})


@pytest.mark.parametrize("tokens", [17, 32])
def test_two_passes(tokens):
    weight, x, bias = problem(37, 356, tokens, torch.bfloat16)
    check(weight, x, bias, None)
    check(weight, x, bias, CONFIGS["two tiles"])


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

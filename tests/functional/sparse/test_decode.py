"""The kernels on lanes against a naive float64 product; through Triton's interpreter without a GPU."""

import pytest
import torch

from functional.sparse import decode, expand, to_lanes
from tests.functional.sparse.test_lanes import matrix, uneven
from tests.helpers.compiling import compiled, steps_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One rounding of the result; the interpreter cuts off what a GPU rounds, hence a whole unit.
UNIT = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


def problem(tokens, dtype, weight=None):
    generator = torch.Generator().manual_seed(tokens)
    weight = uneven() / 10 if weight is None else weight
    x, bias = torch.randn(tokens, weight.shape[1], generator=generator), torch.randn(len(weight), generator=generator)
    return [tensor.to(DEVICE, dtype) for tensor in (weight, x, bias)]


def assert_rounded(y, weight, x, bias):
    """Equal to the product in float64, but for sums in float32 and one rounding."""
    expected = x.double() @ weight.double().T + bias.double()
    terms = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    assert y.dtype == x.dtype and y.shape == expected.shape
    assert ((y.double() - expected).abs() <= UNIT[x.dtype] * expected.abs() + 2e-6 * terms).all()


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_equals_the_product_in_float64(dtype, tokens):
    weight, x, bias = problem(tokens, dtype)
    assert_rounded(decode(x, to_lanes(weight, 8, 4), bias), weight, x, bias)


@pytest.mark.parametrize(("height", "parts"), [(16, 32), (32, 16), (16, 64), (1, 2)])
def test_every_cut(height, parts):
    """A height of 32 takes two chunks at a time; most parts of these rows have none."""
    weight, x, bias = problem(1, torch.bfloat16)
    assert_rounded(decode(x, to_lanes(weight, height, parts), bias), weight, x, bias)


@pytest.mark.parametrize("tokens", [1, 2, 8, 9])
def test_a_single_column(tokens):
    weight, x, bias = problem(tokens, torch.bfloat16, torch.arange(5.0)[:, None])
    assert_rounded(decode(x, to_lanes(weight), bias), weight, x, bias)


def test_without_a_bias_and_weights_of_zeros_or_ones():
    for weight in (torch.zeros(5, 9), torch.ones(40, 64)):
        weight, x, bias = problem(2, torch.bfloat16, weight)
        assert_rounded(decode(x, to_lanes(weight, 8, 4)), weight, x, torch.zeros_like(bias))


def test_a_product_is_the_same_each_time_and_of_each_token_alone():
    weight, x, bias = problem(8, torch.bfloat16)
    lanes = to_lanes(weight, 8, 4)
    y = decode(x, lanes, bias)
    assert torch.equal(y, decode(x, lanes, bias)) and torch.equal(y[:3], decode(x[:3], lanes, bias))


@pytest.mark.parametrize("tokens", [1, 2])
def test_rows_of_zeros_alone(tokens):
    """Slices of which some have no chunk, and all of them."""
    for weight in (torch.cat([torch.zeros(20, 40), uneven()[:, :40]]), torch.zeros(20, 40)):
        problem_of = problem(tokens, torch.bfloat16, weight)
        assert_rounded(decode(problem_of[1], to_lanes(problem_of[0], 8, 4), problem_of[2]), *problem_of)


@pytest.mark.parametrize("tokens", [1, 8])
def test_inputs_are_read_after_the_wait_for_the_kernel_ahead(tokens):
    """Where a slice begins and its columns come first. A chunk waits, and so does a slice that has none, before it stores."""
    steps = steps_of(compiled(f"lanes_kernel_for(tokens={tokens}, capability=90)"))
    loop = steps.index("for")
    assert steps[:loop] == ["wait", "load", "load", "load"]
    assert steps[loop : loop + 4] == ["for", "load", "load", "wait"] and steps[loop + 4 : loop + 12] == ["load"] * 8
    assert steps[loop + 12 : loop + 14] == ["wait", "load"] and steps.count("wait") == 3 and "store" not in steps[:loop]
    assert "wait" not in steps_of(compiled(f"lanes_kernel_for(tokens={tokens})"))


@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_expanding(dtype):
    weight = uneven().to(DEVICE, dtype)
    assert torch.equal(expand(to_lanes(weight, 8, 4)), weight)
    assert torch.equal(expand(to_lanes(weight.flip(0))), weight.flip(0))


@pytest.mark.parametrize("columns", [8, 16, 40, 152, 149])
@pytest.mark.parametrize(("height", "parts"), [(16, 32), (8, 4), (1, 2), (4, 1)])
def test_expanding_windows_of_eight_columns(height, parts, columns):
    """Lanes begin and end anywhere in a window, share it, jump over one, or have none; what is one column too wide has none."""
    whole = torch.cat([uneven(), matrix(37, 8, 0.5, seed=1)], 1)[:, :columns]
    for weight in (whole, matrix(19, columns, 0.9), matrix(19, columns, 0.05), torch.ones(3, columns), torch.zeros(5, columns)):
        weight = weight.to(DEVICE, torch.bfloat16)
        assert torch.equal(expand(to_lanes(weight, height, parts)), weight)


def test_no_token():
    weight, x, bias = problem(0, torch.bfloat16)
    assert decode(x, to_lanes(weight), bias).shape == (0, 37)


def test_strides_do_not_matter():
    weight, x, bias = problem(3, torch.bfloat16)
    lanes = to_lanes(weight, 8, 4)
    strided = lanes._replace(**{name: torch.stack([part, part], -1)[..., 0] for name, part in lanes._asdict().items()
                                if isinstance(part, torch.Tensor)})  # fmt: skip
    expected = decode(x, lanes, bias)
    assert torch.equal(decode(x, strided, bias), expected) and torch.equal(expand(strided), weight)
    assert torch.equal(decode(torch.stack([x, x], -1)[..., 0], lanes, torch.stack([bias, bias], -1)[..., 0]), expected)


@pytest.mark.parametrize("operator", ["decode", "expand"])
def test_operators_pass_torchs_own_checks(operator):
    """Schema, shapes of fake tensors, and that they can be traced."""
    weight, x, bias = problem(3, torch.bfloat16)
    lanes = to_lanes(weight, 8, 4)
    arguments = (x, *lanes[:5], bias, 37) if operator == "decode" else tuple(lanes)
    torch.library.opcheck(getattr(torch.ops.sparse_lanes, operator).default, arguments)


def test_wrong_arguments():
    weight, x, _ = problem(3, torch.float16)
    lanes = to_lanes(weight)
    for wrong, got in ((x[:, :32], r"\(3, 32\)"), (x.repeat(22, 1), r"\(66, 150\)"), (x[0], r"\(150,\)")):
        with pytest.raises(ValueError, match=rf"`x` expected to be \(tokens, 150\) with at most 32 tokens but got {got}. Give"):
            decode(wrong, lanes)
    with pytest.raises(ValueError, match=r"one dtype of bfloat16, float16 but got torch.bfloat16 and torch.float16"):
        decode(x.bfloat16(), lanes)
    with pytest.raises(ValueError, match=r"one dtype of bfloat16, float16 but got torch.float32 and torch.float32"):
        decode(x.float(), to_lanes(weight.float()))
    for bias, got in ((x[0, :15], r"\(15,\) of torch.float16"), (x[0, :37].float(), r"\(37,\) of torch.float32")):
        with pytest.raises(ValueError, match=rf"`bias` expected \(37,\) of torch.float16 but got {got}. Cast it"):
            decode(x, lanes, bias)
    with pytest.raises(ValueError, match=r"bfloat16 or float16 but got torch.float32\. Use"):
        expand(to_lanes(weight.float()))

"""Matrices with zeros anywhere as a 2:4 one and a rest: storing them, and the kernels against a naive float64 product."""

import itertools
from functools import partial

import pytest
import torch

from functional.sparse24 import Config, Rest, decode, decompress, default_config, expand, join, rest_triton, split
from functional.sparse24.decode import BYTES_OF_A_PATCH
from functional.sparse24.rest import BANKS, PLACES, ROUNDS, STRIPS, other_positions
from tests.functional.sparse24.test_decode import DEVICE, UNIT, assert_rounded

CONFIGS = {
    "one tile": Config(tiles=1, warps=1, unroll=4),
    "two tiles": Config(tiles=2, warps=2, unroll=4),
    "two patches": Config(tiles=1, warps=2, unroll=8),
    "four tiles": Config(tiles=4, warps=1, unroll=4),
}


def problem(rows, inputs, tokens, dtype, zeros):
    generator = torch.Generator().manual_seed(rows + inputs + tokens)
    weight = torch.randn(rows, inputs, generator=generator)
    weight[torch.rand(rows, inputs, generator=generator) < zeros] = 0
    weight[: rows // 2, :4] = 1 + torch.arange(4)  # a full group
    x, bias = torch.randn(tokens, inputs, generator=generator), torch.randn(rows, generator=generator)
    return [tensor.to(DEVICE, dtype) for tensor in (weight, x, bias)]


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("zeros", [0, 0.5, 0.9, 1])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 4), (16, 256), (37, 356), (20, 68), (20, 580)])
def test_both_parts_make_the_matrix(rows, inputs, zeros, dtype):
    weight = problem(rows, inputs, 1, dtype, zeros)[0]
    compressed, rest = split(weight)
    assert torch.equal(join(compressed, rest), weight) and torch.equal(expand(compressed, rest), weight)
    main = decompress(*compressed)
    groups = torch.count_nonzero(weight.view(rows, -1, 4), -1)
    assert torch.equal(torch.count_nonzero(main.view(rows, -1, 4), -1), groups.clamp_max(2))
    assert len(rest.words) == (groups - 2).clamp_min(0).sum() == rest.starts[-1]
    assert rest.rounds in ROUNDS and rest.starts.diff().max() <= 32 * rest.rounds


def test_more_strips_than_a_program_restores():
    """17 strips: three programs of eight, of which the last has one, of a patch of its own."""
    weight = problem(20, 17 * 64, 1, torch.bfloat16, 0.4)[0]
    assert torch.equal(expand(*split(weight)), weight)


def test_the_two_other_positions():
    """All pairs, in every nibble of a word, against the pairs themselves."""
    pairs = list(itertools.combinations(range(4), 2))
    for place, (first, last) in itertools.product(range(8), pairs):
        left, right = sorted({0, 1, 2, 3} - {first, last})
        word = sum(((first | last << 2) if nibble == place else 4) << 4 * nibble for nibble in range(8))
        expected = sum(((left | right << 2) if nibble == place else 14) << 4 * nibble for nibble in range(8))
        words = torch.tensor([word, expected]).to(torch.uint32).view(torch.int32)
        assert torch.equal(other_positions(words), words.flip(0))


def test_words_in_turn_are_of_different_banks():
    """A bank has its n-th word before any bank has its next one."""
    rest = split(problem(64, 1024, 1, torch.float16, 0.3)[0])[1]
    for first, last in itertools.pairwise(rest.starts.tolist()):
        places = (rest.words[first:last] & 0xFFFF) // 2
        assert places.max() < PLACES and len(places.unique()) == len(places)
        banks = (places // 2 % BANKS).tolist()
        turns = [banks[:place].count(bank) for place, bank in enumerate(banks)]
        assert list(zip(turns, banks, strict=True)) == sorted(zip(turns, banks, strict=True))


def test_words_that_are_none_have_a_place_behind_the_patch():
    """The kernel's own numbers are those that its memory is reserved by."""
    assert rest_triton.NO_WORD.value == 2 * PLACES == STRIPS * rest_triton.BYTES_OF_A_STRIP.value
    assert rest_triton.BYTES_OF_A_PATCH.value == BYTES_OF_A_PATCH >= 2 * PLACES + 2 and BYTES_OF_A_PATCH % 16 == 0


@pytest.mark.parametrize("tokens", [1, 8, 11])
@pytest.mark.parametrize("config", [*CONFIGS, None])
def test_equals_the_product_in_float64(config, tokens):
    """Three tiles of 37 rows, six strips and two patches of 356 inputs: none is filled, nor divided by warps."""
    weight, x, bias = problem(37, 356, tokens, torch.bfloat16, 0.6)
    compressed, rest = split(weight)
    assert_rounded(decode(x, compressed, bias, CONFIGS.get(config), rest), weight, x, bias)


@pytest.mark.parametrize("zeros", [0, 0.5, 0.7, 1])
def test_any_share_of_zeros(zeros):
    weight, x, bias = problem(32, 512, 3, torch.float16, zeros)
    compressed, rest = split(weight)
    y = decode(x, compressed, bias, CONFIGS["two patches"], rest)
    assert_rounded(y, weight, x, bias)
    assert torch.equal(y, decode(x, compressed, bias, CONFIGS["two patches"], rest))


@pytest.mark.parametrize("operator", ["decode", "expand"])
def test_operators_pass_torchs_own_checks(operator):
    weight, x, bias = problem(16, 64, 3, torch.bfloat16, 0.5)
    (values, indices, *sizes), (words, starts, rounds) = split(weight)
    config = list(CONFIGS["one tile"])
    last = (bias, 16, rounds, config) if operator == "decode" else (*sizes, rounds)
    arguments = (*([x] if operator == "decode" else []), values, indices, words, starts, *last)
    torch.library.opcheck(getattr(torch.ops.sparse24, operator).default, arguments)


def test_wrong_arguments():
    weight, x, _ = problem(16, 64, 3, torch.float16, 0.5)
    compressed, rest = split(weight)
    with pytest.raises(ValueError, match=r"`weight` expected bfloat16 or float16 but got torch.float32. Leave"):
        split(weight.float())
    with pytest.raises(ValueError, match=r"`weight` expected a multiple of 4 inputs but got 63"):
        split(weight[:, :63])
    for wrong in (Rest(rest.words.long(), rest.starts, 1), Rest(rest.words, rest.starts[1:], 1)):
        for call in (partial(decode, x, compressed, None, None, wrong), partial(expand, compressed, wrong)):
            with pytest.raises(ValueError, match=r"`rest` of a weight \(16, 64\) expected int32 .* Take it from `split`"):
                call()
    for rounds in (0, 7, 65):
        wrong = rest._replace(rounds=rounds)
        for call in (partial(decode, x, compressed, None, None, wrong), partial(expand, compressed, wrong)):
            with pytest.raises(ValueError, match=rf"`rest` expected rounds of \(1, 2, .*\) but got {rounds}. Take it"):
                call()
    for config in (Config(1, 4, 2), Config(4, 4, 4), Config(3, 1, 4), Config(1, 4, 0)):
        with pytest.raises(
            ValueError, match=r"`config` expected .*with a rest at most 8 tiles times warps, and a multiple of 4"
        ):
            decode(x, compressed, None, config, rest)


@pytest.mark.parametrize("tokens", [1, 2, 16])
@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (11008, 4096), (4096, 11008), (1, 4)])
def test_the_default_is_one_that_triton_takes(tokens, rows, columns):
    config = default_config(tokens, rows, columns, has_rest=True)
    assert config.unroll in (4, 8) and config.tiles * config.warps <= 8

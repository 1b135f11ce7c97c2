"""Experts one matrix at a time: the same outputs as transformers', the rows of gate and up, tokens sorted by samples."""

import pytest
import torch
from torch import nn

from lightning_modules.parts.architectures import PrunableLinear
from lightning_modules.parts.block_stream import replaced_forwards
from lightning_modules.parts.experts import Routing, experts_of, matrices_of, parts_of, routed_forwards
from tests.helpers.tiny import MIXTURES, VOCABULARY, make_mixture

TOKENS = torch.randint(2, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(7))


def experts_in(model):
    return next(experts for block in model.model.layers for experts in experts_of(block).values())


@pytest.mark.parametrize("family", MIXTURES)
@torch.no_grad()
def test_same_outputs_as_transformers(family):
    """Also while matrices borrow, and with every matrix called once, whatever tokens come to it."""
    model, calls = make_mixture(family), []
    names = list(model.state_dict())
    expected = model(input_ids=TOKENS, use_cache=False).logits
    forwards = {module: forward for block in model.model.layers for module, forward in routed_forwards(block).items()}
    matrices = [matrix for experts in forwards for pair in matrices_of(experts) for matrix in pair]
    for matrix in matrices:
        matrix.register_forward_hook(lambda module, args, output: calls.append(module))
    for borrowed in (0.0, 0.5):
        matrices[0].borrowed = matrices[3].borrowed = borrowed
        calls.clear()
        with replaced_forwards(forwards):
            found = model(input_ids=TOKENS, use_cache=False).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert sorted(map(id, calls)) == sorted(map(id, matrices))
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("family", MIXTURES)
@torch.no_grad()
def test_parts_are_what_the_experts_read_as_such(family):
    """Without gate, or without down, an expert of plain SwiGLU returns nothing; up is what its outputs grow with."""
    experts = experts_in(make_mixture(family))
    hidden, expert = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)), 1
    alone = (torch.full((5, 1), expert), torch.ones(5, 1))
    linears = {name: PrunableLinear(module, rows) for name, module, rows in parts_of(experts)}
    gate, up, down = (linears[f"{expert}.{name}"] for name in ("gate_up_proj.gate", "gate_up_proj.up", "down_proj"))
    assert (gate.in_features, up.out_features, down.out_features) == (32, down.in_features, 32)
    if experts.has_bias:
        for name in ("gate_up_proj_bias", "down_proj_bias"):
            getattr(experts, name).zero_()
    x, act = hidden @ gate.weight.T, getattr(experts, "act_fn", None)
    if family == "gpt_oss":
        x = x.clamp(max=experts.limit)
        expected = x * torch.sigmoid(x * experts.alpha) * ((hidden @ up.weight.T).clamp(-experts.limit, experts.limit) + 1)
    else:
        expected = act(x) * (hidden @ up.weight.T)
    torch.testing.assert_close(experts(hidden, *alone), expected @ down.weight.T, atol=1e-5, rtol=1e-4)
    down.assign(torch.zeros_like(down.weight))
    assert not experts(hidden, *alone).any() and experts(hidden, alone[0] * 0, alone[1]).any()


def test_matrices_hold_no_weights_of_their_own():
    experts = experts_in(make_mixture("gpt_oss"))
    linear = PrunableLinear(matrices_of(experts)[2][0])
    linear.assign(torch.zeros_like(linear.weight))
    assert linear.parameter is experts.gate_up_proj and not experts.gate_up_proj[2].any() and experts.gate_up_proj[1].any()
    assert matrices_of(experts)[2][0] is linear.module and not list(linear.module.parameters())
    assert not any(isinstance(module, type(linear.module)) for module in experts.modules())


@pytest.mark.parametrize("weighted", [False, True])
def test_tokens_are_sorted_by_samples(weighted):
    generator = torch.Generator().manual_seed(0)
    samples, length, features = 4, 6, 3
    index = torch.tensor([1, 4, 5, 13, 20, 21, 22, 23])  # none of the second sample
    x = torch.randn(len(index), features, generator=generator)
    weights = torch.rand(len(index), generator=generator) if weighted else None
    tokens, lengths = Routing(index, samples * length, weights).by_sample(x, samples)
    assert tokens.shape == (samples, 4, features) and lengths.tolist() == [length] * samples
    for sample in range(samples):
        own = index // length == sample
        factors = weights[own] if weighted else torch.ones(int(own.sum()))
        expected = x[own].double() * factors.double()[:, None].sqrt()
        torch.testing.assert_close(tokens[sample, : int(own.sum())].double(), expected, atol=1e-6, rtol=1e-6)
        assert not tokens[sample, int(own.sum()) :].any()


def test_no_tokens_at_all():
    tokens, lengths = Routing(torch.zeros(0, dtype=torch.int64), 8).by_sample(torch.zeros(0, 3), 2)
    assert tokens.shape == (2, 1, 3) and not tokens.any() and lengths.tolist() == [4, 4]


def test_other_modules_are_no_experts():
    class Named(nn.Module):
        """Called like one."""

        def __init__(self):
            super().__init__()
            self.down_proj, self.gate_up_proj = nn.Parameter(torch.ones(2, 3, 4)), nn.Parameter(torch.ones(2, 8, 3))

    assert not experts_of(nn.ModuleDict({"experts": Named()}))

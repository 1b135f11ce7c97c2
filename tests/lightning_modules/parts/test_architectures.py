"""The table of names: whole linears and parts of fused ones."""

from dataclasses import replace

import pytest
import torch

from lightning_modules.parts.architectures import VISION_TRANSFORMER, find_linears
from tests.helpers.tiny import tiny_vit


def test_parts_of_a_fused_linear_are_views_of_it():
    block = tiny_vit().model.blocks[0]
    linears = find_linears(block, VISION_TRANSFORMER)
    assert list(linears) == ["attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.proj", "mlp.fc1", "mlp.fc2"]
    before = block.attn.qkv.weight.detach().clone()
    for i, role in enumerate("qkv"):
        linear = linears[f"attn.qkv.{role}"]
        assert (linear.out_features, linear.in_features) == (32, 32) and torch.equal(linear.weight, before[32 * i :][:32])
    linears["attn.qkv.k"].weight.zero_()
    assert (block.attn.qkv.weight[32:64] == 0).all()
    assert torch.equal(block.attn.qkv.weight[:32], before[:32]) and torch.equal(block.attn.qkv.weight[64:], before[64:])
    assert linears["mlp.fc1"].weight.shape == (128, 32) == (linears["mlp.fc1"].out_features, linears["mlp.fc1"].in_features)


def test_a_fused_linear_must_fall_into_its_parts():
    block = tiny_vit().model.blocks[0]
    wrong = replace(VISION_TRANSFORMER, fused={"attn.qkv": ("a", "b", "c", "d", "e")})
    with pytest.raises(ValueError, match=r"'attn.qkv' has 96 rows, which are not a, b, c, d, e of one size"):
        find_linears(block, wrong)

"""Submodules that end in a pruned linear, and what replaces them."""

import pytest
import torch
from torch import nn

from callbacks.blockwise.endings import Ending, finding_endings
from lightning_modules import CausalLM
from lightning_modules.parts.architectures import PrunableLinear
from lightning_modules.parts.block_stream import BlockStream, replaced_forwards
from tests.helpers.tiny import tiny_images, tiny_vit

ENDINGS = {
    "llama": {"self_attn.o_proj": Ending("self_attn", 2), "mlp.down_proj": Ending("mlp", None)},
    "opt": {"self_attn.out_proj": Ending("self_attn", 2)},
    "qwen3": {"self_attn.o_proj": Ending("self_attn", 2), "mlp.down_proj": Ending("mlp", None)},
    "gpt2": {"attn.c_proj": Ending("attn", 2), "mlp.c_proj": Ending("mlp", None)},
}


class Feedforward(nn.Module):
    """A submodule with the linears up and down that does something at its end."""

    def __init__(self, end):
        super().__init__()
        self.up, self.down, self.end = nn.Linear(8, 16), nn.Linear(16, 8), end

    def forward(self, x):
        return self.end(self, self.down(torch.relu(self.up(x))))


class Block(nn.Module):
    """h + inner(h), with inner called some times."""

    def __init__(self, end, calls=1):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.calls = nn.Sequential(Feedforward(end)), calls

    def forward(self, hidden):
        for _ in range(self.calls):
            found = self.inner(hidden)
        return hidden + (found[0] if isinstance(found, tuple) else found)


def endings_of(block, linears, run, pruned=None):
    with torch.no_grad(), finding_endings(block, linears, linears if pruned is None else pruned) as found:
        run()
    assert not any(module._forward_hooks for module in block.modules())
    return found


def of_toy(block, pruned=None):
    names = ("inner.0.up", "inner.0.down")
    linears = {name: PrunableLinear(block.get_submodule(name)) for name in names}
    return endings_of(block, linears, lambda: block(torch.ones(2, 3, 8)), pruned)


@pytest.mark.parametrize("family", ENDINGS)
def test_endings_of_language_models(family, tiny_model):
    module = CausalLM(tiny_model(family))
    module.configure_model()
    module.model.eval()
    stream = BlockStream(list(module.blocks.values()))
    stream.capture(0, lambda: module.model(torch.arange(2, 26).view(2, 12)))
    linears = module.linears(stream.blocks[0])
    assert endings_of(stream.blocks[0], linears, lambda: stream.run(0, 0)) == ENDINGS[family]
    expected = stream.run(0, 0)
    for name, ending in ENDINGS[family].items():
        inputs = []
        linear, submodule = linears[name].module, stream.blocks[0].get_submodule(ending.submodule)
        handle = linear.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
        stream.run(0, 0)
        handle.remove()
        with replaced_forwards({submodule: ending.forward(linear, inputs[0])}):
            assert torch.equal(stream.run(0, 0), expected), name
        assert "forward" not in submodule.__dict__


def test_endings_of_a_vision_transformer():
    module, images = tiny_vit(), torch.stack([sample["image"] for sample in tiny_images(4, 0)])
    stream = BlockStream(list(module.blocks.values()))
    stream.capture(0, lambda: module.model.eval()(images))
    found = endings_of(stream.blocks[0], module.linears(stream.blocks[0]), lambda: stream.run(0, 0))
    assert found == {"attn.proj": Ending("attn", None), "mlp.fc2": Ending("mlp", None)}


def test_the_outermost_submodule_counts():
    assert of_toy(Block(lambda module, y: y)) == {"inner.0.down": Ending("inner", None)}
    assert of_toy(Block(lambda module, y: (y, None))) == {"inner.0.down": Ending("inner", 2)}


@pytest.mark.parametrize(
    "end",
    [
        lambda module, y: y * 1,
        lambda module, y: y.add_(1),
        lambda module, y: (y, y),
        lambda module, y: (y, module.up(torch.ones(8)))[0],
        lambda module, y: [y],
    ],
    ids=["something follows", "changed in place", "more is returned", "another linear is called later", "a list"],
)
def test_submodules_that_do_more_are_no_endings(end):
    block = Block(end)
    block.forward = lambda hidden: block.inner(hidden)
    assert of_toy(block) == {}


def test_no_endings_of_calls_and_linears_that_do_not_fit():
    assert of_toy(Block(lambda module, y: y, calls=2)) == {}
    assert of_toy(Block(lambda module, y: y), pruned=["inner.0.up"]) == {}

"""BlockStream: running block by block gives the hidden states of the whole model, in every family."""

import pytest
import torch
from torch import nn

from lightning_modules import CausalLM
from lightning_modules.parts.block_stream import BlockStream
from tests.helpers.tiny import FAMILIES, VOCABULARY, make_model

TOKENS = 20


@pytest.fixture(params=FAMILIES)
def module(request, tiny_model):
    module = CausalLM(tiny_model(request.param))
    module.configure_model()
    return module.eval()


def batches(count=2):
    generator = torch.Generator().manual_seed(7)
    return [{"input_ids": torch.randint(2, VOCABULARY, (3, TOKENS), generator=generator)} for _ in range(count)]


def reference(module, batch):
    """What enters each block and what leaves the last one, recorded from the model's own forward."""
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, args, kwargs, out: seen.append((args[0].clone(), out)), with_kwargs=True)
        for block in module.blocks.values()
    ]
    with torch.no_grad():
        output = module.model(**batch, use_cache=False, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    last = seen[-1][1]
    return [x for x, _ in seen] + [last[0] if isinstance(last, tuple) else last], output


def stream_states(module, data):
    """Hidden states of every batch before each block and after the last, through a BlockStream."""
    stream = BlockStream(list(module.blocks.values()))
    states = [[] for _ in data]
    for key, batch in enumerate(data):
        stream.capture(key, lambda batch=batch: module.calibration_forward(batch))
    for index in range(len(stream.blocks)):
        for key in range(len(data)):
            states[key].append(stream.hidden(key))
            stream.advance(key, index)
    for key in range(len(data)):
        states[key].append(stream.hidden(key))
    return states


def test_equals_the_whole_model_before_and_after_pruning(module):
    data = batches()
    for _ in range(2):
        for states, batch in zip(stream_states(module, data), data, strict=True):
            expected, output = reference(module, batch)
            for index, (mine, whole) in enumerate(zip(states, expected, strict=True)):
                torch.testing.assert_close(mine, whole, rtol=1e-5, atol=1e-5, msg=f"entering block {index}")
            for mine, whole in zip(states[:-1], output.hidden_states[:-1], strict=True):
                torch.testing.assert_close(mine, whole, rtol=1e-5, atol=1e-5)
        with torch.no_grad():  # prune crudely and compare again
            for block in module.blocks.values():
                for linear in module.linears(block).values():
                    linear.weight[:, ::2] = 0


def test_sliding_window_reaches_only_its_own_block(tiny_model):
    """Qwen2 may mix attention kinds: arguments captured at block 0 alone would be wrong for the last block."""
    module = CausalLM(tiny_model("qwen2"))
    module.configure_model()
    stream = BlockStream(list(module.eval().blocks.values()))
    stream.capture(0, lambda: module.calibration_forward(batches(1)[0]))
    masks = [kwargs.get("attention_mask") for _, kwargs in stream._batches[0].calls]
    assert masks[0] is None or not torch.equal(masks[0], masks[-1])
    assert masks[-1] is not None


def test_each_block_has_its_own_rotary_embedding():
    """Gemma 3 turns positions faster in its blocks with a window; what equals the batch before is shared block by block."""
    model = make_model("gemma3_text").eval()
    stream = BlockStream(list(model.model.layers))
    for key, batch in enumerate(batches(2)):
        stream.capture(key, lambda batch=batch: model(**batch, use_cache=False))
    for key in range(2):
        arguments = [kwargs for _, kwargs in stream._batches[key].calls]
        cosines = [kwargs["position_embeddings"][0] for kwargs in arguments]
        assert torch.equal(cosines[0], cosines[2]) and (cosines[0] - cosines[1]).abs().max() > 0.1
        position = torch.arange(TOKENS)[:, None]
        for cosine, base in zip(cosines, (1e4, 1e6, 1e4), strict=True):
            angles = position / base ** (torch.arange(0, cosine.shape[-1], 2) / cosine.shape[-1])
            torch.testing.assert_close(cosine[0], angles.cos().repeat(1, 2), rtol=1e-4, atol=1e-4)
        masks = [kwargs["attention_mask"] for kwargs in arguments]
        assert masks[1] is None or not torch.equal(masks[0], masks[1])


def test_forward_is_restored_and_model_errors_pass_through(module):
    block = next(iter(module.blocks.values()))
    stream = BlockStream(list(module.blocks.values()))
    before = block.forward
    stream.capture(0, lambda: module.calibration_forward(batches(1)[0]))
    assert "forward" not in block.__dict__ and block.forward == before
    with pytest.raises(ZeroDivisionError):
        stream.capture(1, lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="called 0 of its 3 blocks"):
        stream.capture(1, lambda: None)
    assert "forward" not in block.__dict__ and len(stream) == 1


def test_equal_arguments_are_kept_once(module):
    stream = BlockStream(list(module.blocks.values()))
    for key, batch in enumerate(batches(3)):
        stream.capture(key, lambda batch=batch: module.calibration_forward(batch))

    def tensors(value):
        if isinstance(value, torch.Tensor):
            return {id(value)}
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
        return set().union(*map(tensors, parts)) if parts else set()

    one = tensors([call for call in stream._batches[0].calls])
    everything = set().union(*(tensors(batch.calls) for batch in stream._batches.values()))
    assert everything == one
    stream.clear()
    assert len(stream) == 0


def test_blocks_that_return_tuples():
    class Tuple(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, hidden_states, scale):
            return self.linear(hidden_states) * scale, "cache"

    blocks = nn.ModuleList(Tuple() for _ in range(3))
    x = torch.randn(2, 5, 4)

    def model():
        h = x
        for i, block in enumerate(blocks):
            h = block(hidden_states=h, scale=i + 1.0)[0]
        return h

    stream = BlockStream(list(blocks))
    stream.capture("only", model)
    for index in range(3):
        stream.advance("only", index)
    torch.testing.assert_close(stream.hidden("only"), model())

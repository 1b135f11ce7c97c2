"""Attention in eager form and in the model's own: one output, the model's own probabilities, and every setting put back."""

import pytest
import torch
from torch import nn

from lightning_modules import CausalLM
from lightning_modules.parts.attention_form import attention_form, run_attention, run_attention_eagerly
from lightning_modules.parts.block_stream import BlockStream
from tests.helpers.tiny import FAMILIES, FURTHER_FAMILIES, VOCABULARY, make_model, tiny_images, tiny_vit


def make(family, tiny_model, folder=None, implementation=None):
    """Module in eval mode and a batch; of a further family saved in `folder`."""
    if family == "vit":
        images = torch.utils.data.default_collate(tiny_images(3, 0))
        return tiny_vit().eval(), images
    if family in FURTHER_FAMILIES:
        make_model(family).save_pretrained(folder)
    module = CausalLM(str(folder) if family in FURTHER_FAMILIES else tiny_model(family), attn_implementation=implementation)
    module.configure_model()
    ids = torch.randint(2, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1))
    return module.eval(), {"input_ids": ids}


def calls_of(module, batch):
    """Arguments of every attention module, captured as the probe does: in eager form, blocks then run in their own."""
    blocks, calls = list(module.blocks.values()), []
    stream = BlockStream(blocks)
    with attention_form(module.model, "eager"):
        stream.capture(0, lambda: module.calibration_forward(batch))
    for index, block in enumerate(blocks):
        hook = module.attention(block).register_forward_pre_hook(lambda _, a, k: calls.append((a, k)), with_kwargs=True)
        with attention_form(block, "own"):
            stream.advance(0, index)
        hook.remove()
    return blocks, calls, stream.hidden(0)


FURTHER = ("gemma2", "gemma3_text", "bloom", "gpt2", "gpt_neox", "gptj", "mpt", "phi3")
CASES = [(family, None) for family in (*FAMILIES, "vit", *FURTHER)] + [("gemma2", "eager"), ("llama", "eager")]


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_both_forms_agree_and_probabilities_are_the_models_own(family, implementation, tiny_model, tmp_path):
    module, batch = make(family, tiny_model, tmp_path, implementation)
    outputs = []
    hooks = [module.attention(b).register_forward_hook(lambda _, a, out: outputs.append(out)) for b in module.blocks.values()]
    with torch.no_grad():
        module.calibration_forward(batch)  # as the model is loaded
        expected = [out[0] if isinstance(out, tuple) else out for out in outputs]
        probabilities = own_probabilities(module, batch)
    for hook in hooks:
        hook.remove()
    blocks, calls, _ = calls_of(module, batch)
    for block, call, output, own in zip(blocks, calls, expected, probabilities, strict=True):
        with torch.no_grad():
            own_form = run_attention(module.attention(block), *call)
            eager, probability = run_attention_eagerly(module.attention(block), *call)
        scale = output.abs().max().item()
        torch.testing.assert_close(own_form, output, rtol=1e-4, atol=1e-4 * scale)
        torch.testing.assert_close(eager, output, rtol=1e-4, atol=1e-4 * scale)
        torch.testing.assert_close(probability, own, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(probability.sum(-1), torch.ones(probability.shape[:-1]))


def own_probabilities(module, batch):
    """Of every block, by means that share nothing with ours: transformers returns them, timm's are computed by hand."""
    if "image" not in batch:
        before = module.model.config._attn_implementation
        module.model.set_attn_implementation("eager")
        result = module.model(input_ids=batch["input_ids"], use_cache=False, output_attentions=True).attentions
        module.model.set_attn_implementation(before)
        future = torch.ones(20, 20, dtype=torch.bool).triu(1)
        assert all((p[..., future] == 0).all() for p in result)
        return result
    seen = []
    hooks = [block.attn.qkv.register_forward_hook(lambda _, a, out: seen.append(out)) for block in module.model.blocks]
    module.model(batch["image"])
    for hook in hooks:
        hook.remove()
    result = []
    for qkv in seen:
        q, k, _ = (x.unflatten(-1, (4, 8)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
        result.append((q @ k.transpose(-1, -2) / 8**0.5).softmax(-1))
    return result


@pytest.mark.parametrize("family", ["opt", "llama", "vit"])
@pytest.mark.parametrize("form", ["eager", "own"])
def test_settings_are_put_back_also_after_an_error(family, form, tiny_model):
    module, _ = make(family, tiny_model)

    def settings():
        config = getattr(module.model, "config", None)
        return getattr(config, "_attn_implementation", None), [getattr(m, "fused_attn", None) for m in module.modules()]

    before = settings()
    with pytest.raises(KeyError), attention_form(module.model, form):
        raise KeyError
    assert settings() == before
    attention = module.attention(next(iter(module.blocks.values())))
    with pytest.raises(TypeError):
        run_attention_eagerly(attention, (), {"no such argument": 1})
    assert settings() == before


@pytest.mark.parametrize(
    ("family", "loaded", "used"),
    [
        ("llama", "eager", "eager"),
        ("llama", "sdpa", "sdpa"),
        ("llama", "flash_attention_2", "sdpa"),
        ("gemma2", "eager", "eager"),
        ("gemma2", "flash_attention_2", "eager"),
        ("gemma3_text", "flex_attention", "sdpa"),
    ],
)
def test_the_own_form_reads_explicit_masks(family, loaded, used):
    """Flash and flex attention would take the eager form's masks for something else; sdpa has no soft cap."""
    model = make_model(family)
    model.config._attn_implementation = loaded
    with attention_form(model, "own"):
        assert model.config._attn_implementation == used
    assert model.config._attn_implementation == loaded


def test_what_has_no_attention_is_refused():
    with pytest.raises(ValueError, match="Linear has no attention"), attention_form(nn.Linear(2, 2), "eager", required=True):
        pass
    with pytest.raises(RuntimeError, match="Linear was expected to compute one softmax"):
        run_attention_eagerly(nn.Linear(2, 2), (torch.ones(1, 2),), {})

    class Odd(nn.Module):
        fused_attn = True

        def forward(self, x):
            return x

    with pytest.raises(RuntimeError, match="Odd was expected to compute one softmax"):
        run_attention_eagerly(Odd(), (torch.ones(1),), {})

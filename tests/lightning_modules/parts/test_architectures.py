"""The table of names: every entry fits its models, wrong entries are refused with their name, fused linears have parts."""

from dataclasses import replace

import pytest
import torch
import transformers

from callbacks import BlockwisePruning, FixedRule
from datamodules import TextDataModule
from lightning_modules import CausalLM
from lightning_modules.parts.architectures import (
    ARCHITECTURES,
    LLAMA,
    SPLIT_BY_PROJECTION,
    VISION_TRANSFORMER,
    Architecture,
    find_architecture,
    find_blocks,
    find_linears,
)
from lightning_modules.parts.block_stream import BlockStream
from tests.helpers.tiny import FAMILIES, FURTHER_FAMILIES, VOCABULARY, make_model, quiet, tiny_vit

LANGUAGE_FAMILIES = [*FAMILIES, *FURTHER_FAMILIES]
TOKENS = torch.randint(2, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(7))


def prune(directory, data, folder, **arguments):
    """The module, pruned and saved in `folder`."""
    module = CausalLM(str(directory))
    quiet(folder, BlockwisePruning(sparsity=0.5, output_dir=str(folder / "pruned"), **arguments)).fit(module, data)
    return module.eval()


@pytest.fixture
def data(tiny_model, text_file):
    return TextDataModule(tiny_model("llama"), text_file, seq_len=20, num_calibration=4, num_heldout=2, batch_size=2)


def test_every_entry_is_tested():
    assert set(ARCHITECTURES) == {*LANGUAGE_FAMILIES, "deit", "vit", "vision_transformer"}
    assert all(find_architecture(family) is entry for family, entry in ARCHITECTURES.items())


@pytest.mark.parametrize("family", LANGUAGE_FAMILIES)
def test_blocks_run_one_by_one_equal_the_whole_model(family):
    """Window, mask and rotary embedding differ by block in some families."""
    model = make_model(family).eval()
    assert model.config.model_type == family
    blocks = list(find_blocks(model, ARCHITECTURES[family]).values())
    assert len(blocks) == 3
    entering, leaving = [], []
    hooks = [block.register_forward_pre_hook(lambda _, args: entering.append(args[0])) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(lambda _, args, out: leaving.append(out)))
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    last = leaving[0][0] if isinstance(leaving[0], tuple) else leaving[0]
    stream = BlockStream(blocks)
    stream.capture(0, lambda: model(input_ids=TOKENS, use_cache=False))
    for index, expected in enumerate([*entering, last]):
        torch.testing.assert_close(stream.hidden(0), expected, msg=f"after {index} blocks")
        if index < len(blocks):
            stream.advance(0, index)
    assert not torch.allclose(entering[0], last, atol=0.05)  # blocks that do nothing would agree as well


@pytest.mark.parametrize("family", LANGUAGE_FAMILIES)
def test_every_linear_of_a_language_model_is_pruned_and_transformers_reads_the_result(family, data, tmp_path):
    make_model(family).save_pretrained(tmp_path / "dense")
    pruned = prune(tmp_path / "dense", data, tmp_path)
    linears = {}
    for name, block in pruned.blocks.items():
        found = {path: child for path, child in block.named_modules() if isinstance(child, torch.nn.Linear)}
        assert set(found) == set(pruned.linears(block))
        linears |= {f"{name}.{path}.weight": child.weight for path, child in found.items()}
    assert all(2 * int((weight == 0).sum()) == weight.numel() for weight in linears.values())
    assert set(pruned.architecture.projections) == set("qkvo")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    assert {name for name, value in pruned.model.state_dict().items() if not torch.equal(value, dense[name])} == set(linears)
    attention = pruned.model.config._attn_implementation
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", attn_implementation=attention).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=TOKENS).logits, pruned(TOKENS))


@pytest.mark.parametrize("implementation", [None, "eager"])
def test_gemma2_is_pruned_in_its_own_form(implementation, data, tmp_path):
    """Its scores have a soft cap, which sdpa lacks."""
    make_model("gemma2").save_pretrained(tmp_path / "dense")
    module = CausalLM(str(tmp_path / "dense"), attn_implementation=implementation)
    callback = BlockwisePruning(sparsity=0.5, output_dir=str(tmp_path / "pruned"))
    quiet(tmp_path, callback).fit(module, data)
    assert module.model.config._attn_implementation == "eager"
    assert [record.sparsity for record in callback.records] == [0.5] * 3
    assert all(record.attention["relative_error"] > 0 for record in callback.records)


def test_sdpa_for_a_soft_cap_is_refused(tmp_path):
    make_model("gemma2").save_pretrained(tmp_path)
    module = CausalLM(str(tmp_path), attn_implementation="sdpa")
    with pytest.raises(ValueError, match=r"soft cap of the attention scores|Gemma2ForCausalLM does not support .*scaled_dot"):
        module.configure_model()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("model.decoder.layers", "LlamaForCausalLM are at 'model.decoder.layers', but .*decoder"),
        ("model.norm", "LlamaForCausalLM are at 'model.norm', but that is a LlamaRMSNorm, not a list of blocks"),
    ],
)
def test_a_wrong_path_of_blocks_is_named(path, message, data, tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(LLAMA, blocks=path))
    make_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=f"{message}.*Correct `blocks`"):
        prune(tmp_path / "dense", data, tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (replace(LLAMA, linears=("mlp.fc1",)), "LlamaDecoderLayer has no 'mlp.fc1'"),
        (replace(LLAMA, linears=("mlp.act_fn",)), "'mlp.act_fn' of LlamaDecoderLayer is a SiLU.*, not a plain nn.Linear"),
        (replace(LLAMA, projections={"q": "self_attn.query"}), "LlamaDecoderLayer's .* names self_attn.query, .* none of its"),
    ],
)
def test_a_wrong_name_of_a_linear_is_named(entry, message):
    with pytest.raises(ValueError, match=message):
        find_linears(make_model("llama").model.layers[0], entry)


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


GPT_NEOX = Architecture(
    blocks="gpt_neox.layers",
    linears=("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    projections={"o": "attention.dense"},
    attention="attention",
)
SPLIT_GPT_NEOX = replace(
    GPT_NEOX,
    projections={role: f"attention.query_key_value.{role}" for role in "qkv"} | {"o": "attention.dense"},
    fused={"attention.query_key_value": ("q", "k", "v")},
)


def make_gpt_neox():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=VOCABULARY, **sizes)).eval()


def roles_are_right(run, block, fused, output):
    """Whether a block's fused linear has the rows of q, k and v one after the other, by what its attention makes of them.

    Args:
        run: Runs the model.
        block: Its first block.
        fused: Path of the fused linear.
        output: Path of the output projection, which reads the attention's values.
    """
    linear, read, change = block.get_submodule(fused), [], {}
    size = linear.out_features // 3

    def alter(_, args, result):
        result = result.clone()
        for part, (tokens, value) in change.items():
            result[:, tokens, part * size : (part + 1) * size] = value
        return result

    hooks = [
        linear.register_forward_hook(alter),
        block.get_submodule(output).register_forward_pre_hook(lambda _, args: read.append(args[0])),
    ]
    for altered in ({}, {0: (2, 3.0)}, {1: (2, 3.0)}, {2: (slice(None), 0.0)}):
        change.clear()
        change.update(altered)
        with torch.no_grad():
            run()
    for hook in hooks:
        hook.remove()
    plain, q, k, v = read
    q_moves, k_moves = ((x - plain).abs().amax((0, 2)) > 1e-6 for x in (q, k))
    return q_moves.nonzero().tolist() == [[2]] and k_moves.sum() > 1 and not v.any()


def test_the_parts_of_fused_linears_are_what_the_attention_reads():
    """The query of a token decides about this token alone, its key about others, and without values nothing comes out."""
    vit = tiny_vit().model.eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert roles_are_right(lambda: vit(images), vit.blocks[0], "attn.qkv", "attn.proj")
    assert {family for family, entry in ARCHITECTURES.items() if entry.fused} == {"vision_transformer"} == SPLIT_BY_PROJECTION
    model = make_gpt_neox()
    block = model.gpt_neox.layers[0]
    fused, output = "attention.query_key_value", "attention.dense"
    assert not roles_are_right(lambda: model(TOKENS), block, fused, output)
    with torch.no_grad():  # the same attention, once its rows are sorted: the test sees order and nothing else
        by_head = torch.arange(96).view(4, 3, 8)
        inverse = by_head.transpose(0, 1).flatten()
        weight, bias = block.attention.query_key_value.weight, block.attention.query_key_value.bias
        expected = model(TOKENS).logits
        sorted_linear = torch.nn.Linear(32, 96)
        sorted_linear.weight.copy_(weight[inverse])
        sorted_linear.bias.copy_(bias[inverse])
        block.attention.query_key_value = torch.nn.Sequential(sorted_linear, Scatter(inverse))
        torch.testing.assert_close(model(TOKENS).logits, expected)
    assert roles_are_right(lambda: model(TOKENS), block, f"{fused}.0", output)


class Scatter(torch.nn.Module):
    """Puts features at the given places."""

    def __init__(self, places):
        super().__init__()
        self.places = places

    def forward(self, x):
        return torch.empty_like(x).index_copy_(-1, self.places, x)


def test_a_linear_fused_by_head_is_refused_in_parts_and_pruned_as_a_whole(data, tmp_path, monkeypatch):
    make_gpt_neox().save_pretrained(tmp_path / "dense")
    monkeypatch.setitem(ARCHITECTURES, "gpt_neox", SPLIT_GPT_NEOX)
    with pytest.raises(ValueError, match=r"`fused` of the entry 'gpt_neox' .* interleave them by head.*`held: none`"):
        prune(tmp_path / "dense", data, tmp_path)
    monkeypatch.setitem(ARCHITECTURES, "gpt_neox", GPT_NEOX)
    module = prune(tmp_path / "dense", data, tmp_path, update_rule=FixedRule("none"))
    weights = [linear.weight for block in module.blocks.values() for linear in module.linears(block).values()]
    assert len(weights) == 8 and all(2 * int((weight == 0).sum()) == weight.numel() for weight in weights)

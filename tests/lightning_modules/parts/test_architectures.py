"""The table of names: every entry fits its models, wrong entries are refused with their name, fused linears have parts."""

from dataclasses import replace

import pytest
import torch
import transformers

from callbacks import BlockwisePruning
from datamodules import TextDataModule
from lightning_modules import CausalLM
from lightning_modules.parts.architectures import (
    ARCHITECTURES,
    LLAMA,
    VISION_TRANSFORMER,
    PrunableLinear,
    find_architecture,
    find_blocks,
    find_linears,
    is_conv1d,
)
from lightning_modules.parts.block_stream import BlockStream
from lightning_modules.parts.fused import equal
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
        found = {path: child for path, child in block.named_modules() if isinstance(child, torch.nn.Linear) or is_conv1d(child)}
        assert set(found) == set(pruned.architecture.linears)
        assert {linear.module for linear in pruned.linears(block).values()} == set(found.values())
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
    wrong = replace(VISION_TRANSFORMER, fused={"attn.qkv": equal("a", "b", "c", "d", "e")})
    with pytest.raises(ValueError, match=r"'attn.qkv' of Block: 96 rows do not fall into 5 equal parts, as its entry"):
        find_linears(block, wrong)


ROWS = {
    "gpt2": [*range(32)],
    "mpt": [*range(32)],
    "phi3": [*range(32)],
    "gpt_neox": [24 * head + i for head in range(4) for i in range(8)],
    "bloom": [24 * head + i for head in range(4) for i in range(8)],
    "falcon": [32 * group + i for group in range(2) for i in range(16)],
}
"""Family -> rows of q in its fused linear, by hand: four heads of 8, in Falcon in two groups with one k and one v each."""


@pytest.mark.parametrize("family", ROWS)
def test_rows_of_q(family):
    model = make_model(family)
    block = next(iter(find_blocks(model, ARCHITECTURES[family]).values()))
    linears = find_linears(block, ARCHITECTURES[family], model.config)
    q = linears[ARCHITECTURES[family].projections["q"]]
    outputs = torch.arange(PrunableLinear(q.module).out_features)
    assert outputs[q.rows].tolist() == ROWS[family]
    parts = [linear for linear in linears.values() if linear.module is q.module]
    assert sorted(row for part in parts for row in outputs[part.rows].tolist()) == outputs.tolist()


@pytest.mark.parametrize("config", [{"multi_query": True}, {"multi_query": False, "alibi": True}], ids=str)
def test_earlier_forms_of_falcon(config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    model = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, new_decoder_architecture=False, **config)).eval()
    linears = find_linears(model.transformer.h[0], ARCHITECTURES["falcon"], model.config)
    assert roles_are_right(lambda: model(TOKENS), linears, ARCHITECTURES["falcon"])


def roles_are_right(run, linears, architecture):
    """Whether the rows of q, k and v are those that attention reads as such.

    The query of a token decides about this token alone, its key about others, and without values nothing comes out.

    Args:
        run: Runs the model.
        linears: Linears of its first block.
        architecture: Its family.
    """
    read, change = [], {}
    roles = {role: linears[name] for role, name in architecture.projections.items()}

    def alter(linear):
        def hook(_, args, result):
            if change.get("role") is linear:
                result = result.clone()
                altered = result[:, change["tokens"]]
                altered[..., linear.rows] = change["value"]
                result[:, change["tokens"]] = altered
                return result

        return hook

    hooks = [roles[role].module.register_forward_hook(alter(roles[role])) for role in "qkv"]
    hooks.append(roles["o"].module.register_forward_pre_hook(lambda _, args: read.append(args[0])))
    for role, tokens, value in ((None, None, None), ("q", [2], 3.0), ("k", [2], 3.0), ("v", slice(None), 0.0)):
        change.update(role=roles.get(role), tokens=tokens, value=value)
        with torch.no_grad():
            run()
    for hook in hooks:
        hook.remove()
    plain, q, k, v = read[:: len(read) // 4]  # of the first block
    q_moves, k_moves = ((x - plain).reshape(3, -1, 32).abs().amax((0, 2)) > 1e-6 for x in (q, k))
    return q_moves.nonzero().tolist() == [[2]] and k_moves.sum() > 1 and not v.any()


@pytest.mark.parametrize("family", [family for family in LANGUAGE_FAMILIES if ARCHITECTURES[family].fused])
def test_the_parts_of_fused_linears_are_what_the_attention_reads(family):
    architecture, model = ARCHITECTURES[family], make_model(family).eval()
    block = next(iter(find_blocks(model, architecture).values()))
    linears = find_linears(block, architecture, model.config)
    del model.get_submodule(architecture.blocks)[1:]
    model.config.num_hidden_layers = 1
    assert roles_are_right(lambda: model(input_ids=TOKENS, use_cache=False), linears, architecture)
    swapped = linears | {
        architecture.projections["q"]: linears[architecture.projections["k"]],
        architecture.projections["k"]: linears[architecture.projections["q"]],
    }
    assert not roles_are_right(lambda: model(input_ids=TOKENS, use_cache=False), swapped, architecture)


def test_the_parts_of_a_vision_transformer_are_what_the_attention_reads():
    module = tiny_vit()
    vit = module.model.eval()
    del vit.blocks[1:]
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert roles_are_right(lambda: vit(images), module.linears(vit.blocks[0]), VISION_TRANSFORMER)


@pytest.mark.parametrize("family", ["gpt_neox", "falcon", "gpt2"])
def test_parts_whose_rows_do_not_lie_together_are_written_in_place(family):
    model = make_model(family)
    block = next(iter(find_blocks(model, ARCHITECTURES[family]).values()))
    linears = find_linears(block, ARCHITECTURES[family], model.config)
    k = linears[ARCHITECTURES[family].projections["k"]]
    before = {name: linear.weight.clone() for name, linear in linears.items()}
    new = torch.randn_like(k.weight)
    k.assign(new)
    assert torch.equal(k.weight, new)
    mask = torch.rand_like(new) < 0.5
    k.clear(mask)
    assert torch.equal(k.weight, new.masked_fill(mask, 0))
    assert all(torch.equal(linear.weight, before[name]) for name, linear in linears.items() if linear is not k)

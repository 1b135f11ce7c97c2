"""Discovery: it finds what the table says, further families are pruned, others are refused with reasons."""

import json

import pytest
import torch
import transformers
from torch import nn

from callbacks import BlockwisePruning
from datamodules import TextDataModule
from lightning_modules import CausalLM
from lightning_modules.parts.architectures import ARCHITECTURES
from lightning_modules.parts.discovery import discover
from tests.helpers.tiny import FAMILIES, FURTHER_FAMILIES, MIXTURES, VOCABULARY, make_mixture, make_model, quiet

TOKENS = torch.randint(2, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(7))
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
MLA = {"first_k_dense_replace": 3, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "num_local_experts": 0, "shared_intermediate_size": 48}
WITHOUT_ENTRY = {
    "olmo": {},
    "gpt_neo": {"num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local", "global"], 1]], "window_size": 8},
    "deepseek_v3": MLA | {"v_head_dim": 8, "num_key_value_heads": 4, "head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_ff_dim": 48},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention", "mamba"]},
    "mamba": {"state_size": 4},
    "gpt_bigcode": {},
}
"""Family without an entry -> what its configuration needs: ordinary ones, latent attention, hybrids with convolutions or state
spaces, a state space model, and queries fused with a single key and value."""


def model_of(family):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[family](**SIZES | WITHOUT_ENTRY[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model.eval()


def found_in(model):
    with torch.no_grad():
        return discover(model, lambda: model(input_ids=TOKENS[:1], use_cache=False).logits, "unknown")


@pytest.mark.parametrize("family", [*FAMILIES, *FURTHER_FAMILIES])
def test_what_the_table_says_is_found_without_it(family):
    """Fused linears are found whole, since the order of their rows cannot be seen."""
    entry = ARCHITECTURES[family]
    found = found_in(make_model(family).eval())
    assert (found.architecture.blocks, set(found.architecture.linears)) == (entry.blocks, set(entry.linears))
    assert not found.left_dense
    if set("qkv") & {role for role, name in entry.projections.items() if name in entry.linears}:
        assert (found.architecture.projections, found.architecture.attention) == (entry.projections, entry.attention)
    else:
        assert not found.architecture.projections


@pytest.mark.parametrize("family", WITHOUT_ENTRY)
def test_a_family_without_an_entry_is_pruned(family, tiny_model, text_file, tmp_path):
    """Every linear that is named is pruned, nothing else changes, and transformers reads the result."""
    model_of(family).save_pretrained(tmp_path / "dense")
    data = TextDataModule(tiny_model("llama"), text_file, seq_len=20, num_calibration=8, num_heldout=2, batch_size=2)
    module = CausalLM(str(tmp_path / "dense"))
    solver = {"solver": "joint"} if family == "lfm2" else {}
    callback = BlockwisePruning(sparsity=0.5, method="d2_sparsegpt", output_dir=str(tmp_path / "pruned"), **solver)
    quiet(tmp_path, callback).fit(module, data)
    module.eval()
    linears = {
        f"{name}.{path}.weight": linear.weight
        for name, block in module.blocks.items()
        for path, linear in module.linears(block).items()
    }
    assert len(linears) >= 9 and all(2 * int((weight == 0).sum()) == weight.numel() for weight in linears.values())
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    assert {name for name, value in module.model.state_dict().items() if not torch.equal(value, dense[name])} == set(linears)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=TOKENS).logits, module(TOKENS))
    report = json.loads((tmp_path / "pruned" / "pruning.json").read_text(encoding="utf-8"))
    assert f"3 blocks at {module.architecture.blocks}" in json.dumps(report)


@pytest.mark.parametrize("family", ["olmo", "gpt_neo"])
def test_update_rules_work_where_roles_are_found(family, tiny_model, text_file, tmp_path):
    model_of(family).save_pretrained(tmp_path / "dense")
    data = TextDataModule(tiny_model("llama"), text_file, seq_len=20, num_calibration=4, num_heldout=2, batch_size=2)
    callback = BlockwisePruning(sparsity=0.5, output_dir=str(tmp_path / "pruned"))
    quiet(tmp_path, callback).fit(CausalLM(str(tmp_path / "dense")), data)
    assert all(set(record.update_shares) == set("qkv") for record in callback.records)


def test_a_rule_without_roles_is_refused(tiny_model, text_file, tmp_path):
    model_of("mamba").save_pretrained(tmp_path / "dense")
    data = TextDataModule(tiny_model("llama"), text_file, seq_len=20, num_calibration=4, num_heldout=2, batch_size=2)
    callback = BlockwisePruning(sparsity=0.5, output_dir=str(tmp_path / "pruned"))
    with pytest.raises(ValueError, match=r"`update_rule` = .*this model has no projection q, k, v, only none. Use FixedRule"):
        quiet(tmp_path, callback).fit(CausalLM(str(tmp_path / "dense")), data)


def test_linears_that_are_not_used_as_such_stay_dense():
    """Mamba reads the weight of dt_proj without calling it."""
    found = found_in(model_of("mamba"))
    assert found.left_dense == {"mixer.dt_proj": "is not called"} and "mixer.dt_proj" not in found.architecture.linears
    assert "left dense: mixer.dt_proj (is not called)" in found.summary(3)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_found(family):
    found = found_in(make_mixture(family)).architecture
    assert found.experts == ("block_sparse_moe.experts" if family == "granitemoe" else "mlp.experts",)
    assert bool(found.projections) == (family != "deepseek_v3")


def test_experts_that_are_kept_in_another_way_are_refused(monkeypatch):
    """As modules of a list, or as parameters of a layer that nothing is known of."""
    model = make_mixture("mixtral")
    monkeypatch.setattr("lightning_modules.parts.discovery.is_experts", lambda module: False)
    with pytest.raises(
        ValueError, match=r"'unknown' is not in ARCHITECTURES.*mixture of experts.*mlp.experts: a MixtralExperts"
    ):
        found_in(model)


class Toy(nn.Module):
    """A language model whose blocks need not be a chain."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(0 if kind == "none" else 3)])
        self.kind = kind

    def logits(self):
        h = self.embedding(TOKENS[:1])
        for block in reversed(self.blocks) if self.kind == "backwards" else self.blocks:
            h = h + block(h) if self.kind in ("outside", "unused") else block(h)
        return self.head(self.embedding(TOKENS[:1]) if self.kind == "unused" else h)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("none", "it has no list of blocks"),
        (
            "backwards",
            r"'blocks' \(3 x Linear\) was taken for its blocks, but The model called block 2 where block 0 was expected",
        ),
        ("outside", "run one by one they change the logits by up to"),
        ("unused", "the logits do not depend on what the last one returns"),
    ],
)
def test_what_is_no_chain_is_refused(kind, reason):
    model = Toy(kind)
    with pytest.raises(ValueError, match=rf"could not be discovered: .*{reason}.*Add an entry to"), torch.no_grad():
        discover(model, model.logits, "toy")
    assert not any(block._forward_hooks for block in model.blocks)


def test_a_chain_of_bare_linears_is_found():
    model = Toy("chain")
    with torch.no_grad():
        found = discover(model, model.logits, "toy")
    assert found.architecture.blocks == "blocks" and found.architecture.linears == ("",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_are_found_in_half_precision(family, dtype):
    """Rounding decides which experts nearly tying tokens go to; experts one by one are compared on the same inputs."""
    assert found_in(make_mixture(family).to(dtype)).architecture.experts


def test_mixtures_of_another_kind_are_refused():
    """JetMoE sorts tokens by experts before it multiplies them."""
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 2}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = transformers.JetMoeForCausalLM(transformers.JetMoeConfig(**sizes | options)).eval()
    with pytest.raises(ValueError, match=r"mixture of experts whose tokens go to some of them only \(.*can be pruned"):
        found_in(model)

"""Mixtures of experts: every expert's linears, tokens that reach each, tokens that are borrowed, and memory."""

import json

import pytest
import torch
import transformers
from lightning.pytorch import seed_everything
from safetensors.torch import load_file

from callbacks import BlockwisePruning
from callbacks.blockwise.stages import stages_of
from datamodules import TextDataModule
from functional.pruning import InputStatistics, OutputStatistics, prune_linears
from lightning_modules import CausalLM
from lightning_modules.parts.architectures import PrunableLinear
from lightning_modules.parts.block_stream import BlockStream
from lightning_modules.parts.experts import experts_of, matrices_of
from tests.helpers.tiny import MIXTURES, make_mixture, quiet

JOINT = {"method": "d2_sparsegpt", "solver": "joint"}
PLAIN = {"method": "sparsegpt"}


def data_of(tiny_model, text, **options):
    options = {"seq_len": 20, "num_calibration": 24, "num_heldout": 2, "batch_size": 6} | options
    return TextDataModule(tiny_model("llama"), str(text), **options)


def prune(model, data, folder, **settings):
    seed_everything(0, verbose=False)
    callback = BlockwisePruning(**{"sparsity": 0.5} | settings, output_dir=str(folder))
    module = CausalLM(str(model))
    quiet(folder.parent, callback, max_epochs=None).fit(module, data)
    return module.eval(), callback


@pytest.mark.parametrize("settings", [JOINT, PLAIN], ids=["joint", "plain"])
@pytest.mark.parametrize("family", MIXTURES)
def test_every_expert_is_pruned_and_nothing_else(family, settings, tiny_model, text_file, tmp_path):
    dense = make_mixture(family)
    dense.save_pretrained(tmp_path / "dense")
    module, callback = prune(tmp_path / "dense", data_of(tiny_model, text_file), tmp_path / "pruned", **settings)
    linears = {
        f"{name}.{path}": linear for name, block in module.blocks.items() for path, linear in module.linears(block).items()
    }
    assert all(2 * int((linear.weight == 0).sum()) == linear.weight.numel() for linear in linears.values())
    assert sum(linear.is_routed for linear in linears.values()) >= 24
    changed = {
        name
        for (name, value), other in zip(module.model.state_dict().items(), dense.state_dict().values(), strict=True)
        if not torch.equal(value, other)
    }
    parameters = {id(linear.parameter) for linear in linears.values()}
    assert changed == {name for name, value in module.model.named_parameters() if id(value) in parameters}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    ids = torch.arange(2, 42).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, module(ids))
    report = json.loads((tmp_path / "pruned" / "pruning.json").read_text(encoding="utf-8"))
    block = report["blocks"][-1]
    chosen = 2 * 24 * 20  # two experts a token
    assert sum(block["expert_tokens"]) == chosen and callback.records[-1].expert_tokens == block["expert_tokens"]
    scalars = callback.records[-1].scalars()
    assert scalars["experts/most_tokens"] == max(block["expert_tokens"])
    assert scalars["experts/borrowing_linears"] == len(block["borrowed_tokens"])


def test_same_as_statistics_that_are_gathered_by_hand(tiny_model, text_file, tmp_path):
    """Of the first block, in one pass: tokens that are routed to an expert, and all others where these are too few."""
    dense = make_mixture("qwen3_moe")
    dense.save_pretrained(tmp_path / "dense")
    data = data_of(tiny_model, text_file, num_calibration=9, batch_size=2)
    module, callback = prune(tmp_path / "dense", data, tmp_path / "pruned", **PLAIN)
    experts, seen = next(iter(experts_of(dense.model.layers[0]).values())), []
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    with torch.no_grad():
        for batch in data.train_dataloader():
            dense(input_ids=batch["input_ids"], use_cache=False)
    handle.remove()
    record, borrowing = callback.records[0], 0
    for expert in range(6):
        gate_up, down = experts.gate_up_proj[expert].detach(), experts.down_proj[expert].detach()
        x = torch.cat([hidden for hidden, _ in seen])
        routed = torch.cat([(chosen == expert).any(1) for _, chosen in seen]).float()
        assert record.expert_tokens[expert] == int(routed.sum())
        gate, up = (x @ gate_up.T).chunk(2, dim=1)
        inner = torch.nn.functional.silu(gate) * up
        for name, weights, inputs in (("gate_up_proj.gate", gate_up[:24], x), ("down_proj", down, inner)):
            lacking = max(2 * inputs.shape[1] - int(routed.sum()), 0)
            name = f"mlp.experts.{expert}.{name}"
            assert record.borrowed_tokens.get(name, 0) == min(lacking, len(x))
            borrowing += bool(lacking)
            weighted = inputs * (routed + min(lacking / len(x), 1)).sqrt()[:, None]
            statistics = InputStatistics(inputs.shape[1]).update(weighted.view(9, 20, -1), 0)
            outputs = OutputStatistics(len(weights)).update((weighted @ weights.T).view(9, 20, -1), 0)
            (expected,) = prune_linears([weights], statistics, [outputs], method="sparsegpt", sparsity=0.5)
            found = module.linears(module.model.model.layers[0])[name].weight
            assert ((found != 0) == (expected.weight != 0)).double().mean() > 0.99, name
            assert (found - expected.weight).norm() <= 0.02 * expected.weight.norm(), name
    assert 2 <= borrowing <= 10


def test_an_expert_without_any_token(tiny_model, text_file, tmp_path):
    """It is pruned by the tokens of its layer; with one sample in a batch many batches bring it none either."""
    model = make_mixture("deepseek_v3")
    model.model.layers[1].mlp.gate.e_score_correction_bias[:] = torch.tensor([0.0, 0, 0, 0, 0, 0, 0, -9])
    model.save_pretrained(tmp_path / "dense")
    data = data_of(tiny_model, text_file, batch_size=1)
    module, callback = prune(tmp_path / "dense", data, tmp_path / "pruned", **JOINT)
    record = callback.records[1]
    assert record.expert_tokens[7] == 0
    assert record.borrowed_tokens["mlp.experts.7.gate_up_proj.up"] == 64 and "mlp.experts.7.down_proj" in record.borrowed_tokens
    linears = module.linears(module.model.model.layers[1])
    assert all(2 * int((linear.weight == 0).sum()) == linear.weight.numel() for linear in linears.values())
    assert not any(matrix.borrowed for pair in matrices_of(module.model.model.layers[1].mlp.experts) for matrix in pair)


@pytest.mark.parametrize("settings", [JOINT, PLAIN], ids=["joint", "plain"])
def test_groups_of_experts_give_the_same_bits(settings, tiny_model, text_file, tmp_path, monkeypatch):
    """Where memory holds the sums of one expert only, the block is run once for each."""
    make_mixture("olmoe").save_pretrained(tmp_path / "dense")
    prune(tmp_path / "dense", data_of(tiny_model, text_file), tmp_path / "first", **settings)
    monkeypatch.setattr("callbacks.blockwise.experts.room", lambda device: 0)
    prune(tmp_path / "dense", data_of(tiny_model, text_file), tmp_path / "second", **settings)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(second[name], value) for name, value in first.items())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_outputs_of_a_block_are_nearer_to_the_dense_model_than_with_magnitudes(family, tiny_model, text_file, tmp_path):
    """On held-out windows: at most 0.8 of the error of magnitude pruning."""
    dense = make_mixture(family)
    dense.save_pretrained(tmp_path / "dense")
    data, errors = data_of(tiny_model, text_file, num_calibration=60, num_heldout=10), {}
    for name, settings in (("joint", JOINT), ("magnitude", {"method": "magnitude"})):
        module, _ = prune(tmp_path / "dense", data, tmp_path / name, **settings)
        ids = torch.cat([batch["input_ids"] for batch in data.val_dataloader()])
        with torch.no_grad():
            wanted, found = (m(input_ids=ids, output_hidden_states=True).hidden_states[1] for m in (dense, module.model))
        errors[name] = float((found - wanted).norm() / wanted.norm())
    assert errors["joint"] <= 0.8 * errors["magnitude"], errors


def test_allocations_and_patterns(tiny_model, text_file, tmp_path):
    make_mixture("mixtral").save_pretrained(tmp_path / "dense")
    data = data_of(tiny_model, text_file)
    for name, settings in {
        "owl": {"allocation": "owl", "method": "wanda"},
        "error": {"allocation": "error", **JOINT},
        "2:4": {"pattern": "2:4", "sparsity": None, **JOINT},
    }.items():
        module, callback = prune(tmp_path / "dense", data, tmp_path / name.replace(":", "_"), **settings)
        assert sum(record.sparsity for record in callback.records) / 2 == pytest.approx(0.5, abs=0.01), name
    groups = module.model.model.layers[0].mlp.experts.down_proj.unflatten(-1, (-1, 4))
    assert torch.equal((groups != 0).sum(-1), torch.full_like(groups[..., 0], 2, dtype=torch.int64))


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_stages_of_experts_where_no_trace_fits(family, tiny_model, text_file, tmp_path, monkeypatch):
    """The dense model then leaves within the layer of experts; the weights are the same."""
    make_mixture(family).save_pretrained(tmp_path / "dense")
    prune(tmp_path / "dense", data_of(tiny_model, text_file), tmp_path / "first", **JOINT)
    monkeypatch.setattr("callbacks.blockwise.calibration.has_spare", lambda num_bytes, device: False)
    prune(tmp_path / "dense", data_of(tiny_model, text_file), tmp_path / "second", **JOINT)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(second[name], value) for name, value in first.items())


@pytest.mark.parametrize(
    "settings",
    [{"stages": False, "ignore": ["*gate_up*"]}, {"ignore": ["model.layers.0.self_attn*", "model.layers.0.*gate_up*"]}],
    ids=["one pass", "first block"],
)
def test_blocks_in_which_nothing_is_measured_against_the_dense_model(settings, tiny_model, text_file, tmp_path):
    make_mixture("qwen3_moe").save_pretrained(tmp_path / "dense")
    _, callback = prune(tmp_path / "dense", data_of(tiny_model, text_file), tmp_path / "pruned", **JOINT, **settings)
    assert all(record.sparsity == 0.5 for record in callback.records)


def test_shared_experts_are_part_of_what_their_layer_adds(tiny_model, text_file):
    """Attention and the whole layer are what is added; sums within it would count twice."""
    model = make_mixture("deepseek_v3")
    module = CausalLM(model)
    stream = BlockStream(list(module.blocks.values()))
    stream.capture(0, lambda: model(torch.arange(2, 42).view(2, 20), use_cache=False))
    stream.advance(0, 0)
    block = stream.blocks[1]
    linears = module.linears(block)
    layers = {name: PrunableLinear(block.get_submodule(name)) for name in ("mlp", "mlp.experts")}
    with torch.no_grad():
        found = stages_of(block, stream.hidden(0), lambda: stream.run(0, 1), linears | layers, linears)
    assert found.writers == {"self_attn.o_proj": 1.0, "mlp": 1.0}
    assert [len(names) for names in found.names if ".experts." in names[0]] == [16, 8]


def test_lambda_weighs_alike_with_and_without_borrowing(tiny_model, text_file, tmp_path, monkeypatch):
    """With hardly any weight on borrowed tokens the masks are those without any."""
    make_mixture("qwen3_moe").save_pretrained(tmp_path / "dense")
    data, masks = data_of(tiny_model, text_file), []
    for enough in (0, 5):
        monkeypatch.setattr("callbacks.blockwise.experts.ENOUGH", enough)
        monkeypatch.setattr("callbacks.blockwise.experts.MOST_BORROWED", 1e-7)
        module, callback = prune(tmp_path / "dense", data, tmp_path / str(enough), **JOINT, ignore=["model.layers.1.*"])
        assert bool(callback.records[0].borrowed_tokens) == bool(enough)
        masks.append(module.model.model.layers[0].mlp.experts.gate_up_proj != 0)
    assert (masks[0] == masks[1]).double().mean() > 0.999

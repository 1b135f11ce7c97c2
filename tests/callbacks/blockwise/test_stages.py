"""Stages and writers of a block, and whole runs against statistics that are collected by running whole models."""

import copy

import pytest
import torch
from lightning.pytorch import seed_everything
from safetensors.torch import load_file
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from callbacks import BlockwisePruning, Score
from callbacks.blockwise.block import BlockStep
from callbacks.blockwise.calibration import CalibrationStream
from callbacks.blockwise.stages import Trace, difference, leaving_after, stages_of, tracing, weights_in_place
from datamodules import TextDataModule
from functional.pruning import InputStatistics, OutputStatistics, Perturbation, prune_linears
from lightning_modules import CausalLM
from lightning_modules.parts.architectures import PrunableLinear
from lightning_modules.parts.block_stream import BlockStream
from tests.helpers.tiny import quiet, tiny_images, tiny_vit

STAGES = {
    "llama": (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
              ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]),
    "opt": (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.out_proj"], ["fc1"], ["fc2"]),
    # Attention and MLP read the same norm:
    "stablelm": (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"],
                 ["self_attn.o_proj"], ["mlp.down_proj"]),
}  # fmt: skip


class Toy(nn.Module):
    """h + factor · down(relu(up(h))), or its norm, with linears that a test may call too often."""

    def __init__(self, factor=1.0, norm=False, twice=False):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.other = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)
        self.factor, self.norm, self.twice = factor, nn.LayerNorm(8) if norm else nn.Identity(), twice

    def forward(self, hidden):
        found = self.down(torch.relu(self.up(hidden) + self.other(hidden).mean()))
        found = self.down(torch.relu(self.up(hidden + found))) if self.twice else found
        return self.norm(hidden + self.factor * found)

    def linears(self):
        return {name: PrunableLinear(module) for name, module in self.named_children() if isinstance(module, nn.Linear)}


def found_in(block, hidden, linears, pruned=None):
    return stages_of(block, hidden, lambda: block(hidden), linears, linears if pruned is None else pruned)


@pytest.mark.parametrize("family", STAGES)
def test_stages_of_language_models(family, tiny_model):
    module = CausalLM(tiny_model(family))
    module.configure_model()
    module.model.eval()
    stream = BlockStream(list(module.blocks.values()))
    stream.capture(0, lambda: module.model(torch.arange(2, 26).view(2, 12)))
    linears = module.linears(next(iter(module.blocks.values())))
    with torch.no_grad():
        found = stages_of(stream.blocks[0], stream.hidden(0), lambda: stream.run(0, 0), linears, linears)
    assert found.names == list(STAGES[family])
    assert found.writers == {STAGES[family][-3 if family != "stablelm" else -2][0]: 1.0, STAGES[family][-1][0]: 1.0}


def test_stages_of_a_vision_transformer():
    module, images = tiny_vit(), torch.stack([sample["image"] for sample in tiny_images(4, 0)])
    stream = BlockStream(list(module.blocks.values()))
    stream.capture(0, lambda: module.model.eval()(images))
    linears = module.linears(next(iter(module.blocks.values())))
    found = stages_of(stream.blocks[0], stream.hidden(0), lambda: stream.run(0, 0), linears, linears)
    assert found.names == [["attn.qkv.q", "attn.qkv.k", "attn.qkv.v"], ["attn.proj"], ["mlp.fc1"], ["mlp.fc2"]]
    assert found.writers == {"attn.proj": 1.0, "mlp.fc2": 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 0.22, -0.5])
def test_factor_of_what_is_added(factor, dtype):
    block, hidden = Toy(factor).to(dtype), torch.randn(2, 300, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = found_in(block, hidden, block.linears())
    assert found.names == [["up", "other"], ["down"]] and list(found.writers) == ["down"]
    assert found.writers["down"] == pytest.approx(factor, rel=0.02 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("block", [Toy(norm=True), Toy(factor=0.0)], ids=["norm", "nothing is added"])
def test_no_writers(block):
    hidden = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(1))
    assert found_in(block, hidden, block.linears()).writers == {}


def test_only_pruned_linears_make_stages():
    block, hidden = Toy(), torch.randn(2, 20, 8)
    found = found_in(block, hidden, block.linears(), pruned=["up"])
    assert found.names == [["up"]] and found.writers == {"down": 1.0}


def test_linears_that_are_not_called_once():
    hidden = torch.randn(1, 4, 8)
    with pytest.raises(RuntimeError, match="'up' is called more than once"):
        block = Toy(twice=True)
        found_in(block, hidden, block.linears())
    spare = {"spare": PrunableLinear(nn.Linear(8, 8))}
    with pytest.raises(RuntimeError, match="'spare' was never called"):
        block = Toy()
        found_in(block, hidden, block.linears() | spare)


class Mixed(nn.Module):
    """h + down(relu(up(h + Σ mix(…)))), in which mix is called some times; its last outputs may be added to h as well."""

    def __init__(self, calls, adds):
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.calls, self.adds = calls, adds

    def forward(self, hidden):
        mixed = hidden
        for _ in range(self.calls):
            mixed = self.mix(mixed)
        return hidden + self.down(torch.relu(self.up(hidden + mixed))) + (mixed if self.adds else 0)


@pytest.mark.parametrize("calls", [2, 3])
def test_ignored_linears_that_are_called_twice(calls):
    """They are no candidates; where they write, the others' outputs are not all that is added."""
    hidden = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(1))
    for adds, writers in ((False, {"down": 1.0}), (True, {})):
        block = Mixed(calls, adds)
        linears = {name: PrunableLinear(module) for name, module in block.named_children()}
        found = found_in(block, hidden, linears, pruned=["up", "down"])
        assert found.names == [["up"], ["down"]] and found.writers == writers
        with pytest.raises(RuntimeError, match="'mix' is called more than once"):
            found_in(block, hidden, linears)
    once = Mixed(1, adds=True)
    linears = {name: PrunableLinear(module) for name, module in once.named_children()}
    assert found_in(once, hidden, linears, pruned=["up", "down"]).writers == {"mix": 1.0, "down": 1.0}


def test_leaves_after_the_last_of_a_stage():
    block, called = Toy(), []
    block.down.register_forward_hook(lambda *_: called.append("down"))
    linears = block.linears()
    with leaving_after([linears["up"], linears["other"]]):
        block(torch.randn(1, 4, 8))
        called.append("not left")
    assert not called and not any(module._forward_hooks for module in (block.up, block.other))


def test_weights_come_back_after_an_error():
    block = Toy()
    own, other = block.up.weight.data, torch.zeros(16, 8)
    with pytest.raises(KeyError), weights_in_place({block.up.weight: other}):
        assert block.up.weight.data is other or torch.equal(block.up.weight, other)
        raise KeyError
    assert torch.equal(block.up.weight, own) and block.up.weight.data_ptr() == own.data_ptr()


@pytest.mark.parametrize("writer", ["other", "down"])
def test_difference_is_that_of_the_hidden_states_after_a_writer(writer):
    """As if the block added the outputs of `other` to its hidden states first."""
    block, hidden = Toy(0.5), torch.randn(2, 5, 8)
    dense, own = Trace(hidden + 1, {"other": 1.0, "down": 0.5}), Trace(hidden, {"other": 1.0, "down": 0.5})
    after = []
    for trace, x in ((dense, hidden + 1), (own, hidden)):
        with tracing(trace, block.linears(), outputs=["other", "down"]):
            after.append(block(x))
    others = block.other(hidden + 1) - block.other(hidden)
    expected = others + (after[0] - after[1] if writer == "down" else 1)
    assert torch.allclose(difference(dense.sum_up_to(writer), own.sum_up_to(writer)), expected, atol=1e-6)


def data_of(model, text, **options):
    options = {"seq_len": 24, "num_calibration": 48, "num_heldout": 2, "batch_size": 12} | options
    return TextDataModule(model, source=str(text), **options)


def prune(model, text, folder, batch_size=12, **settings):
    seed_everything(0, verbose=False)
    callback = BlockwisePruning(output_dir=str(folder), **settings)
    module = CausalLM(model)
    quiet(folder, callback, max_epochs=None).fit(module, data_of(model, text, batch_size=batch_size))
    return load_file(folder / "model.safetensors"), callback


@torch.no_grad()
def by_whole_models(model, text, share, sparsity):
    """Prune stage by stage with statistics from hooks on the whole dense and the whole pruned model; no stream of blocks."""
    data = data_of(model, text)
    seed_everything(0, verbose=False)
    data.prepare_data()
    data.setup("fit")
    ids = torch.cat([batch["input_ids"] for batch in data.train_dataloader()])
    module = CausalLM(model)
    module.configure_model()
    dense, pruned = copy.deepcopy(module.model).eval(), module.model.eval()

    def seen(network, layer, name, norm):
        found = {}
        block = network.model.layers[layer]
        linear = block.get_submodule(name)
        handles = [
            linear.register_forward_hook(lambda m, args, y: found.update(x=args[0], y=y)),
            block.register_forward_pre_hook(lambda m, args: found.update(before=args[0])),
            block.post_attention_layernorm.register_forward_pre_hook(lambda m, args: found.update(between=args[0])),
        ]
        network(ids)
        for handle in handles:
            handle.remove()
        return found["x"], found["y"], found["between" if norm else "before"]

    for layer in range(len(pruned.model.layers)):
        for stage in STAGES["llama"]:
            writes = stage[0] in ("self_attn.o_proj", "mlp.down_proj")
            runs = [seen(network, layer, stage[0], stage[0] == "mlp.down_proj") for network in (dense, pruned)]
            (x_dense, y_dense, h_dense), (x, y, h) = runs
            inputs = InputStatistics(x.shape[-1]).update(x, 0)
            perturbation = Perturbation(x.shape[-1], h.shape[-1] if writes else 0)
            perturbation.update(x, (h_dense + y_dense) - (h + y) if writes else x_dense - x)
            linears = [pruned.model.layers[layer].get_submodule(name) for name in stage]
            outputs = [OutputStatistics(len(linear.weight)).update(linear(x), 0) for linear in linears]
            results = prune_linears(
                [linear.weight for linear in linears], inputs, outputs, sparsity=sparsity, solver="joint", lambda1=30.0,
                perturbation=perturbation if share else None, dense_share=share,
            )  # fmt: skip
            for linear, result in zip(linears, results, strict=True):
                linear.weight.copy_(result.weight)
    return pruned.state_dict()


@pytest.mark.parametrize("share", [0.35, 0.0])
def test_same_as_statistics_of_whole_models(share, tiny_model, text_file, tmp_path):
    model = tiny_model("llama")
    settings = {"target": share} if share else {"target": "pruned"}
    found, callback = prune(model, text_file, tmp_path, sparsity=0.5, method="d2_sparsegpt", solver="joint", **settings)
    expected = by_whole_models(model, text_file, share, 0.5)
    for name in (
        f"model.{n}.weight" for layer in range(3) for s in STAGES["llama"] for n in (f"layers.{layer}.{x}" for x in s)
    ):
        alike = ((found[name] != 0) == (expected[name] != 0)).double().mean()
        assert alike > (0.98 if "layers.0" in name else 0.9), name  # rounding grows from block to block
        if alike == 1:
            assert (found[name] - expected[name]).norm() <= (1e-3 if "layers.0" in name else 0.1) * expected[name].norm(), name
    assert callback.settings.as_dict()["stages"] is True


@pytest.mark.parametrize("room", [True, False])
def test_what_fits_is_run_once(room, tiny_model, text_file, tmp_path, monkeypatch):
    """The dense model is run once a batch and block if its traces fit, else once a stage; the weights are the same.

    The attention of the pruned model is run in the stages of its linears, and without room in each stage and the propagation.
    """
    model, runs, attentions = tiny_model("llama"), [], []
    run, attention = CalibrationStream.run, LlamaAttention.forward

    def counted_attention(module, *args, **kwargs):
        attentions.append(module.layer_idx)
        return attention(module, *args, **kwargs)

    def counted(stream, key, index, dense=False):
        runs.append((index, key, dense))
        return run(stream, key, index, dense)

    settings = {"sparsity": 0.5, "method": "d2_sparsegpt", "solver": "joint"}
    expected, _ = prune(model, text_file, tmp_path / "first", **settings)
    monkeypatch.setattr(CalibrationStream, "run", counted)
    monkeypatch.setattr(LlamaAttention, "forward", counted_attention)
    monkeypatch.setattr("callbacks.blockwise.calibration.has_spare", lambda num_bytes, device: room)
    found, _ = prune(model, text_file, tmp_path / "second", **settings)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    dense_runs = sum(dense for index, _, dense in runs if index == 1)
    assert dense_runs == (4 if room else 4 * 4)  # four batches, four stages
    own_runs = attentions.count(1) - dense_runs - 3  # two validations, and one that finds the stages
    assert own_runs == (4 * 2 if room else 4 * 5)


@pytest.mark.parametrize(
    "settings, runs",
    [
        ({"method": "d2_sparsegpt"}, 0),
        ({"method": "sparsegpt"}, 0),
        ({"method": "d2_sparsegpt", "score.activation_norm": "official"}, 4),
        ({"method": "wanda", "solver": None, "stages": True}, 4),
    ],
    ids=str,
)
def test_linears_run_in_their_stage_only_if_their_outputs_are_measured(
    settings, runs, tiny_model, text_file, tmp_path, monkeypatch
):
    """What scores need of gate's and up's outputs follows from their inputs: the masks are those of measured outputs."""
    settings = {"sparsity": 0.5, "solver": "joint"} | settings
    if settings.pop("score.activation_norm", None):
        settings["score"] = Score(activation_norm="official")
    seen, collect = [], BlockStep._collect

    def counted(step, key, number):
        gate = step._stream.block(step.index).mlp.gate_proj
        handle = gate.register_forward_hook(lambda *_: seen.append((step.index, number)))
        collect(step, key, number)
        handle.remove()

    monkeypatch.setattr(BlockStep, "_collect", counted)
    monkeypatch.setattr(CalibrationStream, "has_room_for", lambda *_: True)
    found, _ = prune(tiny_model("llama"), text_file, tmp_path / "derived", **settings)
    dense = 4 if settings.get("solver") else 0  # runs of the dense model, all in the first stage
    assert [seen.count((1, number)) for number in range(4)] == [dense, 0, runs, 4]
    monkeypatch.setattr(BlockStep, "_derives_outputs", lambda *_: False)
    measured, _ = prune(tiny_model("llama"), text_file, tmp_path / "measured", **settings)
    for name, weight in measured.items():
        if "layers.0." in name:  # rounding grows from block to block
            assert ((weight != 0) == (found[name] != 0)).double().mean() > 0.98, name


@pytest.mark.parametrize("settings", [{"target": 0.35, "stages": False}, {"target": "pruned", "stages": True}, {}], ids=str)
@pytest.mark.parametrize("family", ["opt", "qwen3", "stablelm"])
def test_batches_do_not_matter(family, settings, tiny_model, text_file, tmp_path):
    (small, by_few), (large, at_once) = (
        prune(tiny_model(family), text_file, tmp_path / str(size), size, sparsity=0.5, solver="joint", **settings)
        for size in (5, 48)
    )
    for name, weight in small.items():
        if "layers.0." in name:  # rounding grows from block to block
            assert ((weight != 0) == (large[name] != 0)).double().mean() > 0.97, name
    perplexities = [callback.metrics["pruned"]["val/perplexity"] for callback in (by_few, at_once)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.05)


def test_every_method_by_stages(tiny_model, text_file, tmp_path):
    for method in ("magnitude", "wanda", "sparsegpt", "d2prune"):
        _, callback = prune(tiny_model("llama"), text_file, tmp_path / method, sparsity=0.5, method=method, stages=True)
        assert all(record.sparsity == pytest.approx(0.5, abs=0.01) for record in callback.records)
        assert [list(record.linears) for record in callback.records] == [[n for s in STAGES["llama"] for n in s]] * 3


def test_first_stage_of_the_first_block_is_that_of_one_pass(tiny_model, text_file, tmp_path):
    """Nothing before it is pruned, so that only later linears differ."""
    both = [
        prune(tiny_model("llama"), text_file, tmp_path / str(stages), sparsity=0.5, method="sparsegpt", stages=stages)[0]
        for stages in (True, False)
    ]
    alike = {name.split("layers.")[1] for name in both[0] if "proj" in name and torch.equal(both[0][name], both[1][name])}
    assert alike == {f"0.self_attn.{role}_proj.weight" for role in "qkv"}


def test_ignored_linears_count_among_what_is_added(tiny_model, text_file, tmp_path):
    weights, callback = prune(tiny_model("llama"), text_file, tmp_path, sparsity=0.5, solver="joint", ignore=["*.o_proj"])
    assert all("self_attn.o_proj" not in record.linears for record in callback.records)
    assert callback.metrics["pruned"]["val/perplexity"] > 0 and weights["model.layers.1.self_attn.o_proj.weight"].all()


def test_a_run_leaves_ignored_linears_that_are_called_twice(tiny_model, text_file, tmp_path, monkeypatch):
    def forward(self, x):
        return self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.gate_proj(x) * self.up_proj(x))

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    model, settings = tiny_model("llama"), {"sparsity": 0.5, "solver": "joint"}
    found, callback = prune(model, text_file, tmp_path / "one", ignore=["*.gate_proj"], **settings)
    assert [len(record.linears) for record in callback.records] == [6] * 3
    assert all(weight.all() for name, weight in found.items() if "gate_proj" in name)
    with pytest.raises(RuntimeError, match="gate_proj' is called more than once"):
        prune(model, text_file, tmp_path / "two", ignore=["*.up_proj"], **settings)


def test_mixed_precision_reaches_every_stage(tiny_model, text_file, tmp_path, monkeypatch):
    seen, collect = [], BlockStep._collect

    def record(self, key, number):
        seen.append((number, torch.is_autocast_enabled("cpu")))
        return collect(self, key, number)

    monkeypatch.setattr(BlockStep, "_collect", record)
    callback = BlockwisePruning(output_dir=str(tmp_path), sparsity=0.5, solver="joint")
    data = data_of(tiny_model("llama"), text_file)
    quiet(tmp_path, callback, max_epochs=None, precision="bf16-mixed").fit(CausalLM(tiny_model("llama")), data)
    assert {number for number, _ in seen} == {0, 1, 2, 3} and all(autocast for _, autocast in seen)


def test_bad_numbers_are_found_by_name(tiny_model, text_file, tmp_path):
    module = CausalLM(tiny_model("llama"))
    module.configure_model()
    module.model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = torch.nan
    callback = BlockwisePruning(output_dir=str(tmp_path), sparsity=0.5, solver="joint")
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.v_proj: Argument `weight` holds NaN or Inf"):
        quiet(tmp_path, callback, max_epochs=None).fit(module, data_of(tiny_model("llama"), text_file))

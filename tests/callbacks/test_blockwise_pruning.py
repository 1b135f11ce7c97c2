"""BlockwisePruning end to end on tiny models of every family, through a real Trainer."""

import json
import math

import pytest
import torch
import transformers
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import BlockwisePruning, Diagnostics, FixedRule, Score
from datamodules import TextDataModule
from functional.pruning import METHODS, InputStatistics, OutputStatistics, prune_linear, prune_linears
from lightning_modules import CausalLM
from tests.helpers.tiny import FAMILIES

SEQ_LEN, WINDOWS = 24, 8


def fit(directory, text_file, tmp_path, callback, batch_size=3, logger=False, module=None, trainer_options=None):
    module = module or CausalLM(directory)
    data = TextDataModule(
        tokenizer=directory, source=text_file, seq_len=SEQ_LEN, num_calibration=WINDOWS, num_heldout=4, batch_size=batch_size
    )
    trainer = Trainer(
        accelerator="cpu", default_root_dir=tmp_path, callbacks=[callback], logger=logger, enable_progress_bar=False,
        enable_model_summary=False, **(trainer_options or {}),
    )  # fmt: skip
    trainer.fit(module, data)
    return module, data, trainer


def naive_prune_model(directory, data, method_of, **arguments):
    """The whole procedure with nothing of the callback: forward passes of the full model, one block after the other."""
    module = CausalLM(directory)
    module.configure_model()
    model = module.model.eval()
    windows = torch.cat([batch["input_ids"] for batch in data.train_dataloader()])
    for block in module.blocks.values():
        linears = module.linears(block)
        statistics = {name: (InputStatistics(x.in_features), OutputStatistics(x.out_features)) for name, x in linears.items()}
        for n, window in enumerate(windows):
            hooks = []
            for name, linear in linears.items():

                def add(_, args, output, pair=statistics[name], n=n):
                    inputs, outputs = pair
                    inputs.update(args[0].reshape(1, -1, inputs.features), n)
                    outputs.update(output.reshape(1, -1, outputs.features), n)

                hooks.append(linear.module.register_forward_hook(add))
            with torch.no_grad():
                model(window[None], use_cache=False)
            for hook in hooks:
                hook.remove()
        for name, linear in linears.items():
            result = prune_linear(linear.weight, *statistics[name], method=method_of(name), **arguments)
            linear.weight.copy_(result.weight)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_pruning_by_whole_forward_passes(family, tiny_model, text_file, tmp_path):
    """d2prune with q held: the same weights as a naive loop over full forwards, in batches of three against one by one."""
    directory = tiny_model(family)
    module, data, _ = fit(directory, text_file, tmp_path, BlockwisePruning(sparsity=0.6, update_rule=FixedRule("q")))

    def method_of(name):
        return "d2_wanda" if name == "self_attn.q_proj" else "d2_sparsegpt"

    expected = naive_prune_model(directory, data, method_of, sparsity=0.6, scale=float(SEQ_LEN))
    dense = transformers.AutoModelForCausalLM.from_pretrained(directory).state_dict()
    pruned = {f"{block}.{name}.weight" for block, m in module.blocks.items() for name in module.linears(m)}
    for name, value in module.model.state_dict().items():
        if name in pruned:
            reference = expected.state_dict()[name]
            assert ((value == 0) == (reference == 0)).float().mean() >= 0.999
            torch.testing.assert_close(value, reference, rtol=5e-3, atol=5e-3 * reference.abs().max().item())
            assert not torch.equal(value, dense[name])
        else:  # embeddings, norms, biases, head
            assert torch.equal(value, dense[name]), name


@pytest.mark.parametrize("method", [*METHODS, "d2prune"])
@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": "2:4"}, {"pattern": "3:4"}])
def test_every_method_reaches_its_target(method, target, tiny_model, text_file, tmp_path):
    module, _, _ = fit(tiny_model("llama"), text_file, tmp_path, BlockwisePruning(method=method, **target))
    for block in module.blocks.values():
        for name, linear in module.linears(block).items():
            zeros = linear.weight == 0
            if "pattern" in target:
                wanted = int(target["pattern"][0])
                assert (zeros.reshape(-1, 4).sum(1) == wanted).all()
            else:
                assert zeros.float().mean() == 0.5, name


def test_held_projection_keeps_its_weights(tiny_model, text_file, tmp_path):
    directory = tiny_model("llama")
    dense = transformers.AutoModelForCausalLM.from_pretrained(directory)
    for role in ("q", "k", "v", "none", "all"):
        module, _, _ = fit(directory, text_file, tmp_path, BlockwisePruning(sparsity=0.5, update_rule=FixedRule(role)))
        for index, (name, block) in enumerate(module.blocks.items()):
            for other in "qkv":
                now = block.get_submodule(f"self_attn.{other}_proj").weight
                before = dense.get_submodule(f"{name}.self_attn.{other}_proj").weight
                kept = now != 0
                assert torch.equal(now[kept], before[kept]) == (role in (other, "all")), (role, other, index)


def test_result_on_disk_and_in_tensorboard(tiny_model, text_file, tmp_path):
    directory = tiny_model("qwen3")
    logger = TensorBoardLogger(tmp_path, name="run")
    callback = BlockwisePruning(sparsity=0.5, update_rule=FixedRule("v"), diagnostics=Diagnostics(histograms=True))
    module, data, _ = fit(directory, text_file, tmp_path, callback, logger=logger)
    saved = tmp_path / "run" / "version_0" / "pruned"
    report = json.loads((saved / "pruning.json").read_text())

    (metrics,) = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(
        CausalLM(str(saved)), data, verbose=False
    )
    assert metrics["val/perplexity"] == pytest.approx(report["metrics"]["pruned"]["val/perplexity"], rel=1e-6)
    (dense,) = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(
        CausalLM(directory), data, verbose=False
    )
    assert dense["val/perplexity"] == pytest.approx(report["metrics"]["dense"]["val/perplexity"], rel=1e-6)
    for name, value in transformers.AutoModelForCausalLM.from_pretrained(saved).state_dict().items():
        assert torch.equal(value, module.model.state_dict()[name]), name
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())

    assert report["sparsity"] == pytest.approx(0.5, abs=1e-3) and report["data"]["seq_len"] == SEQ_LEN
    assert report["settings"]["update_rule"] == {"class_path": "FixedRule", "init_args": {"held": "v"}}
    assert report["versions"]["torch"] == torch.__version__
    assert [block["name"] for block in report["blocks"]] == list(module.blocks)

    events = EventAccumulator(str(tmp_path / "run" / "version_0"), size_guidance={"histograms": 0}).Reload()
    tags = events.Tags()
    for tag in ("block/relative_error", "block/sparsity", "block/seconds_statistics", "block/seconds_solve"):
        assert [event.step for event in events.Scalars(tag)] == [0, 1, 2], tag
    for kind in module.architecture.linears:
        errors = [event.value for event in events.Scalars(f"relative_error/{kind}")]
        assert errors == pytest.approx([block["linears"][kind]["relative_error"] for block in report["blocks"]], rel=1e-5)
        assert all(0 < error < 1 for error in errors)
    assert "damping/self_attn.q_proj" in tags["scalars"] and "damping/self_attn.v_proj" not in tags["scalars"]
    assert [event.step for event in events.Scalars("val/perplexity")] == [0, 3]
    assert "log10_scores_kept/mlp.down_proj" in tags["histograms"]


def test_reported_error_is_that_of_the_outputs(tiny_model, text_file, tmp_path):
    """Block 0 sees the same inputs before and after: its error can be taken from its linears' outputs."""
    directory = tiny_model("llama")
    callback = BlockwisePruning(method="wanda", sparsity=0.5)
    module, data, _ = fit(directory, text_file, tmp_path, callback)
    dense = CausalLM(directory)
    dense.configure_model()
    name = "self_attn.q_proj"
    before = dense.blocks["model.layers.0"].get_submodule(name)
    after = module.blocks["model.layers.0"].get_submodule(name)
    sums = torch.zeros(2)

    def compare(linear, args, output):
        sums[0] += (output - after(args[0])).square().sum()
        sums[1] += output.square().sum()

    before.register_forward_hook(compare)
    with torch.no_grad():
        for batch in data.train_dataloader():
            dense.eval().calibration_forward(batch)
    assert callback.records[0].linears[name].relative_error == pytest.approx((sums[0] / sums[1]).item(), rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_batch_size_does_not_matter(batch_size, tiny_model, text_file, tmp_path):
    """`official` norms depend on positions: they must be those of the calibration set, not of the batch."""
    runs = [
        fit(
            tiny_model("opt"),
            text_file,
            tmp_path,
            BlockwisePruning(sparsity=0.5, score=Score(activation_norm="official")),
            batch_size=size,
        )[0]
        for size in (batch_size, 3)
    ]
    for one, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert ((one == 0) == (other == 0)).float().mean() > 0.999
        torch.testing.assert_close(one, other, rtol=5e-3, atol=5e-3)


def test_dropout_is_off_and_modes_and_checkpoints_are_as_before(tiny_model, text_file, tmp_path):
    """The tiny OPT has dropout 0.3; two runs from train mode are equal bit by bit."""
    results = []
    for run in range(2):
        module = CausalLM(tiny_model("opt"))
        module.configure_model()
        module.train()
        callback = BlockwisePruning(sparsity=0.5)
        module, _, _ = fit(tiny_model("opt"), text_file, tmp_path / str(run), callback, module=module)
        assert all(child.training for child in module.modules())
        assert module.calibration_step is None and module.automatic_optimization
        results.append(module.model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not list(tmp_path.rglob("*.ckpt"))


def test_half_precision_models(tiny_model, text_file, tmp_path):
    module = CausalLM(tiny_model("llama"), dtype="bfloat16")
    callback = BlockwisePruning(sparsity=0.5)
    module, _, _ = fit(tiny_model("llama"), text_file, tmp_path, callback, module=module)
    assert {parameter.dtype for parameter in module.model.parameters()} == {torch.bfloat16}
    assert callback.records[-1].sparsity == pytest.approx(0.5, abs=1e-3)
    assert math.isfinite(callback.metrics["pruned"]["val/perplexity"])


def test_ignored_linears_stay_dense(tiny_model, text_file, tmp_path):
    directory = tiny_model("llama")
    callback = BlockwisePruning(sparsity=0.5, ignore=["*.down_proj", "model.layers.1.*"])
    module, _, _ = fit(directory, text_file, tmp_path, callback)
    dense = transformers.AutoModelForCausalLM.from_pretrained(directory).state_dict()
    for name, value in module.model.state_dict().items():
        untouched = "layers.1." in name or "down_proj" in name or "layers" not in name or "norm" in name
        assert torch.equal(value, dense[name]) == untouched, name
    assert callback.records[1].linears == {} and len(callback.records) == 3


def test_rerun_replaces_its_own_result_and_nothing_else(tiny_model, text_file, tmp_path):
    output = tmp_path / "out"
    for _ in range(2):
        fit(tiny_model("llama"), text_file, tmp_path, BlockwisePruning(sparsity=0.5, output_dir=str(output)))
    assert (output / "pruning.json").is_file() and not list(tmp_path.glob(".out.partial*"))
    (output / "pruning.json").unlink()
    with pytest.raises(ValueError, match=r"`output_dir` = .* holds no pruning\.json"):
        fit(tiny_model("llama"), text_file, tmp_path, BlockwisePruning(sparsity=0.5, output_dir=str(output)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Arguments `sparsity`.*and `pattern`.*got sparsity=None and pattern=None"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "Arguments `sparsity`.*got sparsity=0.5 and pattern='2:4'"),
        ({"sparsity": 1.0}, r"`sparsity` expected to be a share of zeros in \[0, 1\) but got 1.0"),
        ({"sparsity": 50}, "`sparsity`.*got 50"),
        ({"pattern": "4:4"}, "`pattern` expected to be N:M.*'4:4'"),
        ({"sparsity": 0.5, "method": "d3prune"}, "`method` expected to be one of d2prune, magnitude.*'d3prune'"),
        (
            {"sparsity": 0.5, "update_rule": "attn"},
            r"`update_rule` expected to be one of .*attention \(AttentionRule\).* got 'attn'",
        ),
        ({"sparsity": 0.5, "solver": "adam"}, r"`solver` expected to be one of obs \(ObsSolver\), admm .* got 'adam'"),
    ],
)
def test_wrong_settings_fail_when_written(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockwisePruning(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "2:5"}, r"model.layers.0.self_attn.q_proj: .*2:5 needs rows .* groups of 5, but in_features is 32"),
        (
            {"sparsity": 0.5, "ignore": ["*.gate"]},
            r"'\*.gate' matches no linear. .* 'model.layers.0.self_attn.q_proj'",
        ),
        ({"sparsity": 0.5, "ignore": ["*"]}, "leaves no linear to prune"),
    ],
)
def test_wrong_settings_fail_before_the_first_batch(arguments, message, tiny_model, text_file, tmp_path):
    module = CausalLM(tiny_model("llama"))
    module.configure_model()
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    module.validation_step = module.calibration_forward = None  # a batch would fail otherwise
    with pytest.raises(ValueError, match=message):
        fit(tiny_model("llama"), text_file, tmp_path, BlockwisePruning(**arguments), module=module)
    assert all(torch.equal(value, before[name]) for name, value in module.model.state_dict().items())
    assert module.calibration_step is None


def test_a_model_without_the_projection(tiny_model, text_file, tmp_path):
    from dataclasses import replace

    module = CausalLM(tiny_model("llama"))
    module.configure_model()
    module._architecture = replace(module.architecture, projections={"o": "self_attn.o_proj"})
    with pytest.raises(ValueError, match=r"`update_rule` = FixedRule\(held='k'\): this model has no projection k, only o"):
        fit(tiny_model("llama"), text_file, tmp_path, BlockwisePruning(sparsity=0.5, update_rule=FixedRule("k")), module=module)


def test_an_early_stop_is_an_error_and_saves_nothing(tiny_model, text_file, tmp_path):
    class Stop(BlockwisePruning):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            trainer.should_stop = True

    with pytest.raises(RuntimeError, match="Stopped after 1 of 3 blocks; nothing was saved"):
        fit(tiny_model("llama"), text_file, tmp_path, Stop(sparsity=0.5, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_shuffled_dataloader_is_refused(tiny_model, text_file, tmp_path):
    class Shuffled(TextDataModule):
        def train_dataloader(self):
            windows = super().train_dataloader().dataset
            return torch.utils.data.DataLoader(windows, batch_size=2, shuffle=True)

    directory = tiny_model("llama")
    data = Shuffled(tokenizer=directory, source=text_file, seq_len=SEQ_LEN, num_calibration=WINDOWS, num_heldout=0)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[BlockwisePruning(sparsity=0.5)],
    )
    with pytest.raises(ValueError, match="Turn its shuffling off"):
        trainer.fit(CausalLM(directory), data)


def test_bad_numbers_name_block_and_linear(tiny_model, text_file, tmp_path):
    module = CausalLM(tiny_model("llama"))
    module.configure_model()
    with torch.no_grad():
        module.blocks["model.layers.1"].get_submodule("mlp.up_proj").weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj: Argument `weight` holds NaN"):
        fit(tiny_model("llama"), text_file, tmp_path, BlockwisePruning(sparsity=0.5), module=module)


def test_a_used_trainer_is_refused(tiny_model, text_file, tmp_path):
    module, data, trainer = fit(tiny_model("llama"), text_file, tmp_path, BlockwisePruning(sparsity=0.5))
    with pytest.raises(ValueError, match=r"has run no epoch.*current_epoch=3.*Make a new Trainer"):
        trainer.fit(module, data)


def test_nothing_held_out_and_no_logger(tiny_model, text_file, tmp_path):
    directory = tiny_model("qwen3")
    data = TextDataModule(tokenizer=directory, source=text_file, seq_len=SEQ_LEN, num_calibration=WINDOWS, num_heldout=0)
    callback = BlockwisePruning(sparsity=0.5, output_dir=str(tmp_path / "here"))
    Trainer(accelerator="cpu", callbacks=[callback], logger=False, enable_progress_bar=False).fit(CausalLM(directory), data)
    report = json.loads((tmp_path / "here" / "pruning.json").read_text())
    assert report["metrics"] == {"dense": {}, "pruned": {}} and len(report["blocks"]) == 3
    assert report["calibration"] == {"samples": WINDOWS, "tokens_per_sample": SEQ_LEN}
    with pytest.raises(ValueError, match="`num_heldout` is 0: there is no held-out text"):
        Trainer(accelerator="cpu", logger=False).validate(CausalLM(directory), data)


def test_the_progress_bar_counts_blocks(tiny_model, text_file, tmp_path, capsys):
    directory = tiny_model("llama")
    data = TextDataModule(tokenizer=directory, source=text_file, seq_len=SEQ_LEN, num_calibration=WINDOWS, num_heldout=4)
    callback = BlockwisePruning(sparsity=0.5)
    Trainer(accelerator="cpu", callbacks=[callback], logger=False, default_root_dir=tmp_path).fit(CausalLM(directory), data)
    last = [line for line in capsys.readouterr().out.replace("\r", "\n").split("\n") if "3/3 blocks" in line][-1]
    error = callback.records[-1].relative_error
    assert f"error={error:.4f}" in last and "sparsity=0.50" in last and "seconds=" in last


def test_a_linear_that_misses_its_target_is_an_error(tiny_model, text_file, tmp_path, monkeypatch):
    def forgetful(weights, *args, **kwargs):
        results = prune_linears(weights, *args, **kwargs)
        results[0].weight[0] = 1.0
        return results

    monkeypatch.setattr("callbacks.blockwise.solve.prune_linears", forgetful)
    with pytest.raises(RuntimeError, match=r"layers.0.self_attn.q_proj: \d+ of 1024 weights are zero, but 512"):
        fit(tiny_model("llama"), text_file, tmp_path, BlockwisePruning(sparsity=0.5, update_rule=FixedRule("v")))
    assert not list(tmp_path.rglob("*.safetensors"))

"""LoRA: what is trained, what becomes of zeros, and what lies in the directory at the end."""

import importlib.util
import json
import re

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import KeepSparsity, LoRA, SaveModel
from callbacks.base.sparsity import linear_weights, share_of, zeros_of
from datamodules import ImageDataModule
from lightning_modules import CausalLM, ImageClassifier
from tests.helpers.launchers import go
from tests.helpers.recovery_runs import LEARNING_RATE, Crash, RecoveryRun, loaded, prune_two_of_four, short_windows
from tests.helpers.tiny import quiet

RANK, ALPHA = 4, 12


@pytest.fixture
def text(text_file, pruned):
    """20 batches an epoch."""
    return short_windows(pruned, text_file, num_calibration=40, seed=0)


class Adapters(Callback):
    """Weights and adapters at the end of training, before LoRA merges them: stands before it in the list."""

    def on_train_end(self, trainer, pl_module):
        state = pl_module.model.state_dict()
        self.found = {
            name.removesuffix(".base_layer.weight"): tuple(
                state[name.replace("base_layer", part).replace(".weight", tail)].clone()
                for part, tail in (("base_layer", ".weight"), ("lora_A", ".default.weight"), ("lora_B", ".default.weight"))
            )
            for name in state
            if name.endswith("base_layer.weight")
        }
        self.trained = {name for name, parameter in pl_module.named_parameters() if parameter.requires_grad}
        self.others = {name: value.clone() for name, value in state.items() if "lora" not in name and "base_layer" not in name}
        ids = torch.arange(2, 12)[None]
        with torch.no_grad():
            self.logits = pl_module(ids)


def dense(name, adapters):
    """The weight with its adapter everywhere, by the formula."""
    weight, down, up = adapters.found[name]
    return weight + (up.double() @ down.double()).float() * ALPHA / RANK


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_masked_merge_is_the_sum_where_weights_are_not_zero(precision, pruned, text, tmp_path, capsys):
    seed_everything(0)
    before, adapters, module = loaded(pruned), Adapters(), CausalLM(pruned, learning_rate=LEARNING_RATE)
    lora = LoRA(RANK, ALPHA, output_dir=str(tmp_path / "model"))
    quiet(tmp_path, adapters, lora, precision=precision).fit(module, text)
    assert adapters.trained and all("lora_" in name for name in adapters.trained)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not any("lora" in name for name in saved.state_dict()) and not (tmp_path / "model/adapter_config.json").exists()
    assert set(adapters.found) == {name for name in linear_weights(before)}
    for name, weight in linear_weights(before).items():
        assert torch.equal(adapters.found[name][0], weight), "the base was frozen"
        merged = saved.get_parameter(f"{name}.weight")
        assert torch.equal(merged == 0, weight == 0)
        torch.testing.assert_close(merged, dense(name, adapters) * (weight != 0), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(saved.state_dict()[name], value) for name, value in adapters.others.items())
    if precision == "32-true":  # trained as it is merged
        with torch.no_grad():
            torch.testing.assert_close(saved(torch.arange(2, 12)[None]).logits, adapters.logits, rtol=1e-4, atol=1e-4)
    metrics = {state: values["val/loss"] for state, values in lora.metrics.items()}
    assert metrics["trained"] < metrics["pruned"] - 0.01
    assert metrics["merged"] == pytest.approx(metrics["trained"], rel=1e-5 if precision == "32-true" else 1e-2)
    shown = capsys.readouterr().out
    assert re.search(r"val/loss +\S+ pruned -> \S+ trained -> \S+ merged", shown)
    assert re.search(r"sparsity +50.0000% of the prunable linears -> 50.0000% with the adapters merged", shown)
    card = ModelCard.load(tmp_path / "model/README.md")
    assert (card.data.library_name, card.data.tags) == ("transformers", ["sparse", "pruned", "lora"])
    losses = [f"{lora.metrics[state]['val/loss']:.6g}" for state in ("pruned", "trained", "merged")]
    assert f"| val/loss | {' | '.join(losses)} |" in card.text
    assert "| sparsity of the prunable linears | 50.0000% |  | 50.0000% |" in card.text


def test_kept_apart_the_base_stays_sparse_and_all_libraries_add_them(pruned, text, tmp_path, capsys):
    import peft

    adapters, target = Adapters(), tmp_path / "model"
    module, lora = CausalLM(pruned, learning_rate=LEARNING_RATE), LoRA(RANK, ALPHA, merge="none", output_dir=str(target))
    quiet(tmp_path, adapters, lora).fit(module, text)
    assert "none where adapters are added" in capsys.readouterr().out
    written = {path.name for path in target.iterdir()}
    assert {"model.safetensors", "config.json", "adapter_config.json", "adapter_model.safetensors"} <= written
    assert json.loads((target / "adapter_config.json").read_text())["lora_alpha"] == ALPHA
    card = ModelCard.load(target / "README.md")
    assert card.data.library_name == "peft" and f"peft {peft.__version__}" in card.text
    assert "| sparsity of the prunable linears | 50.0000% |  |" in card.text
    module.eval()
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.equal(module(ids), adapters.logits), "the module goes on with its adapters"
        together = transformers.AutoModelForCausalLM.from_pretrained(target)
        torch.testing.assert_close(together(ids).logits, adapters.logits)
        base = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(target))
        from safetensors.torch import load_file

        base.load_state_dict(load_file(target / "model.safetensors"))
        for name, weight in linear_weights(loaded(pruned)).items():
            assert torch.equal(base.get_parameter(f"{name}.weight"), weight)
        apart = peft.PeftModel.from_pretrained(base.eval(), target)
        torch.testing.assert_close(apart(ids).logits, adapters.logits)
        for name in adapters.found:  # by hand
            hidden = torch.randn(3, adapters.found[name][0].shape[1])
            expected = hidden @ dense(name, adapters).T
            torch.testing.assert_close(module.model.get_submodule(name)(hidden), expected, rtol=1e-4, atol=1e-4)
    (again,) = quiet(tmp_path).validate(CausalLM(str(target)), text, verbose=False)
    assert again["val/loss"] == pytest.approx(lora.metrics["trained"]["val/loss"], rel=1e-5)
    quiet(tmp_path, SaveModel(str(target)), limit_train_batches=1).fit(CausalLM(pruned, learning_rate=0.0), text)
    assert not (target / "adapter_config.json").exists(), "the adapters of one model are not added to another"


@pytest.mark.parametrize("merge", ["masked", "none"])
def test_vision_transformer(merge, tmp_path):
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 10}
    module = ImageClassifier("deit_tiny_patch16_224", model_args=sizes)
    module.configure_model()
    prune_two_of_four(module)
    module.save(tmp_path)
    data = ImageDataModule("digits", batch_size=64, crop_pct=1.0, augmentation={"hflip": 0.0})
    lora, module = LoRA(merge=merge, output_dir=str(tmp_path / "model")), ImageClassifier(str(tmp_path), learning_rate=1e-2)
    quiet(tmp_path, lora, limit_train_batches=10).fit(module, data)
    assert lora.metrics["trained"]["val/loss"] < lora.metrics["pruned"]["val/loss"]
    last = lora.metrics["merged" if merge == "masked" else "trained"]
    assert last["val/loss"] == pytest.approx(lora.metrics["trained"]["val/loss"], rel=1e-5)
    again = ImageClassifier(str(tmp_path / "model"))
    (found,) = quiet(tmp_path).validate(again, data, verbose=False)
    assert found["val/loss"] == pytest.approx(last["val/loss"], rel=1e-5)
    if merge == "masked":
        assert share_of(zeros_of(linear_weights(again))) == 0.5
        return
    weights = tmp_path / "model/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"`model_name_or_path`: the adapters in '.*' cannot be added .* remove its"):
        ImageClassifier(str(tmp_path / "model")).configure_model()


def test_resumed_run_ends_as_an_uninterrupted_one(pruned, text, tmp_path):
    found = []
    for more in ((), (Crash(),)):
        seed_everything(0)  # of the adapters
        module = CausalLM(pruned, learning_rate=LEARNING_RATE)
        checkpoint = ModelCheckpoint(tmp_path / str(len(more)), "last")
        trainer = quiet(tmp_path, LoRA(), checkpoint, *more, enable_checkpointing=True, max_epochs=2)
        if more:
            with pytest.raises(RuntimeError, match="power cut"):
                trainer.fit(module, text)
        else:
            trainer.fit(module, text)
            found.append(linear_weights(module))
    module = CausalLM(pruned, learning_rate=LEARNING_RATE)
    quiet(tmp_path, LoRA(), max_epochs=2).fit(module, text, ckpt_path=tmp_path / "1/last.ckpt", weights_only=True)
    for name, weight in linear_weights(module).items():
        assert torch.equal(weight, found[0][name])


def test_two_processes_merge_alike(pruned, text_file, tmp_path):
    log = tmp_path / "log"
    assert go(RecoveryRun(pruned, text_file, str(tmp_path), callback="LoRA"), log=log) == [0, 0], log.read_text()[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)["weights"] for rank in range(2))
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, weight in linear_weights(loaded(pruned)).items():
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], saved.get_parameter(f"{name}.weight"))
        assert torch.equal(first[name] == 0, weight == 0) and not torch.equal(first[name], weight)


def test_some_linears(pruned, text, tmp_path):
    module, names = CausalLM(pruned, learning_rate=LEARNING_RATE), ["self_attn.q_proj", "mlp.down_proj"]
    quiet(tmp_path, LoRA(linears=names)).fit(module, text)
    for name, weight in linear_weights(loaded(pruned)).items():
        assert torch.equal(linear_weights(module)[name], weight) != name.endswith(tuple(names))


def test_what_a_user_is_told(pruned, text, tmp_path, monkeypatch):
    for options, message in (
        ({"r": 0}, "`r` expected to be a positive integer but got 0"),
        ({"alpha": float("nan")}, "`alpha` expected to be a finite number above 0 but got nan"),
        ({"merge": "all"}, "`merge` expected to be masked or none but got 'all'"),
    ):
        with pytest.raises(ValueError, match=message):
            LoRA(**options)
    for other in (KeepSparsity(), SaveModel()):
        with pytest.raises(ValueError, match=f"leave {type(other).__name__} out of trainer.callbacks"):
            quiet(tmp_path, other, LoRA()).fit(CausalLM(pruned), text)
    with pytest.raises(ValueError, match=r"`linears` expected to be some of self_attn.q_proj, .* but got q_proj"):
        quiet(tmp_path, LoRA(linears=["q_proj"])).fit(CausalLM(pruned), text)
    monkeypatch.setattr("utilities.extras.find_spec", lambda name: None if name == "peft" else importlib.util.find_spec(name))
    with pytest.raises(ModuleNotFoundError, match=r"peft is not installed. Run `pip install --editable '\.\[lora\]'`"):
        quiet(tmp_path, LoRA()).fit(CausalLM(pruned), text)
    (tmp_path / "adapter_config.json").write_text("{}")
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).symlink_to(f"{pruned}/{file}")
    with pytest.raises(ModuleNotFoundError, match="peft is not installed"):
        CausalLM(str(tmp_path)).configure_model()

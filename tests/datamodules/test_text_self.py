"""Text that the model writes itself: sampled from its distribution, seeded, kept on file, the same in all processes."""

import json
import signal
import time
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from callbacks import BlockwisePruning
from datamodules import ImageDataModule, TextDataModule
from lightning_modules import CausalLM
from lightning_modules.parts.self_text import sample_batch, start_token
from tests.helpers.launchers import Fault, PruningRun, go
from tests.helpers.tiny import VOCABULARY, make_model, quiet
from utilities.contract import WINDOWS_OF_A_BATCH
from utilities.failures import failures_in_one_sentence

SIZES = {"seq_len": 12, "num_calibration": 6, "num_heldout": 2, "batch_size": 2}


def data_of(model, **options):
    return TextDataModule(model, source="self", **SIZES | options)


def prune(model, folder, data, **settings):
    callback = BlockwisePruning(output_dir=str(folder), **({"sparsity": 0.5} | settings))
    module = CausalLM(model)
    quiet(folder, callback, max_epochs=None).fit(module, data)
    return module, callback, load_file(folder / "model.safetensors")


def written(model, start, number, seq_len, seed):
    """All batches of some windows, the last one first: none depends on those before it."""
    batches = reversed(range(-(-number // WINDOWS_OF_A_BATCH)))
    return torch.cat([sample_batch(model, start, batch, number, seq_len, seed) for batch in batches][::-1])


@torch.no_grad()
def by_hand(model, start, number, seq_len, seed):
    """Token by token with whole forward passes, no cache and nothing that ends a text; 32 windows a batch."""
    windows = []
    for first in range(0, number, 32):
        torch.manual_seed(seed * number + first)
        tokens = torch.full((min(32, number - first), 1), start)
        for _ in range(seq_len - 1):
            logits = model(tokens, use_cache=False).logits[:, -1].float()
            logits[:, model.generation_config.eos_token_id] = -torch.inf
            tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], dim=1)
        windows.append(tokens)
    return torch.cat(windows)


@pytest.mark.parametrize("number", [5, 70])
def test_text_is_that_of_a_loop_over_tokens(number):
    model = make_model("llama").eval()
    model.generation_config.eos_token_id = 7
    assert torch.equal(written(model, 1, number, 6, seed=3), by_hand(model, 1, number, 6, seed=3))


def test_tokens_follow_the_models_distribution():
    """Frequencies of the second token against softmax of the logits of the first, and no token that ends a text."""
    model = make_model("llama").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(2)
    model.generation_config.eos_token_id = 7
    windows = written(model, 3, 2000, 3, seed=0)
    with torch.no_grad():
        logits = model(torch.tensor([[3]])).logits[0, -1].double()
    logits[7] = -torch.inf
    expected = logits.softmax(0)
    found = torch.bincount(windows[:, 1], minlength=len(expected)).double() / len(windows)
    assert windows.shape == (2000, 3) and (windows[:, 0] == 3).all() and not (windows == 7).any()
    assert (found - expected).abs().max() < 4 * (expected * (1 - expected) / 2000).sqrt().max()


def test_sampling_is_seeded_and_leaves_no_trace():
    model = make_model("qwen3").train()
    number, before = WINDOWS_OF_A_BATCH + 3, torch.get_rng_state()
    first, again, other = (written(model, 1, number, 6, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique(dim=0)) > number - 5  # batches do not repeat each other
    assert torch.equal(torch.get_rng_state(), before) and model.training
    for batch in (-1, 2):
        with pytest.raises(ValueError, match=f"`batch` expected to be one of those of 35 windows, from 0, but got {batch}"):
            sample_batch(model, 1, batch, number, 6, 0)


def test_start_token_of_model_or_tokenizer():
    model = make_model("opt")
    assert start_token(model, None) == model.config.bos_token_id
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    assert start_token(model, None) == model.config.eos_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="`source` = self needs a token that begins a text"):
        start_token(model, None)


def test_prunes_without_any_text(tiny_model, tmp_path):
    model, file = tiny_model("llama"), tmp_path / "text" / "own.safetensors"
    data = data_of(model, self_file=str(file))
    _, callback, weights = prune(model, tmp_path / "one", data, solver="joint")
    assert callback.metrics["pruned"]["val/perplexity"] > 0
    with safe_open(file, "pt") as stored:
        windows = stored.get_tensor("windows")
        assert json.loads(stored.metadata()["settings"]) == {k: SIZES[k] for k in list(SIZES)[:3]} | {
            "seed": 0,
            "vocabulary": VOCABULARY,
        }
    assert windows.shape == (8, 12)
    fresh = CausalLM(model)
    fresh.configure_model()
    assert torch.equal(windows, fresh.write_batch(0, 8, 12, 0))
    batches = torch.cat([batch["input_ids"] for batch in data.train_dataloader()])
    assert torch.equal(batches, windows[:6])
    again = prune(model, tmp_path / "two", data_of(model, self_file=str(file)), solver="joint")[2]
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


def test_file_is_read_instead_of_written(tiny_model, tmp_path):
    model, file = tiny_model("llama"), tmp_path / "own.safetensors"
    prune(model, tmp_path / "one", data_of(model, self_file=str(file)))
    with safe_open(file, "pt") as stored:
        windows, metadata = stored.get_tensor("windows"), stored.metadata()
    save_file({"windows": windows.roll(1, 0)}, file, metadata=metadata)
    data = data_of(model, self_file=str(file))
    prune(model, tmp_path / "two", data)
    assert torch.equal(next(iter(data.train_dataloader()))["input_ids"], windows.roll(1, 0)[:2])


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_read_the_file(stage, tiny_model, tmp_path):
    model, file = tiny_model("llama"), tmp_path / "own.safetensors"
    trainer = quiet(tmp_path)
    with pytest.raises(ValueError, match=f"{stage} reads what `fit` has written, but `self_file` = None is no file"):
        getattr(trainer, stage)(CausalLM(model, max_new_tokens=2), data_of(model))
    prune(model, tmp_path / "one", data_of(model, self_file=str(file)))
    assert getattr(quiet(tmp_path), stage)(CausalLM(model, max_new_tokens=2), data_of(model, self_file=str(file)))


def test_a_text_to_test_on(tiny_model, text_file, tmp_path):
    model = tiny_model("llama")
    data = data_of(model, test_source=str(text_file))
    (expected,) = quiet(tmp_path).test(CausalLM(model), data)
    other = data_of(model, test_source=str(text_file))
    module, _, _ = prune(model, tmp_path / "one", other, sparsity=0.0, method="magnitude")
    assert quiet(tmp_path).test(module, other)[0] == expected  # after `fit` too


def test_nothing_to_test_on(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="there is no text to test on"):
        quiet(tmp_path).test(CausalLM(tiny_model("llama")), data_of(tiny_model("llama"), num_heldout=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 13}, "were written with seq_len = 12, but it is 13 now"),
        ({"num_calibration": 7}, "were written with num_calibration = 6, but it is 7 now"),
        ({"seed": 5}, "were written with seed = 0, but it is 5 now"),
    ],
)
def test_windows_of_other_settings_are_refused(options, message, tiny_model, tmp_path):
    model, file = tiny_model("llama"), tmp_path / "own.safetensors"
    prune(model, tmp_path / "one", data_of(model, self_file=str(file)))
    with pytest.raises(ValueError, match=message):
        prune(model, tmp_path / "two", data_of(model, self_file=str(file), **options))


@pytest.mark.parametrize("content", [b"", b"not a safetensors file"])
def test_files_that_are_something_else(content, tiny_model, tmp_path):
    file = tmp_path / "own.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"`self_file`: .* holds no windows that a model has written"):
        prune(tiny_model("llama"), tmp_path / "one", data_of(tiny_model("llama"), self_file=str(file)))
    save_file({"windows": torch.zeros(2, 2)}, file)
    with pytest.raises(ValueError, match="was written by another program"):
        prune(tiny_model("llama"), tmp_path / "one", data_of(tiny_model("llama"), self_file=str(file)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": ["self", "pydoc"]}, "`source` = self expected to stand alone"),
        ({"source": "self", "test_source": "self"}, "not to be a `test_source`"),
        ({"source": "self", "sampling": "document"}, "`sampling` = 'document' draws from documents"),
        ({"source": "pydoc", "self_file": "x"}, "`self_file` = 'x' belongs to `source: self`"),
    ],
)
def test_settings_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        TextDataModule(**options)


def test_parts_on_two_devices():
    model = make_model("llama")
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="needs the whole model on one device, but `offload`"):
        sample_batch(model, 1, 0, 2, 4, 0)


def test_images_have_no_such_source():
    with pytest.raises(ValueError, match="`root` = 'self': an image model writes no images"):
        ImageDataModule(root="self")


def test_two_processes_and_a_kill_calibrate_on_the_same_text(tiny_model, tmp_path):
    """Three batches, so that one process of two has none in the last round."""
    model, log, settings = tiny_model("llama"), tmp_path / "log", {"sparsity": 0.5, "solver": "joint"}
    sizes = SIZES | {"num_calibration": 2 * WINDOWS_OF_A_BATCH, "batch_size": 16}
    runs = [
        PruningRun(model, "self", str(tmp_path / str(n) / "pruned"), n, settings=settings,
                   data=sizes | {"self_file": str(tmp_path / str(n) / "text.safetensors")})
        for n in (1, 2)
    ]  # fmt: skip
    for run in runs:
        assert go(run, log=log) == [0] * run.processes, log.read_text()[-2000:]
    texts = [load_file(run.data["self_file"])["windows"] for run in runs]
    assert torch.equal(*texts) and len(texts[0].unique(dim=0)) == 2 * WINDOWS_OF_A_BATCH + 2
    killed = replace(runs[0], output=str(tmp_path / "killed" / "pruned"), data=sizes)
    assert go(killed, {0: Fault("before a file is renamed", 3)}) == [-signal.SIGKILL]
    assert len(list(killed.state.glob("*.safetensors"))) == 1
    assert go(killed) == [0]
    assert runs[0].weights == runs[1].weights == killed.weights


@dataclass(frozen=True)
class FailingRun(PruningRun):
    """One of two processes fails while it writes its first batch."""

    def work(self):
        write_batch = CausalLM.write_batch

        def write(self, batch, *args):
            if batch == 1:
                raise ValueError("Argument `x`: no more ink.")
            return write_batch(self, batch, *args)

        CausalLM.write_batch = write
        with failures_in_one_sentence():
            super().work()


def test_a_failure_of_one_process_stops_all_and_is_said_once(tiny_model, tmp_path):
    log, file = tmp_path / "log", tmp_path / "text.safetensors"
    data = SIZES | {"num_calibration": 3 * WINDOWS_OF_A_BATCH, "self_file": str(file)}
    run = FailingRun(tiny_model("llama"), "self", str(tmp_path / "pruned"), 2, data=data)
    started = time.monotonic()
    assert go(run, log=log) == [1, 1], log.read_text()[-2000:]
    assert time.monotonic() - started < 60
    assert [line for line in log.read_text().splitlines() if "error" in line.lower()] == [
        "error: Argument `x`: no more ink. (`--debug` shows where.)"
    ]
    assert not file.exists()

"""Models larger than memory: a streamed run has the bits of one in memory, holds few blocks, dies and goes on, and refuses the
rest."""

import json
import math
import shutil
import signal
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy

from callbacks import BlockwisePruning
from callbacks.blockwise.streaming import can_share
from datamodules import TextDataModule
from lightning_modules import CausalLM
from lightning_modules.parts.block_stream import BlockStream
from lightning_modules.parts.load_streamed import check_stage
from lightning_modules.parts.shards import Shards, find_shards, write_shard
from lightning_modules.parts.streamed import StreamedBlocks
from tests.helpers.launchers import Fault, go
from tests.helpers.streamed_runs import SETTINGS, assert_same, tensors_of
from tests.helpers.tiny import make_model, make_tokenizer, quiet


@pytest.fixture(scope="session")
def split_model(tmp_path_factory):
    """family -> directory of a tiny model, with a tokenizer, in files of 12 KB, which split blocks."""
    made = {}

    def build(family: str) -> str:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(f"split-{family}")
            make_model(family).save_pretrained(made[family], max_shard_size="12KB")
            make_tokenizer("llama").save_pretrained(made[family])
            assert len(find_shards(made[family])) > 8
        return str(made[family])

    return build


def data_of(model, text, **options):
    sizes = {"seq_len": 16, "num_calibration": 6, "num_heldout": 4, "batch_size": 2}
    return TextDataModule(model, source=text, **(sizes | {"test_source": text} | options))


def prune(model, text, folder, stream, **settings):
    callback = BlockwisePruning(**{"sparsity": 0.5, "output_dir": str(folder / "pruned")} | settings)
    module = CausalLM(model, stream=stream)
    trainer = quiet(folder, callback)
    trainer.fit(module, data_of(model, text))
    return trainer, module, callback


def loaded_blocks(module):
    """Number of blocks any weight of which is there."""
    return sum(any(not weight.is_meta for weight in block.parameters()) for block in module.blocks.values())


CASES = [("llama", name) for name in SETTINGS] + [(family, name) for family in ("gpt2", "opt") for name in ("outlier", "joint")]
CASES += [("qwen3", "attention"), ("gemma2", "attention"), ("falcon", "error")]


@pytest.mark.parametrize("family, name", CASES)
def test_a_streamed_run_has_the_bits_of_one_in_memory(family, name, split_model, text_file, tmp_path):
    model = split_model(family)
    runs = [prune(model, text_file, tmp_path / str(stream), stream, **SETTINGS[name]) for stream in (False, True)]
    folders = [tmp_path / str(stream) / "pruned" for stream in (False, True)]
    assert_same(tensors_of(folders[1]), tensors_of(folders[0]))
    assert runs[0][2].metrics == runs[1][2].metrics and "val/perplexity" in runs[1][2].metrics["pruned"]
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (folders[0] / file).read_text() == (folders[1] / file).read_text()
    left = {path.name for path in (tmp_path / "True").iterdir()}
    assert left <= {"pruned", ".pruned.lock"} and loaded_blocks(runs[1][1]) == 0
    assert len(find_shards(folders[1])) == 4


def test_transformers_loads_the_result(split_model, text_file, tmp_path):
    """From its own files, with the perplexity that the streamed run has reported."""
    _, _, callback = prune(split_model("qwen3"), text_file, tmp_path, True, method="wanda")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    data, losses = data_of(split_model("qwen3"), text_file), []
    assert model.lm_head.weight is model.model.embed_tokens.weight
    quiet(tmp_path).validate(CausalLM(str(tmp_path / "pruned")), data, verbose=False)
    with torch.no_grad():
        for batch in data.val_dataloader():
            losses += [model(ids[None], labels=ids[None]).loss.item() for ids in batch["input_ids"]]
    assert callback.metrics["pruned"]["val/perplexity"] == pytest.approx(math.exp(sum(losses) / 4), rel=1e-5)
    report = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert report["metrics"]["pruned"] == callback.metrics["pruned"] and report["sparsity"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_is_that_of_the_whole_model(stage, split_model, text_file, tmp_path):
    model, found = split_model("llama"), []
    for stream in (False, True):
        module = CausalLM(model, stream=stream)
        found.append(getattr(quiet(tmp_path), stage)(module, data_of(model, text_file), verbose=False))
    assert found[0] == found[1] and loaded_blocks(module) == 0


@pytest.mark.parametrize("waiting, reads", [(10, 4), (2, 2 * 4 - 1), (1, 4 * 4 - 3)])
def test_a_block_is_read_once_for_all_batches_that_fit(waiting, reads, split_model, text_file, tmp_path, monkeypatch):
    """Three blocks, and the first one once more to see what it returns; four batches, of which so many may wait."""
    read, original, hidden = [], StreamedBlocks._read, 2 * 16 * 32 * 4
    monkeypatch.setattr(StreamedBlocks, "_read", lambda self, name: (read.append(name), original(self, name)))
    monkeypatch.setattr("lightning_modules.parts.streamed_passes.free_memory", lambda: 4 * waiting * hidden)
    data = data_of(split_model("llama"), text_file, num_heldout=8)
    (found,) = quiet(tmp_path).validate(CausalLM(split_model("llama"), stream=True), data, verbose=False)
    assert len(read) == reads
    (whole,) = quiet(tmp_path).validate(CausalLM(split_model("llama")), data, verbose=False)
    assert found == whole


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("family", ["opt", "mistral", "qwen3", "gpt2", "falcon", "gemma3_text"])
def test_evaluation_has_the_bits_of_the_whole_model(family, precision, split_model, text_file, tmp_path):
    found = [
        quiet(tmp_path, precision=precision).test(module, data_of(split_model(family), text_file), verbose=False)
        for module in (CausalLM(split_model(family)), CausalLM(split_model(family), stream=True))
    ]
    assert found[0] == found[1]


def test_a_bar_counts_the_blocks_of_an_evaluation(split_model, text_file, tmp_path, capfd):
    data = data_of(split_model("llama"), text_file)
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_model_summary=False)
    trainer.validate(CausalLM(split_model("llama"), stream=True), data, verbose=False)
    assert "Blocks:" in (shown := capfd.readouterr().err) and "0/3" in shown


def test_the_module_goes_on_with_what_it_has_pruned(split_model, text_file, tmp_path):
    trainer, module, callback = prune(split_model("llama"), text_file, tmp_path, True, method="wanda")
    (metrics,) = trainer.validate(module, data_of(split_model("llama"), text_file), verbose=False)
    assert metrics == callback.metrics["pruned"]


@pytest.mark.parametrize("name", ["attention", "joint", "error"])
def test_no_more_than_two_blocks_are_there(name, split_model, text_file, tmp_path, monkeypatch):
    """Counted whenever one has been read; the rest of a run only reads."""
    counts, read = [], StreamedBlocks._read

    def counting(self, block):
        read(self, block)
        counts.append(sum(self._is_there(other) for other in self.blocks))

    monkeypatch.setattr(StreamedBlocks, "_read", counting)
    prune(split_model("opt"), text_file, tmp_path, True, **SETTINGS[name])
    assert max(counts) == 2 and len(counts) > 9


def test_hidden_states_that_are_too_large_go_to_files(split_model, text_file, tmp_path, monkeypatch):
    model, spilt, files = split_model("llama"), [], []
    prune(model, text_file, tmp_path / "memory", False, **SETTINGS["joint"], allocation="owl")
    monkeypatch.setattr("callbacks.blockwise.placement.free_memory", lambda: 4 * 2 * 3 * 2 * 16 * 32 * 4 - 1)
    original = StreamedBlocks.as_stored

    def looking(self, name):
        spilt.append(len(list((tmp_path / "files" / ".pruned.partial" / "hidden").rglob("*.hidden"))))
        return original(self, name)

    monkeypatch.setattr(StreamedBlocks, "as_stored", looking)
    prune(model, text_file, tmp_path / "files", True, **SETTINGS["joint"], allocation="owl")
    assert_same(tensors_of(tmp_path / "files" / "pruned"), tensors_of(tmp_path / "memory" / "pruned"))
    assert spilt == [6, 6, 6], "three batches, of the dense and of the pruned model"
    files = {path.name for path in (tmp_path / "files").iterdir()}
    assert files == {"pruned", ".pruned.lock"}


class Broken(Exception):
    """Ends a run."""


@pytest.mark.parametrize("resume", [False, True])
def test_an_error_while_a_block_is_written_leaves_the_dense_model(resume, split_model, text_file, tmp_path, monkeypatch):
    def failing(path, tensors):
        if path.name == "00001.safetensors":
            raise Broken
        return write_shard(path, tensors)

    monkeypatch.setattr("callbacks.blockwise.streaming.write_shard", failing)
    module, model = CausalLM(split_model("llama"), stream=True), split_model("llama")
    callback = BlockwisePruning(sparsity=0.5, method="wanda", resume=resume, output_dir=str(tmp_path / "pruned"))
    with pytest.raises(Broken):
        quiet(tmp_path, callback).fit(module, data_of(model, text_file))
    assert {path.name for path in tmp_path.iterdir()} == {".pruned.lock"} | ({"pruned.state"} if resume else set())
    (after,) = quiet(tmp_path).validate(module, data_of(model, text_file), verbose=False)
    (dense,) = quiet(tmp_path).validate(CausalLM(model), data_of(model, text_file), verbose=False)
    assert after == dense


KILLS = [
    ("before a shard is written", 2),
    ("before a file is renamed", 4),
    ("before a file is renamed", 5),
    ("half a file written", 3),
    ("statistics", 20),
    ("model saved", 1),
    ("before a shard gets its name", 2),
    ("before the index is written", 1),
    ("after the model was saved", 1),
    ("state removed", 1),
]


@pytest.mark.parametrize("place, count", KILLS)
def test_killed_and_started_again(place, count, streamed_run, in_memory, tmp_path):
    """Twice, and then left alone."""
    run = replace(streamed_run, output=str(tmp_path / "pruned"))
    assert go(run, {0: Fault(place, count)}) == [-signal.SIGKILL]
    assert go(run, {0: Fault(place, max(count - 1, 1))})[0] in (-signal.SIGKILL, 0)
    assert go(run) == [0]
    assert_same(tensors_of(run.output), in_memory(run.settings))
    assert {path.name for path in tmp_path.iterdir()} == {"pruned", ".pruned.lock"}


@pytest.mark.parametrize("settings", [SETTINGS["joint"], SETTINGS["owl"], SETTINGS["outlier"]], ids=str)
def test_every_way_goes_on(settings, streamed_run, in_memory, tmp_path):
    run = replace(streamed_run, output=str(tmp_path / "pruned"), settings={"sparsity": 0.5} | settings | {"resume": True})
    log = tmp_path / "log"
    assert go(run, {0: Fault("before a file is renamed", 6)}) == [-signal.SIGKILL]  # fingerprint, two blocks, a third's shard
    assert len(list((run.state / "shards").glob("*.safetensors"))) == 2
    assert go(run, log=log) == [0] and "finished 2 of 3 blocks" in log.read_text()
    assert_same(tensors_of(run.output), in_memory({"sparsity": 0.5} | settings))


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x")])
def test_a_damaged_shard_is_written_again(damage, streamed_run, in_memory, tmp_path):
    run, log = replace(streamed_run, output=str(tmp_path / "pruned")), tmp_path / "log"
    assert go(run, {0: Fault("model saved")}) == [-signal.SIGKILL]
    damage(run.state / "shards" / "00001.safetensors")
    assert go(run, log=log) == [0]
    assert "finished 1 of 3 blocks" in log.read_text() and "Block 1 and those after it are pruned again" in log.read_text()
    assert_same(tensors_of(run.output), in_memory(run.settings))


def test_a_streamed_run_is_not_continued_in_memory(streamed_run, tmp_path):
    run, log = replace(streamed_run, output=str(tmp_path / "pruned")), tmp_path / "log"
    assert go(run, {0: Fault("model saved")}) == [-signal.SIGKILL]
    assert go(replace(run, stream=False), log=log) == [1]
    assert "`stream` was True and is False" in log.read_text()


def test_a_full_disk_keeps_what_is_finished(streamed_run, in_memory, tmp_path):
    run, log = replace(streamed_run, output=str(tmp_path / "pruned")), tmp_path / "log"
    assert go(run, {0: Fault("disk", 30_000)}, log) == [1]
    assert f"Block 0 could not be kept in {run.state / 'shards'}" in log.read_text()
    assert not list((run.state / "shards").iterdir()) and not Path(run.output).exists()
    assert go(run) == [0]
    assert_same(tensors_of(run.output), in_memory(run.settings))


@pytest.mark.parametrize("resume, kept", [(False, 1), (True, 1)])
def test_space_on_the_disk_is_checked_before_the_start(resume, kept, split_model, text_file, tmp_path, monkeypatch):
    """Finished blocks are in the output and take no more space."""
    model = split_model("llama")
    size = sum(tensor.nbytes for tensor in tensors_of(model).values())
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(kept * size - 1))
    with pytest.raises(ValueError, match="The pruned model needs 0 MiB in"):
        prune(model, text_file, tmp_path, True, method="wanda", resume=resume)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(kept * size))
    prune(model, text_file, tmp_path, True, method="wanda", resume=resume)
    assert can_share(tmp_path, tmp_path / "missing") and not can_share(tmp_path, Path("/proc"))


@pytest.mark.parametrize("settings, copies", [({"method": "wanda"}, 1), (SETTINGS["joint"] | {"resume": False}, 2)])
def test_space_for_hidden_states_is_checked_before_a_batch(settings, copies, split_model, text_file, tmp_path, monkeypatch):
    """Six windows of 16 tokens and 32 channels, twice where the dense model is followed; they are files if they do not fit."""
    model = split_model("llama")
    size = sum(tensor.nbytes for tensor in tensors_of(model).values())
    hidden = copies * 6 * 16 * 32 * 4
    free, usage = [4 * hidden - 1], namedtuple("usage", "free")
    for place in ("placement", "streaming"):
        monkeypatch.setattr(f"callbacks.blockwise.{place}.free_memory", lambda: free[0])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(size + hidden - 1))
    capture = BlockStream.capture
    monkeypatch.setattr(BlockStream, "capture", None)
    with pytest.raises(ValueError, match="The pruned model with hidden states that host memory has no room for needs 0 MiB in"):
        prune(model, text_file, tmp_path, True, **settings)
    monkeypatch.setattr(BlockStream, "capture", capture)
    free[0] = 4 * hidden
    prune(model, text_file, tmp_path, True, **settings)
    free[0] -= 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(size + hidden))
    prune(model, text_file, tmp_path, True, **settings)


FIT = {"method": "wanda"}


@pytest.mark.parametrize(
    "settings, data, trainer, message",
    [
        ({"offload": True} | FIT, {}, {}, "`offload` = True keeps all blocks in host memory, but `stream` = True"),
        ({"update_rule": "perplexity"}, {}, {}, "`update_rule` expected attention, outlier or fixed with `stream` = True"),
        (
            FIT,
            {"source": "self", "test_source": None},
            {},
            "`source` expected a text, or self with a `self_file` that is there",
        ),
        (FIT, {}, {"precision": "bf16-true"}, "`trainer.precision` expected 32-true or a mixed one with `stream` = True"),
        (None, {}, {}, "expected fit with BlockwisePruning, validate or test but got fit without that callback"),
    ],
)
def test_fits_that_cannot_stream_are_refused(settings, data, trainer, message, split_model, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Shards, "read", None)  # before any weight
    model = split_model("llama")
    callbacks = [] if settings is None else [BlockwisePruning(sparsity=0.5, **settings)]
    text = data_of(model, data.pop("source", text_file), **data) if data else data_of(model, text_file)
    with pytest.raises(ValueError, match=message) as caught:
        quiet(tmp_path, *callbacks, **trainer).fit(CausalLM(model, stream=True), text)
    assert "\n" not in str(caught.value)


def test_strategies_that_split_a_model_are_refused(tmp_path):
    trainer = quiet(tmp_path)
    trainer._accelerator_connector.strategy = FSDPStrategy()
    with pytest.raises(ValueError, match=r"`trainer.strategy` expected auto .one device. or ddp with `model.stream` = True"):
        check_stage(trainer, prunes=True)


def test_prediction_and_models_in_memory_are_refused(split_model, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Shards, "read", None)
    model = split_model("llama")
    with pytest.raises(ValueError, match="but got predict, which would read the whole model for every token"):
        quiet(tmp_path).predict(CausalLM(model, stream=True), data_of(model, text_file))
    with pytest.raises(ValueError, match=r"`stream` = True says how a model is loaded, but .* is a model in memory"):
        CausalLM(make_model("llama"), stream=True)
    with pytest.raises(ValueError, match="`compressed` = 2:4 compresses blocks in memory, but `stream` = True"):
        CausalLM(model, stream=True, compressed="2:4")

"""`save_compressed` of BlockwisePruning and SaveModel: the same model in fewer bytes, whole or not at all, also after kills."""

import json
import signal
from dataclasses import replace

import pytest
import torch

from callbacks import BlockwisePruning, SaveModel
from datamodules import TextDataModule
from lightning_modules import CausalLM
from lightning_modules.expand import expand
from lightning_modules.parts.compressed_files import open_shards
from tests.helpers.launchers import Fault, PruningRun, go, tiny
from tests.helpers.streamed_runs import assert_same, tensors_of
from tests.helpers.tiny import quiet, tiny_vit

COMPRESSED = {"sparsity": 0.5, "save_compressed": True}


def tensors(directory):
    """All tensors of a directory, compressed or plain, with positive zeros."""
    shards = open_shards(directory)
    return {
        name: torch.where(tensor == 0, 0, tensor) for name, tensor in zip(shards.names, shards.read(shards.names), strict=True)
    }


def weights_bytes(directory):
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def data_of(model, text):
    return TextDataModule(model, source=text, seq_len=16, num_calibration=6, num_heldout=4, batch_size=2)


def prune(model, text, folder, **settings):
    callback = BlockwisePruning(**{"sparsity": 0.6, "output_dir": str(folder / "pruned")} | settings)
    quiet(folder, callback).fit(CausalLM(model), data_of(model, text))
    return callback


@pytest.mark.parametrize("stream", [False, True])
def test_the_pruned_model_is_that_of_a_plain_run(stream, tiny_model, text_file, tmp_path):
    model, found = tiny_model("llama"), []
    for compressed in (False, True):
        folder = tmp_path / str(compressed)
        callback = BlockwisePruning(sparsity=0.6, output_dir=str(folder / "pruned"), save_compressed=compressed)
        module = CausalLM(model, stream=stream)
        quiet(folder, callback).fit(module, data_of(model, text_file))
        found.append(callback.metrics)
    plain, compressed = (tmp_path / name / "pruned" for name in ("False", "True"))
    assert found[0] == found[1] and found[1]["pruned"]["val/perplexity"] > 0
    assert_same(tensors(compressed), tensors(plain))
    assert not list(compressed.glob("model*")) and not list(plain.glob("compressed*"))
    assert weights_bytes(compressed) < 0.75 * weights_bytes(plain)  # embeddings and head of a tiny model are large
    assert (compressed / "config.json").read_bytes() == (plain / "config.json").read_bytes()
    cards = [(path / "README.md").read_text() for path in (plain, compressed)]
    assert "the files are as large" in cards[0] and "lightning_modules.expand" in cards[1]
    assert {path.name for path in (tmp_path / "True").iterdir()} <= {"pruned", ".pruned.lock"}
    for directory in (plain, compressed):  # validated again from its files
        (metrics,) = quiet(tmp_path).validate(CausalLM(str(directory), stream=stream), data_of(model, text_file), verbose=False)
        assert metrics["val/loss"] == pytest.approx(found[0]["pruned"]["val/loss"], rel=1e-6)


def test_a_compressed_model_is_pruned_further_and_continues_text(tiny_model, text_file, tmp_path):
    prune(tiny_model("llama"), text_file, tmp_path / "first", save_compressed=True)
    model = str(tmp_path / "first" / "pruned")
    again = prune(model, text_file, tmp_path / "second", sparsity=0.8, method="wanda")
    assert again.records[0].sparsity == pytest.approx(0.8, abs=0.02)
    expand(tmp_path / "first" / "pruned", tmp_path / "plain")
    texts = [
        quiet(tmp_path).predict(CausalLM(path, max_new_tokens=3), data_of(path, text_file))
        for path in (model, str(tmp_path / "plain"))
    ]
    assert texts[0] == texts[1]


def test_save_model(tiny_model, text_file, tmp_path):
    """Twice into one directory, in either form: the other one of the earlier run is gone."""
    for compressed in (False, True, False):
        module = CausalLM(tiny_model("llama"), learning_rate=0.0)
        module.configure_model()
        for parameter in module.model.parameters():
            parameter.data[..., ::2] = 0
        before = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
        callback = SaveModel(str(tmp_path / "out"), save_compressed=compressed)
        quiet(tmp_path, callback, max_steps=1).fit(module, data_of(tiny_model("llama"), text_file))
        kinds = {path.name.split(".")[0] for path in (tmp_path / "out").glob("*.safetensors")}
        assert (
            kinds == {"compressed" if compressed else "model"} and (tmp_path / "out" / "compressed.json").exists() == compressed
        )
        loaded = CausalLM(str(tmp_path / "out"))
        loaded.configure_model()
        assert_same(loaded.model.state_dict(), before)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    return PruningRun(*tiny(folder), str(folder / "whole"), settings=COMPRESSED)


@pytest.fixture(scope="module")
def whole(run):
    """Bytes of the compressed model of a run that nothing happened to."""
    assert go(run) == [0] and not run.state.exists()
    return bytes_of(run)


def bytes_of(run):
    return (run.state.with_suffix("") / "compressed.safetensors").read_bytes()


FAULTS = [
    Fault("before a file is renamed", 3),
    Fault("before weights are compressed", 1),
    Fault("before a shard is written", 1),
    Fault("before the mark is written", 1),
    Fault("model saved", 1),
    Fault("state removed", 1),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.place)
def test_killed_and_resumed(fault, run, whole, tmp_path):
    again = replace(run, output=str(tmp_path / "pruned"))
    assert go(again, {0: fault}) == [-signal.SIGKILL]
    finished = fault.place == "state removed"
    assert (tmp_path / "pruned").exists() == finished and (not finished or bytes_of(again) == whole)
    assert go(again) == [0] and bytes_of(again) == whole and not again.state.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"pruned", ".pruned.lock"}


@pytest.mark.parametrize("place", ["before a shard is written", "before the mark is written"])
def test_a_model_that_a_dead_run_would_have_replaced_stays(place, run, whole, tmp_path):
    again = replace(run, output=str(tmp_path / "pruned"))
    assert go(again) == [0]
    other = replace(again, settings=COMPRESSED | {"sparsity": 0.7})
    assert go(other, {0: Fault(place, 1)}) == [-signal.SIGKILL] and bytes_of(again) == whole
    assert go(other) == [0] and bytes_of(other) != whole


@pytest.mark.parametrize(
    "place, count", [("before a shard is written", 2), ("before a shard is written", 6), ("before the mark is written", 1)]
)
def test_a_streamed_run_killed_and_resumed(place, count, run, whole, tmp_path):
    """The first kill is at a block, the second while the finished ones are compressed."""
    streamed = replace(run, output=str(tmp_path / "pruned"), stream=True)
    assert go(streamed, {0: Fault(place, count)}) == [-signal.SIGKILL] and not (tmp_path / "pruned").exists()
    assert go(streamed) == [0] and not streamed.state.exists()
    assert_same(tensors(tmp_path / "pruned"), tensors(run.state.with_suffix("")))
    assert {path.name for path in tmp_path.iterdir()} == {"pruned", ".pruned.lock"}


def test_several_processes(run, whole, tmp_path):
    both = replace(run, output=str(tmp_path / "pruned"), processes=2)
    assert go(both) == [0, 0]
    plain = replace(both, output=str(tmp_path / "plain"), settings={"sparsity": 0.5})
    assert go(plain) == [0, 0]
    assert_same(
        tensors(tmp_path / "pruned"), {name: torch.where(t == 0, 0, t) for name, t in tensors_of(tmp_path / "plain").items()}
    )


def test_a_write_that_fails_leaves_the_earlier_model(tiny_model, text_file, tmp_path, monkeypatch):
    prune(tiny_model("llama"), text_file, tmp_path, save_compressed=True)
    before = (tmp_path / "pruned" / "compressed.safetensors").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_modules.parts.compressed_files.write_shard", full)
    with pytest.raises(OSError, match=r"could not be written \(No space left on device\); what was there is unchanged"):
        prune(tiny_model("llama"), text_file, tmp_path, save_compressed=True, method="wanda")
    assert (tmp_path / "pruned" / "compressed.safetensors").read_bytes() == before
    with pytest.raises(OSError, match="No space left"):
        fit = quiet(tmp_path, SaveModel(str(tmp_path / "pruned"), save_compressed=True), max_steps=1).fit
        fit(CausalLM(tiny_model("llama")), data_of(tiny_model("llama"), text_file))
    assert (tmp_path / "pruned" / "compressed.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".pruned-*"))


def test_space_for_the_dense_files_is_checked_before_the_start(tiny_model, text_file, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("callbacks.blockwise_pruning.check_space", lambda directory, needed, what: asked.append((needed, what)))
    for compressed in (False, True):
        prune(tiny_model("llama"), text_file, tmp_path / str(compressed), save_compressed=compressed)
    assert asked[1][0] == 2 * asked[0][0] and asked[1][1] == "The pruned model beside the dense files that are compressed"


def test_what_does_not_apply_is_refused(tiny_model, text_file, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    makes = (
        lambda **options: BlockwisePruning(sparsity=0.5, save_compressed=True, **options),
        lambda **options: SaveModel(save_compressed=True, **options),
    )
    for make in makes:
        with pytest.raises(
            ValueError, match=r"`save_compressed` = True writes files .* but `push_to_hub` = 'me/mine' publishes"
        ):
            make(push_to_hub="me/mine").setup(quiet(tmp_path), CausalLM(tiny_model("llama")), "fit")
        module = tiny_vit()
        with pytest.raises(ValueError, match=r"`save_compressed` = True expected a CausalLM, .* but got TinyViT. Leave it out"):
            make().setup(quiet(tmp_path), module, "fit")
    with pytest.raises(ValueError, match="`save_compressed` expected true or false but got 'yes'"):
        SaveModel(save_compressed="yes").setup(quiet(tmp_path), CausalLM(tiny_model("llama")), "fit")


def test_the_report_knows_nothing_of_it(tiny_model, text_file, tmp_path):
    """A plain and a compressed model differ in their files only."""
    prune(tiny_model("llama"), text_file, tmp_path, save_compressed=True)
    assert "save_compressed" not in json.loads((tmp_path / "pruned" / "pruning.json").read_text())["settings"]
    assert "compress" not in (tmp_path / "pruned" / "config.json").read_text()

"""Streamed runs of families whose blocks are discovered (mixtures of experts, hybrids, vision-language models): the bits of
runs in memory, with few blocks there at a time."""

import json
import signal
from dataclasses import replace

import pytest
import torch
import transformers
from lightning.pytorch import seed_everything

from callbacks import BlockwisePruning, DropExperts
from datamodules import TextDataModule
from lightning_modules import CausalLM
from lightning_modules.parts.streamed import StreamedBlocks
from tests.helpers.launchers import Fault, PruningRun, go
from tests.helpers.streamed_runs import assert_same, tensors_of
from tests.helpers.tiny import MIXTURES, make_mixture, make_tokenizer, make_unprunable, quiet
from tests.lightning_modules.parts.test_discovery import WITHOUT_ENTRY, model_of
from tests.lightning_modules.parts.test_vision_language import FAMILIES as VISION_LANGUAGE
from tests.lightning_modules.parts.test_vision_language import save_dense

SIZES = {"seq_len": 16, "num_calibration": 6, "num_heldout": 4, "batch_size": 2}
JOINT = {"method": "d2_sparsegpt", "solver": "joint"}
OWL = {"method": "sparsegpt", "allocation": "owl"}
WANDA = {"method": "wanda"}


@pytest.fixture(scope="module")
def split_model(tmp_path_factory):
    """family -> directory of a tiny model, with a tokenizer; its files split blocks, and experts of a layer."""
    made = {}

    def build(family, dtype=torch.float32):
        if (family, dtype) not in made:
            made[family, dtype] = folder = tmp_path_factory.mktemp(f"split-{family}")
            if family in VISION_LANGUAGE:
                save_dense(family, folder)
            else:
                model = make_mixture(family) if family in MIXTURES else model_of(family)
                model.to(dtype).save_pretrained(folder, max_shard_size="12KB")
            make_tokenizer("llama").save_pretrained(folder)
        return str(made[family, dtype])

    return build


def prune(model, text, folder, stream, **settings):
    seed_everything(0, verbose=False)
    callback = BlockwisePruning(sparsity=0.5, output_dir=str(folder / "pruned"), **settings)
    module = CausalLM(model, stream=stream)
    quiet(folder, callback).fit(module, TextDataModule(model, source=text, **SIZES))
    return module, callback


CASES = [(family, settings) for family in MIXTURES for settings in (JOINT, OWL)]
CASES += [(family, JOINT if family in ("mamba", "lfm2") else WANDA) for family in WITHOUT_ENTRY if family not in MIXTURES]
CASES += [(family, WANDA) for family in VISION_LANGUAGE if family != "mllama"]
CASES += [("mixtral", {}), ("qwen3_moe", WANDA | {"ignore": ["*.1.*"]})]


@pytest.mark.parametrize("family, settings", CASES)
def test_a_streamed_run_has_the_bits_of_one_in_memory(family, settings, split_model, text_file, tmp_path):
    model = split_model(family)
    runs = [prune(model, text_file, tmp_path / str(stream), stream, **settings) for stream in (False, True)]
    folders = [tmp_path / str(stream) / "pruned" for stream in (False, True)]
    assert_same(tensors_of(folders[1]), tensors_of(folders[0]))
    assert runs[0][1].metrics == runs[1][1].metrics and "val/perplexity" in runs[1][1].metrics["pruned"]
    for file in ("config.json", "generation_config.json", "processor_config.json"):
        kept = [(folder / file).read_text(encoding="utf-8") for folder in folders if (folder / file).exists()]
        assert len(kept) in (0, 2) and len(set(kept)) <= 1, file
    reports = [json.loads((folder / "pruning.json").read_text(encoding="utf-8")) for folder in folders]
    discovered = [report["model"]["discovered"] for report in reports]
    assert discovered[0] == discovered[1] and "Run block by block they give the model's own logits" in discovered[1]
    for name in ("expert_tokens", "borrowed_tokens"):
        assert [block.get(name) for block in reports[1]["blocks"]] == [block.get(name) for block in reports[0]["blocks"]]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "granitemoe"])
def test_half_precision(family, split_model, text_file, tmp_path):
    """Of DeepSeek-V3 transformers keeps biases of the router in float32."""
    model = split_model(family, torch.bfloat16)
    for stream in (False, True):
        prune(model, text_file, tmp_path / str(stream), stream, method="sparsegpt")
    assert_same(tensors_of(tmp_path / "True" / "pruned"), tensors_of(tmp_path / "False" / "pruned"))


def test_transformers_loads_the_result(split_model, text_file, tmp_path):
    module, _ = prune(split_model("qwen3_moe"), text_file, tmp_path, True, method="wanda")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    ids = torch.arange(2, 42).view(2, 20)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, module.eval()(ids))


def test_no_more_than_two_blocks_are_there_and_discovery_reads_each_three_times(split_model, text_file, tmp_path, monkeypatch):
    """To compare experts, for the logits, and on its own; the first one also to see what it returns."""
    counts, read = [], StreamedBlocks._read

    def counting(self, block):
        read(self, block)
        counts.append(sum(self._is_there(other) for other in self.blocks))

    monkeypatch.setattr(StreamedBlocks, "_read", counting)
    prune(split_model("mixtral"), text_file, tmp_path, True, **JOINT)
    assert max(counts) == 2
    counts.clear()
    module = CausalLM(split_model("mixtral"), stream=True)
    module.configure_model()
    assert not counts
    assert module.architecture.experts == ("mlp.experts",) and set(counts) == {1} and len(counts) == 3 * 2 + 1


@pytest.mark.parametrize("family", [*MIXTURES, "mamba", "gemma3"])
def test_evaluation_has_the_bits_of_the_whole_model(family, split_model, text_file, tmp_path):
    model, found = split_model(family), []
    for stream in (False, True):
        data = TextDataModule(model, source=text_file, **SIZES)
        found.append(quiet(tmp_path).validate(CausalLM(model, stream=stream), data, verbose=False))
    assert found[0] == found[1]


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_started_again(processes, split_model, text_file, tmp_path):
    model, settings = split_model("mixtral"), {"sparsity": 0.5} | JOINT
    whole = PruningRun(model, str(text_file), str(tmp_path / "whole"), settings=settings, data=SIZES | {"num_calibration": 8})
    run = replace(whole, output=str(tmp_path / "pruned"), processes=processes, stream=True)
    assert go(whole) == [0]
    assert (
        go(run, {0: Fault("before a file is renamed", 4)})[0] == -signal.SIGKILL
    )  # fingerprint, a block, the next one's shard
    assert len(list((run.state / "shards").glob("*.safetensors"))) == 1
    assert go(run) == [0] * processes
    assert_same(tensors_of(run.output), tensors_of(whole.output))


REFUSED = (
    r"Argument `stream` = True expected a model whose blocks run one by one. Model type 'rwkv' is not in ARCHITECTURES, and "
    r"could not be discovered: .* Add an entry .* Without `stream` it can be evaluated"
)


def test_what_cannot_be_run_block_by_block_is_refused(text_file, tmp_path):
    make_unprunable().save_pretrained(tmp_path / "dense")
    make_tokenizer("llama").save_pretrained(tmp_path / "dense")
    data = TextDataModule(str(tmp_path / "dense"), source=text_file, **SIZES)
    callback = BlockwisePruning(sparsity=0.5, method="wanda", output_dir=str(tmp_path / "pruned"))
    for trainer, stage in ((quiet(tmp_path, callback), "fit"), (quiet(tmp_path), "validate")):
        with pytest.raises(ValueError, match=REFUSED) as caught:
            getattr(trainer, stage)(CausalLM(str(tmp_path / "dense"), stream=True), data)
        assert "\n" not in str(caught.value)


def test_experts_are_dropped_in_memory_only(split_model, text_file, tmp_path):
    model = split_model("mixtral")
    with pytest.raises(ValueError, match="`stream` = True expected fit with BlockwisePruning but got DropExperts"):
        data = TextDataModule(model, source=text_file, **SIZES)
        quiet(tmp_path, DropExperts(0.25, str(tmp_path / "smaller"))).fit(CausalLM(model, stream=True), data)

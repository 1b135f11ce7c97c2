"""Blocks in the host's memory, and batches as large as the device takes: the same result, from other places."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from callbacks import BlockwisePruning, FixedRule
from callbacks.blockwise.placement import DEFAULT_WINDOWS, Placement, windows_at_a_time
from datamodules import TextDataModule
from lightning_modules import CausalLM

ON_GPU = torch.cuda.is_available()


def prune(model, text, folder, batch_size=2, **settings):
    callback = BlockwisePruning(sparsity=0.5, output_dir=str(folder), **settings)
    data = TextDataModule(
        source=str(text), tokenizer=model, seq_len=16, num_calibration=6, num_heldout=4, batch_size=batch_size
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    module, trainer = CausalLM(model), Trainer(callbacks=[callback], devices=1, default_root_dir=folder, **quiet)
    trainer.fit(module, datamodule=data)
    return load_file(folder / "model.safetensors"), callback, module


@pytest.mark.parametrize(
    "settings", [{"update_rule": FixedRule("v")}, {}, {"update_rule": "perplexity"}, {"method": "wanda"}, {"solver": "joint"}]
)
def test_offload_changes_no_bit(tiny_model, text_file, tmp_path, settings):
    found = [
        prune(tiny_model("llama"), text_file, tmp_path / str(offload), offload=offload, **settings) for offload in (True, False)
    ]
    assert found[0][0].keys() == found[1][0].keys()
    assert all(torch.equal(found[0][0][name], weight) for name, weight in found[1][0].items())
    assert found[0][1].metrics == found[1][1].metrics
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in found[0][2].blocks.values())


def test_only_the_blocks_that_are_held_are_on_the_device(tiny_model, monkeypatch):
    """With a stand-in for a device that every machine has: meta."""
    module = CausalLM(tiny_model("llama"))
    module.configure_model()
    strategy = SimpleNamespace(root_device=torch.device("meta"))
    offload = Placement(module, SimpleNamespace(strategy=strategy), offload=True)
    strategy.model_to_device()
    devices = [next(block.parameters()).device.type for block in module.blocks.values()]
    assert devices == ["cpu"] * 3 and module.model.lm_head.weight.device.type == "meta" and module.device.type == "meta"
    offload.hold(range(0, 2))
    assert [next(block.parameters()).device.type for block in module.blocks.values()] == ["meta", "meta", "cpu"]
    moves = []  # what is on meta has no data to come back with: from here on moves are only noted
    for index, block in enumerate(module.blocks.values()):
        monkeypatch.setattr(block, "to", lambda device, index=index: moves.append((index, str(device))))
    offload.hold(range(1, 3))
    assert moves == [(0, "cpu"), (1, "meta"), (2, "meta")]


def test_windows_at_a_time(tiny_model, monkeypatch):
    module = CausalLM(tiny_model("llama"))
    module.configure_model()
    assert windows_at_a_time(module, 16, 100, torch.device("cpu")) == DEFAULT_WINDOWS
    assert windows_at_a_time(module, 16, 3, torch.device("cpu")) == 3
    memory = SimpleNamespace(total_memory=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    linears = module.linears(next(iter(module.blocks.values()))).values()
    token = 4 * sum(linear.in_features + 2 * linear.out_features for linear in linears)
    for windows, expected in ((1, 1), (3, 2), (7, 4), (9, 8), (99, 8)):  # powers of two, of 10
        memory.total_memory = 8 * windows * 16 * token + 8
        assert windows_at_a_time(module, 16, 10, torch.device("cuda")) == expected
    memory.total_memory = 0
    assert windows_at_a_time(module, 16, 10, torch.device("cuda")) == 1, "one window has to fit"
    memory.total_memory = 2**60
    assert windows_at_a_time(module, 4096, 1000, torch.device("cuda")) == 16, "no more tokens than serve a GPU"


def test_auto_batch_size_of_a_run(tiny_model, text_file, tmp_path):
    weights, _, _ = prune(tiny_model("llama"), text_file, tmp_path / "auto", "auto", update_rule=FixedRule("v"))
    if not ON_GPU:  # as many windows as there are, of at most 8
        six, _, _ = prune(tiny_model("llama"), text_file, tmp_path / "six", 6, update_rule=FixedRule("v"))
        assert all(torch.equal(weights[name], six[name]) for name in six)
    assert weights
    with pytest.raises(ValueError, match="`batch_size`"):
        TextDataModule(source=str(text_file), batch_size="all")

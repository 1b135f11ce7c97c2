"""Killed runs and two processes give the same bits where weights are transposed, parts are rows apart, blocks differ, or
downsample.
"""

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from callbacks import BlockwisePruning
from datamodules import TextDataModule
from lightning_modules import CausalLM
from tests.helpers.launchers import PruningRun, go
from tests.helpers.tiny import (
    MIXTURES,
    make_mixture,
    make_model,
    make_tokenizer,
    quiet,
    tiny_images,
    vision_classifier,
)
from tests.lightning_modules.parts.test_discovery import model_of


class Death(Callback):
    """Kills the run after its first block but one, or its first of two."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == len(pl_module.blocks) - 2:
            raise KeyError


def dense_of(family):
    return (make_mixture if family in MIXTURES else model_of if family == "lfm2" else make_model)(family)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "lfm2", "deepseek_v3", "gpt_oss"])
def test_a_killed_run_goes_on_to_the_same_bits(family, tiny_model, text_file, tmp_path):
    dense_of(family).save_pretrained(tmp_path / "dense")

    def run(folder, *more):
        data = TextDataModule(tiny_model("llama"), text_file, seq_len=20, num_calibration=8, num_heldout=2, batch_size=2)
        settings = {"method": "d2_sparsegpt", "solver": "joint", "allocation": "error", "resume": True}
        callback = BlockwisePruning(sparsity=0.5, **settings, output_dir=str(tmp_path / folder))
        module = CausalLM(str(tmp_path / "dense"))
        quiet(tmp_path, callback, *more, max_epochs=None).fit(module, data)
        return {name: value.clone() for name, value in module.model.state_dict().items()}

    whole = run("whole")
    with pytest.raises(KeyError):
        run("killed", Death())
    assert (tmp_path / "killed.state").exists()
    again = run("killed")
    assert all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.parametrize("killed_in", [1, 5])
def test_a_killed_run_through_stages_goes_on_to_the_same_bits(killed_in, tmp_path):
    """The second of eight modules of a Swin is a block, the sixth downsamples."""

    class LaterDeath(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == killed_in:
                raise KeyError

    def run(folder, *more):
        module = vision_classifier("swin")
        settings = {"method": "d2_sparsegpt", "solver": "joint", "allocation": "error", "resume": True}
        callback = BlockwisePruning(sparsity=0.5, **settings, output_dir=str(tmp_path / folder))
        images = DataLoader(tiny_images(8, 0, 32), batch_size=4)
        quiet(tmp_path, callback, *more, max_epochs=None).fit(module, images)
        return {name: value.clone() for name, value in module.model.state_dict().items()}

    whole = run("whole")
    with pytest.raises(KeyError):
        run("killed", LaterDeath())
    again = run("killed")
    assert all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen3_moe"])
def test_two_processes_give_the_bits_of_one(family, text_file, tmp_path):
    dense_of(family).save_pretrained(tmp_path / "dense")
    make_tokenizer(family).save_pretrained(tmp_path / "dense")
    settings = {"method": "d2_sparsegpt", "solver": "joint", "sparsity": 0.5}
    data = {"seq_len": 20, "num_calibration": 8, "num_heldout": 2, "batch_size": 2}
    found = []
    for processes in (1, 2):
        output = tmp_path / f"by_{processes}"
        go(PruningRun(str(tmp_path / "dense"), str(text_file), str(output), processes, settings=settings, data=data))
        found.append(load_file(output / "model.safetensors"))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())

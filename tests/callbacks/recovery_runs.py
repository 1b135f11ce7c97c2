"""What the tests of recovery share: a pruned tiny model, a quiet Trainer, and runs for several processes."""

from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer

from callbacks.keep_sparsity import linear_weights
from callbacks.lora import LoRA
from callbacks.save_model import SaveModel

LEARNING_RATE = 3e-3


def prune_two_of_four(module):
    """Two zeros in every four weights of a row, anywhere."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in linear_weights(module).values():
            scores = torch.rand(weight.shape[0], weight.shape[1] // 4, 4, generator=generator)
            weight.masked_fill_((scores.argsort(-1) < 2).view_as(weight), 0)


def quiet(folder, *callbacks, **options):
    """A Trainer that writes nothing by itself."""
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    options = {"enable_checkpointing": False, "max_epochs": 1, "accelerator": "cpu", "devices": 1} | options
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **silent, **options)


@dataclass(frozen=True)
class RecoveryRun:
    """Training of a pruned model directory on a text file, in several processes; each writes the weights that it ends with.

    Attributes:
        model: Directory.
        text: File.
        output: Directory.
        callback: KeepSparsity or LoRA.
    """

    model: str
    text: str
    output: str
    callback: str
    processes: int = 2
    nodes: int = 1

    def work(self):
        from benchmarks.fault_runs import quiet_trainer
        from callbacks.keep_sparsity import KeepSparsity
        from datamodules import TextDataModule
        from lightning_modules import CausalLM

        folder = Path(self.output)
        callbacks: list[Callback] = [LoRA()] if self.callback == "LoRA" else [KeepSparsity(), SaveModel()]
        trainer = quiet_trainer(self, folder, callbacks=callbacks, max_epochs=1, enable_checkpointing=False)
        data = TextDataModule(
            self.model, source=self.text, seq_len=12, num_calibration=16 * self.processes, num_heldout=4, batch_size=2
        )
        module = CausalLM(self.model, learning_rate=LEARNING_RATE)
        trainer.fit(module, data)
        weights = {name: weight.clone() for name, weight in linear_weights(module).items()}
        torch.save({"weights": weights, "steps": trainer.global_step}, folder / f"rank{trainer.global_rank}.pt")

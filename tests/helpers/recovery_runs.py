"""What the tests of what comes after pruning share: a pruned tiny model, its text, and runs in several processes."""

from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback

from callbacks.base.sparsity import linear_weights
from callbacks.keep_sparsity import KeepSparsity
from callbacks.lora import LoRA
from callbacks.save_model import SaveModel
from datamodules import TextDataModule
from lightning_modules import CausalLM
from tests.helpers.launchers import quiet_trainer

LEARNING_RATE = 3e-3


def prune_two_of_four(module):
    """Two zeros in every four weights of a row, anywhere."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in linear_weights(module).values():
            scores = torch.rand(weight.shape[0], weight.shape[1] // 4, 4, generator=generator)
            weight.masked_fill_((scores.argsort(-1) < 2).view_as(weight), 0)


def loaded(directory):
    """The language model of a directory, in memory."""
    module = CausalLM(directory)
    module.configure_model()
    return module


def short_windows(model, text, **options):
    """Windows of 12 tokens of a text file, two a batch."""
    sizes = {"seq_len": 12, "num_calibration": 8, "num_heldout": 4, "batch_size": 2} | options
    return TextDataModule(model, source=text, **sizes)


class Crash(Callback):
    """Ends a run in its second epoch."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == 1:
            raise RuntimeError("a power cut")


@dataclass(frozen=True)
class TextRun:
    """What several processes do with a model directory and a text file; subclasses say what, in `work`.

    Attributes:
        model: Directory.
        text: File.
        output: Directory.
        processes: Number of them, on gloo.
        nodes: The processes are said to be on so many machines.
    """

    model: str
    text: str
    output: str
    processes: int = 2
    nodes: int = 1


@dataclass(frozen=True)
class RecoveryRun(TextRun):
    """Training of a pruned model; each process writes the weights that it ends with.

    Attributes:
        callback: KeepSparsity or LoRA.
    """

    callback: str = "KeepSparsity"

    def work(self):
        folder = Path(self.output)
        callbacks: list[Callback] = [LoRA()] if self.callback == "LoRA" else [KeepSparsity(), SaveModel()]
        trainer = quiet_trainer(self, folder, callbacks=callbacks, max_epochs=1, enable_checkpointing=False)
        module = CausalLM(self.model, learning_rate=LEARNING_RATE)
        trainer.fit(module, short_windows(self.model, self.text, num_calibration=16 * self.processes))
        weights = {name: weight.clone() for name, weight in linear_weights(module).items()}
        torch.save({"weights": weights, "steps": trainer.global_step}, folder / f"rank{trainer.global_rank}.pt")

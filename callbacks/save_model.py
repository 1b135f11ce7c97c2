"""SaveModel: writes the trained model in its own library's format, so that pruning and other tools can load the directory."""

import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from callbacks.base.model_card import CardContent, card_of, check_place, last_metrics, share_of_zeros, sparse_tags, write_card
from callbacks.base.push import check_access, check_repository, upload
from callbacks.base.saving import check_compressed, how_stored, save_model
from lightning_modules.base.prunable import PrunableModule
from lightning_modules.parts import adapters
from lightning_modules.parts.compressed_files import remove_other_form
from utilities.files import check_writable, move_files


class SaveModel(Callback):
    """Write the model and its model card at the end of `fit`.

    Every file is written under another name and renamed, so that a reader finds an old file or a new one, never a part. Other
    files in the directory stay. A README.md that no run has written is an error.

    Args:
        output_dir: Directory of the model; `model` in the log directory when None.
        push_to_hub: Repository on the Hugging Face hub, owner/name, to which the finished directory is uploaded. One that
            does not exist is created as a private one. Nothing is uploaded when None.
        save_compressed: Whether matrices that get smaller are stored as masks and values: about 0.56 of their bytes at 50 %
            zeros and 16 bit. Only this project loads the directory; `python -m lightning_modules.expand` makes a plain one.

    Raises:
        ValueError: If `push_to_hub` does not have the form owner/name.
    """

    def __init__(self, output_dir: str | None = None, push_to_hub: str | None = None, save_compressed: bool = False) -> None:
        check_repository(push_to_hub)
        self.output_dir, self.push_to_hub, self.save_compressed = output_dir, push_to_hub, save_compressed

    @override
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if not isinstance(pl_module, PrunableModule):
            raise TypeError(
                f"{type(self).__name__} needs a module with a `save`, such as CausalLM, but got {type(pl_module).__name__}."
            )
        if stage != "fit":
            return
        check_compressed(pl_module, self.save_compressed, self.push_to_hub)
        target = self.target(trainer)
        if self.output_dir is not None:
            if target.is_file():
                raise ValueError(f"Argument `output_dir` = {self.output_dir!r} is a file. Give a directory.")
            check_writable(target)
        check_place(target, pushed=self.push_to_hub is not None)
        check_access(trainer, self.push_to_hub)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        target, metrics = self.target(trainer), last_metrics(trainer)  # every process is asked for both
        if not trainer.is_global_zero:
            return
        target.mkdir(parents=True, exist_ok=True)
        self.write(pl_module, target)
        write_card(target, card_of(trainer, pl_module, self.content(trainer, pl_module, metrics)))
        self.announce(pl_module, target)
        if self.push_to_hub is not None:  # in one process and last: others do not wait, nothing is lost if it fails
            upload(target, self.push_to_hub)

    def content(self, trainer: Trainer, pl_module: PrunableModule, metrics: dict[str, float]) -> CardContent:
        """Write the callback's part of the model card.

        Args:
            trainer: Trainer of the run.
            pl_module: Module whose model was written.
            metrics: Last metrics of the run, without those of training batches.
        """
        zeros = share_of_zeros(pl_module)
        return CardContent(
            title="trained",
            summary=f"Trained. {how_stored(True)}"
            if self.save_compressed
            else "Trained, and written in the format of the model's own library.",
            settings=training_settings(trainer),
            metrics={"trained": metrics},
            sparsity={} if zeros is None else {"trained": zeros},
            tags=sparse_tags(zeros),
        )

    def announce(self, pl_module: PrunableModule, target: Path) -> None:
        """Print where the model is. Called in one process."""
        rank_zero_info(f"Model written to {target}.")

    def target(self, trainer: Trainer) -> Path:
        """Return the directory of the model. Call it in all processes: the first one tells the others its log directory."""
        return Path(self.output_dir or Path(trainer.log_dir or trainer.default_root_dir) / "model").expanduser()

    def write(self, pl_module: PrunableModule, target: Path) -> None:
        """Write the files of the model into a directory. Called in one process."""
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            save_model(pl_module, Path(scratch), self.save_compressed)
            (target / adapters.CONFIG).unlink(missing_ok=True)  # adapters of an earlier run would be added to this model
            move_files(Path(scratch), target)
            remove_other_form(target, self.save_compressed)


def training_settings(trainer: Trainer) -> dict[str, Any]:
    """Return how long a model was trained, for its card."""
    return {"training": {"epochs": trainer.current_epoch, "steps": trainer.global_step}}

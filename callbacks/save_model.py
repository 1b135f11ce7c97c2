"""SaveModel: writes the trained model in its own library's format, so that pruning and other tools load it by its directory."""

import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_modules.base.prunable import PrunableModule
from lightning_modules.parts import adapters
from utilities.files import check_writable, move_files


class SaveModel(Callback):
    """Write the model at the end of `fit`.

    Every file is written beside its place and renamed, so a reader finds an old file or a new one. Files of other names in
    the directory stay.

    Args:
        output_dir: Where to; `model` in the log directory when None.
    """

    def __init__(self, output_dir: str | None = None) -> None:
        self.output_dir = output_dir

    @override
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if not isinstance(pl_module, PrunableModule):
            raise TypeError(
                f"{type(self).__name__} needs a module with a `save`, such as CausalLM, but got {type(pl_module).__name__}."
            )
        if self.output_dir is None or stage != "fit":
            return
        target = Path(self.output_dir).expanduser()
        if target.is_file():
            raise ValueError(f"Argument `output_dir` = {self.output_dir!r} is a file. Give a directory.")
        check_writable(target)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        target = self.target(trainer)
        if trainer.is_global_zero:
            target.mkdir(parents=True, exist_ok=True)
            self.write(pl_module, target)
            rank_zero_info(f"Model written to {target}.")

    def target(self, trainer: Trainer) -> Path:
        """Where the model goes; all processes have to ask, since the log directory is the first one's."""
        return Path(self.output_dir or Path(trainer.log_dir or trainer.default_root_dir) / "model").expanduser()

    def write(self, pl_module: PrunableModule, target: Path) -> None:
        """Write the files of the model into a directory, in one process."""
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            pl_module.save(Path(scratch))
            (target / adapters.CONFIG).unlink(missing_ok=True)  # those of an earlier run would be added to this model
            move_files(Path(scratch), target)

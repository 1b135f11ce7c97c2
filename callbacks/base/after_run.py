"""AfterRun: base of callbacks that use the model at the end of any run."""

from abc import ABC, abstractmethod

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override


class AfterRun(Callback, ABC):
    """Call `after_run` at the end of `validate`, `test` and `fit`, but not after a validation within `fit`."""

    @abstractmethod
    def after_run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Use the model. Called in all processes."""

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.after_run(trainer, pl_module)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.after_run(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.after_run(trainer, pl_module)

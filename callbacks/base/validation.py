"""Runs the module's own validation in the middle of a `fit`."""

from lightning.pytorch import Trainer


def validate_within_fit(trainer: Trainer) -> dict[str, float]:
    """Run the validation loop, as the training loop does between batches.

    Returns:
        Logged metrics by name; empty without held-out data.
    """
    if not trainer.enable_validation:
        return {}
    connector = trainer._logger_connector
    first_loop_iter = connector._first_loop_iter
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first_loop_iter
    return {name: float(value) for name, value in trainer.callback_metrics.items()}

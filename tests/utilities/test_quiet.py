"""The noise of libraries is silenced; what they warn of otherwise is not."""

import logging
import warnings

import pytest

from utilities.quiet import LOGGERS, quiet


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("`LightningModule.configure_optimizers` returned `None`, this fit will run with no optimizer", False),
        ("Found 215 module(s) in eval mode at the start of training. This may lead to", False),
        ("The number of training batches (4) is smaller than the logging interval Trainer(log_every_n_steps=50).", False),
        ("The 'val_dataloader' does not have many workers which may be a bottleneck.", False),
        ("`isinstance(treespec, LeafSpec)` is deprecated, use `isinstance(treespec, TreeSpec)` instead", False),
        ("Argument `seq_len` = 100 is more than the 64 positions", True),
    ],
)
def test_warnings(message, shown):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet()
        warnings.warn(message, stacklevel=1)
    assert bool(caught) == shown


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("💡 Tip: For seamless cloud logging and experiment tracking, try installing [litlogger]", False),
        ("GPU available: False, used: False", False),
        ("Seed set to 0", False),
        ("`Trainer.fit` stopped: `max_epochs=30` reached.", False),
        ("Text, 512 tokens a window: calibration 32 windows", True),
    ],
)
@pytest.mark.parametrize("name", LOGGERS)
def test_log_records(message, shown, name, caplog):
    quiet()
    with caplog.at_level("INFO"):
        logging.getLogger(name).info(message)
    assert bool(caplog.records) == shown

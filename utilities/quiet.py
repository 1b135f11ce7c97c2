"""Silence messages of libraries that come in every run and that no user of this project can act on."""

import logging
import warnings

MESSAGES = (
    r"`max_epochs` was not set",  # the number of epochs of a pruning run is that of its blocks
    r"Found \d+ module\(s\) in eval mode",  # calibration wants eval mode
    r".*configure_optimizers` returned `None`",
    r".*smaller than the logging interval",
    r"It is recommended to use `self\.log",  # what is logged comes from torchmetrics, which has summed over processes by then
    r".*does not have many workers",
    r".*isinstance\(treespec, LeafSpec\)",
    r".*(skip_none|instantiate_classes|add_instantiator).*deprecated",
    r"Sparse (CSR tensor support is in beta|invariant checks are implicitly disabled)",
    r"`torch\.jit\.script` is deprecated",
    r"`is_gradient_checkpointing` is deprecated",
    r"Checkpoint directory .* exists and is not empty",
    r"The '.*_dataloader' does not have many workers",
    r"You called `self\.log.*but have no logger configured",
)
"""Beginnings of warnings, as regular expressions."""
TIPS = (
    "💡",
    "GPU available: ",
    "TPU available: ",
    "HPU available: ",
    "LOCAL_RANK: ",
    "Seed set to ",
    "Initializing distributed: ",
    "[rank: ",
    "`Trainer.fit` stopped: ",
)
"""Beginnings of log records of Lightning: advertisements, and facts that the closing table tells as well."""


LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
)


class _WithoutTips(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(TIPS)


_FILTER = _WithoutTips()


def quiet() -> None:
    """Install the filters; calling it again changes nothing."""
    for message in MESSAGES:
        warnings.filterwarnings("ignore", message=message)
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_FILTER)

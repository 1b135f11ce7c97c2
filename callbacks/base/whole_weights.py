"""What callbacks that read or write whole weight matrices ask of the Trainer."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy


def need_whole_weights(trainer: Trainer, who: str) -> None:
    """See that every process holds the whole model.

    Args:
        trainer: Of the run.
        who: Needs whole weights; named in the error.

    Raises:
        ValueError: If the strategy is another than a single device or DDP.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy) and type(trainer.strategy) is not DDPStrategy:
        raise ValueError(
            f"Argument `trainer.strategy` expected auto (one device) or ddp with {who}, which needs whole weights in every "
            f"process, but got {type(trainer.strategy).__name__}. Use `--trainer.strategy ddp`."
        )

"""AverageWeights: Lightning's weight averaging for modules whose buffers are no averages."""

from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_avg_fn

from utilities.contract import AveragesParametersOnly


class AverageWeights(WeightAveraging, AveragesParametersOnly):
    """Average the weights over the steps; validate, test and save the average.

    Buffers are those of the newest step: the factors and clusters of a graph are not learned, and rounding would change them.

    Args:
        decay: Share of the average that each step keeps; None for the mean of all steps.

    Raises:
        ValueError: If the decay is out of range.
    """

    def __init__(self, decay: float | None = 0.999) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(
                f"Argument `decay` expected to be in [0, 1), or null for the mean, but got {decay}; 0.999 is usual."
            )
        super().__init__(use_buffers=False, avg_fn=None if decay is None else get_ema_avg_fn(decay))
        self.decay = decay

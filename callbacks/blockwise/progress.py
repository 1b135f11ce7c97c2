"""BlockProgressBar: counts pruned blocks, and shows errors, sparsity and seconds of the last one."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from typing_extensions import override

from callbacks.blockwise.records import BlockRecord

_UNIT_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} blocks [{elapsed}<{remaining}]{postfix}"


class BlockProgressBar(TQDMProgressBar):
    """A progress bar whose unit is a block.

    Args:
        num_blocks: Number of blocks over all rounds, the length of the bar.
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.num_blocks = num_blocks

    def block_done(self, count: int, record: BlockRecord) -> None:
        """Move the bar to `count` blocks and show some numbers of the last one."""
        self.train_progress_bar.n = count
        shown = {"error": f"{record.relative_error:.4f}", "sparsity": f"{record.sparsity:.4f}"}
        if record.allocation:
            shown["target"] = f"{record.allocation['sparsity']:.4f}"
        if record.attention:
            shown["attention"] = f"{record.attention['relative_error']:.4f}"
        self.train_progress_bar.set_postfix(shown | {"seconds": f"{record.seconds:.1f}"})

    @override
    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.bar_format = _UNIT_FORMAT
        bar.total = self.num_blocks
        bar.set_description("Pruning")
        return bar

    @override
    def on_train_epoch_start(self, *_: Any) -> None:
        """An epoch is a block: the bar goes on."""

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.train_progress_bar.set_description(f"Pruning (batch {batch_idx + 1}/{self.total_train_batches})")

    @override
    def on_train_epoch_end(self, *_: Any) -> None:
        """The pruning callback reports when it has pruned the block."""

    @override
    def on_validation_end(self, *_: Any) -> None:
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()


def use_block_progress_bar(trainer: Trainer, pl_module: LightningModule, num_blocks: int) -> None:
    """Replace the trainer's progress bar, if it has one: bars over epochs of a few batches would say nothing."""
    bar = trainer.progress_bar_callback
    if bar is None or bar.is_disabled:
        return
    ours = BlockProgressBar(num_blocks)
    ours.setup(trainer, pl_module, "fit")
    trainer.callbacks = [ours if isinstance(callback, ProgressBar) else callback for callback in trainer.callbacks]

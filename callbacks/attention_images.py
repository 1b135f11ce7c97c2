"""AttentionImages: what the class token of a vision transformer looks at, head by head, before and after `fit`."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import default_collate
from typing_extensions import override

from lightning_modules.base.prunable import PrunableModule
from lightning_modules.parts.attention_form import run_attention_eagerly


class AttentionImages(Callback):
    """Write a figure per image and block to TensorBoard: the image, then each head's attention, dense above pruned.

    Args:
        images: Positions of the images in the first validation dataset.
        blocks: Indices of blocks; the last one when None.
    """

    def __init__(self, images: list[int] | None = None, blocks: list[int] | None = None) -> None:
        self.images = [0, 1, 2] if images is None else images
        self.blocks = blocks
        self._batch: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if not (isinstance(pl_module, PrunableModule) and hasattr(pl_module, "patch_grid")):
            raise TypeError(f"AttentionImages needs an ImageClassifier but got {type(pl_module).__name__}.")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        count = len(pl_module.blocks)
        self._indices = [count - 1] if self.blocks is None else self.blocks
        if any(not 0 <= index < count for index in self._indices):
            raise ValueError(f"Argument `blocks` expected to name some of {count} blocks but got {self.blocks}.")
        loaders = trainer.val_dataloaders
        dataset = (loaders[0] if isinstance(loaders, list | tuple) else loaders).dataset if loaders else []
        if any(not 0 <= index < len(dataset) for index in self.images):
            raise ValueError(f"Argument `images` expected positions in {len(dataset)} validation images but got {self.images}.")
        items = [item for item in (dataset[index] for index in self.images) if item is not None]
        self._batch = trainer.strategy.batch_to_device(default_collate(items)) if items else {}
        self._before = self._look(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        after = self._look(trainer, pl_module)
        pictures = pl_module.pictures(self._batch) if self._batch else []
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                continue
            for name, maps in after.items():
                for i, picture in enumerate(pictures):
                    figure = attention_over_image(picture, {"before": self._before[name][i], "after": maps[i]}, name)
                    logger.experiment.add_figure(f"class_token_attention/{name}", figure, self.images[i])
        self._batch, self._before = {}, {}

    @torch.no_grad()
    def _look(self, trainer: Trainer, module: PrunableModule) -> dict[str, Tensor]:
        """Block -> (samples, heads, rows, columns): attention of the class token, or the mean of all tokens without one."""
        if not self._batch:
            return {}
        names = list(module.blocks)
        calls: dict[str, tuple[tuple, dict[str, Any]]] = {}
        attentions = {names[i]: module.attention(module.blocks[names[i]]) for i in self._indices}
        modes = {part: part.training for part in module.modules()}
        module.eval()
        handles = [_record_call(attention, calls, name) for name, attention in attentions.items()]
        try:
            with trainer.precision_plugin.forward_context():
                module.calibration_forward(self._batch)
                looked = {name: run_attention_eagerly(attentions[name], *calls[name])[1] for name in attentions}
        finally:
            for handle in handles:
                handle.remove()
            for part, mode in modes.items():
                part.training = mode
        rows, columns = module.patch_grid(self._batch)
        return {name: _onto_patches(probabilities, rows, columns) for name, probabilities in looked.items()}


def _record_call(attention: nn.Module, calls: dict[str, Any], name: str) -> Any:
    def record(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls[name] = (args, kwargs)

    return attention.register_forward_pre_hook(record, with_kwargs=True)


def _onto_patches(probabilities: Tensor, rows: int, columns: int) -> Tensor:
    """(samples, heads, queries, keys) -> (samples, heads, rows, columns)."""
    patches = rows * columns
    has_class_token = probabilities.shape[-1] > patches
    seen = probabilities[:, :, 0] if has_class_token else probabilities.mean(2)
    return seen[..., -patches:].unflatten(-1, (rows, columns)).float().cpu()


def attention_over_image(picture: Tensor, states: dict[str, Tensor], title: str):
    """Draw an image, and each head's attention over it, one row a state.

    Args:
        picture: (channels, height, width) in [0, 1].
        states: Name of a row -> (heads, rows, columns), probabilities.
        title: Above all.

    Returns:
        A matplotlib figure, not registered with pyplot.
    """
    from matplotlib.figure import Figure

    heads = len(next(iter(states.values())))
    figure = Figure(figsize=(1.5 * (heads + 1) + 0.4, 1.7 * len(states) + 0.4), layout="constrained", dpi=110)
    axes = figure.subplots(len(states), heads + 1, squeeze=False)
    shown = picture.cpu().permute(1, 2, 0).squeeze(-1).numpy()
    height, width = shown.shape[:2]
    # A head has one scale in all rows, or a difference could not be seen.
    largest = [max(float(maps[head].max()) for maps in states.values()) for head in range(heads)]
    for line, (name, maps) in zip(axes, states.items(), strict=True):
        for column, axis in enumerate(line):
            axis.imshow(shown, extent=(0, width, height, 0))
            axis.set_xticks([])
            axis.set_yticks([])
            if column:
                heat = maps[column - 1].numpy()
                axis.imshow(heat, extent=(0, width, height, 0), cmap="inferno", alpha=0.7, vmin=0, vmax=largest[column - 1])
        line[0].set_ylabel(name, fontsize=9)
    for head in range(heads):
        axes[0][head + 1].set_title(f"head {head}", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure

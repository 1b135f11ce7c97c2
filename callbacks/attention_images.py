"""AttentionImages: shows which patches the class token of a vision transformer attends to, before and after `fit`."""

import textwrap
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import default_collate
from typing_extensions import override

from lightning_modules.image_classifier import ImageClassifier
from lightning_modules.parts.attention_form import run_attention_eagerly
from utilities.contract import data_of

LONGEST_NAME = 16
"""Characters of a class name that fit beside an image."""
OPACITY = 0.75
"""Opacity of the attention over the image."""


@dataclass(frozen=True)
class Look:
    """Attention and predictions of a model for some images.

    Attributes:
        attention: Block -> (samples, heads, rows, columns), probabilities.
        classes: Most probable class of each image.
        probabilities: Probability of that class.
        looker: Token that attends: the class token or, in a model without one, the average token.
    """

    attention: dict[str, Tensor]
    classes: list[int]
    probabilities: list[float]
    looker: str


@dataclass(frozen=True)
class Row:
    """One state of the model, for one image and one block.

    Attributes:
        attention: (heads, rows, columns), probabilities.
        prediction: Predicted class and its probability, in words.
    """

    attention: Tensor
    prediction: str


class AttentionImages(Callback):
    """Write a figure for each image and block to TensorBoard: the image, its label, its prediction, each head's attention.

    The upper row is the model before `fit`, the lower row the model after `fit`. Class names are those of the data module;
    without any, classes are numbers.

    Args:
        images: Positions of the images in the first validation dataset; the first three when None.
        blocks: Indices of blocks; the last one when None.
    """

    def __init__(self, images: list[int] | None = None, blocks: list[int] | None = None) -> None:
        self.images = [0, 1, 2] if images is None else images
        self.blocks = blocks
        self._states = ("before training", "after training")
        self._indices: list[int] = []
        self._shown: list[int] = []
        self._batch: dict[str, Tensor] = {}
        self._before: Look | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if not isinstance(pl_module, ImageClassifier):
            raise TypeError(f"AttentionImages needs an ImageClassifier but got {type(pl_module).__name__}.")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: ImageClassifier) -> None:
        count, architecture = len(pl_module.blocks), pl_module.architecture
        if not (architecture.attention and architecture.uniform):
            raise ValueError(
                f"AttentionImages needs blocks whose tokens attend to the whole image, but those of {pl_module.family} do not, "
                "or their attention was not found. Leave it out of trainer.callbacks."
            )
        self._indices = [count - 1] if self.blocks is None else self.blocks
        if any(not 0 <= index < count for index in self._indices):
            raise ValueError(f"Argument `blocks` expected to name some of {count} blocks but got {self.blocks}.")
        trainer.fit_loop.epoch_loop.val_loop.setup_data()  # a run without sanity check has not done so yet
        loaders = trainer.val_dataloaders
        dataset = (loaders[0] if isinstance(loaders, list | tuple) else loaders).dataset if loaders else []
        if any(not 0 <= index < len(dataset) for index in self.images):
            raise ValueError(f"Argument `images` expected positions in {len(dataset)} validation images but got {self.images}.")
        items = {index: item for index in self.images if (item := dataset[index]) is not None}  # None: it cannot be read
        if not items:
            return
        self._states = ("before training", "after training") if pl_module.calibration_step is None else ("dense", "pruned")
        self._shown, self._batch = list(items), default_collate(list(items.values()))
        self._before = self._look(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: ImageClassifier) -> None:
        if self._before is None:
            return
        looks = dict(zip(self._states, (self._before, self._look(trainer, pl_module)), strict=True))
        names = data_of(trainer).facts().class_names
        pictures = pl_module.pictures(self._batch)
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                continue
            for block in self._before.attention:
                for i, picture in enumerate(pictures):
                    figure = attention_over_image(
                        picture,
                        {state: _row(look, block, i, names) for state, look in looks.items()},
                        label=_name(int(self._batch["label"][i]), names),
                        title=f"Validation image {self._shown[i]}: attention of the {self._before.looker} in {block}",
                        looker=self._before.looker,
                    )
                    logger.experiment.add_figure(f"class_token_attention/{block}", figure, self._shown[i])
        self._batch, self._before = {}, None

    @torch.no_grad()
    def _look(self, trainer: Trainer, module: ImageClassifier) -> Look:
        """Run the model on the images, as for validation."""
        names = list(module.blocks)
        calls: dict[str, tuple[tuple, dict[str, Any]]] = {}
        attentions = {names[i]: module.attention(module.blocks[names[i]]) for i in self._indices}
        # At the end of `fit` the trainer has sent the model to the CPU.
        batch = trainer.precision_plugin.convert_input(move_data_to_device(self._batch, module.device))
        modes = {part: part.training for part in module.modules()}
        module.eval()
        handles = [_record_call(attention, calls, name) for name, attention in attentions.items()]
        try:
            with _on_device(module.blocks.values(), module.device), trainer.precision_plugin.forward_context():
                logits = module(batch["image"])
                looked = {name: run_attention_eagerly(attentions[name], *calls[name])[1] for name in attentions}
        finally:
            for handle in handles:
                handle.remove()
            for part, mode in modes.items():
                part.training = mode
        rows, columns = module.patch_grid(batch)
        probabilities, classes = logits.float().softmax(-1).max(-1)
        has_class_token = all(values.shape[-1] > rows * columns for values in looked.values())
        return Look(
            {name: _onto_patches(values, rows, columns) for name, values in looked.items()},
            classes.tolist(),
            probabilities.tolist(),
            "class token" if has_class_token else "average token",
        )


@contextmanager
def _on_device(blocks: Collection[nn.Module], device: torch.device) -> Iterator[None]:
    """Within, blocks are on a device; with `offload` they wait in host memory."""
    places = {block: next(block.parameters()).device for block in blocks}
    for block in places:
        block.to(device)
    try:
        yield
    finally:
        for block, place in places.items():
            block.to(place)


def _record_call(attention: nn.Module, calls: dict[str, Any], name: str) -> Any:
    """Keep the arguments of a module's next call under a name."""

    def record(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls[name] = (args, kwargs)

    return attention.register_forward_pre_hook(record, with_kwargs=True)


def _onto_patches(probabilities: Tensor, rows: int, columns: int) -> Tensor:
    """(samples, heads, queries, keys) -> (samples, heads, rows, columns), of the class token or the mean of all tokens."""
    patches = rows * columns
    has_class_token = probabilities.shape[-1] > patches
    seen = probabilities[:, :, 0] if has_class_token else probabilities.mean(2)
    return seen[..., -patches:].unflatten(-1, (rows, columns)).float().cpu()


def _row(look: Look, block: str, sample: int, names: tuple[str, ...]) -> Row:
    """The row of a figure for one of the images."""
    prediction = f"{_name(look.classes[sample], names)} ({look.probabilities[sample]:.1%})"
    return Row(look.attention[block][sample], prediction)


def _name(label: int, names: tuple[str, ...]) -> str:
    """Name of a class, cut to what fits; its number where no name is known."""
    name = names[label] if 0 <= label < len(names) else str(label)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def attention_over_image(picture: Tensor, states: dict[str, Row], label: str, title: str, looker: str = "class token"):
    """Draw an image with its label and prediction, and each head's attention over it, one row for each state of the model.

    Args:
        picture: (channels, height, width) in [0, 1].
        states: Name of a state -> attention and prediction.
        label: True class of the image.
        title: Title of the figure.
        looker: Token that attends, for the text below the colour bars.

    Returns:
        A matplotlib figure, not registered with pyplot.
    """
    from matplotlib.figure import Figure

    heads = len(next(iter(states.values())).attention)
    size = (1.5 * (heads + 1) + 0.8, 1.9 * len(states) + 1.2)
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    ratios = [1.0] * len(states) + [0.07]
    *axes, bars = figure.subplots(len(states) + 1, heads + 1, squeeze=False, height_ratios=ratios)
    shown = picture.cpu().permute(1, 2, 0).squeeze(-1).numpy()
    extent = (0, shown.shape[1], shown.shape[0], 0)
    for line, (name, row) in zip(axes, states.items(), strict=True):
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].imshow(shown, extent=extent, cmap="gray", vmin=0, vmax=1)
        line[0].set_ylabel(name, fontsize=10)
        line[0].set_xlabel(f"predicted:\n{row.prediction}", fontsize=9)
    axes[0][0].set_title(f"label:\n{label}", fontsize=9)
    bars[0].set_axis_off()
    for head, bar in enumerate(bars[1:]):
        column = [line[head + 1] for line in axes]
        column[0].set_title(f"head {head}", fontsize=9)
        _draw_head([row.attention[head] for row in states.values()], picture, column, bar)
    figure.suptitle(title, fontsize=11)
    scale = f"Share of the head's attention that goes from the {looker} to a patch; each head has its own scale"
    figure.supxlabel(textwrap.fill(scale, int(13 * size[0])), fontsize=9)
    return figure


def _draw_head(maps: list[Tensor], picture: Tensor, axes: list[Any], bar: Any) -> None:
    """Draw a head's attention in each state over the image in grey, whose own colours would be taken for attention."""
    extent = (0, picture.shape[2], picture.shape[1], 0)
    # A head has one scale in all rows, or a difference could not be seen.
    largest = 100 * max(float(values.max()) for values in maps)
    for axis, values in zip(axes, maps, strict=True):
        axis.imshow(picture.cpu().mean(0).numpy(), extent=extent, cmap="gray", vmin=0, vmax=1)
        heat = axis.imshow(100 * values.numpy(), extent=extent, cmap="inferno", alpha=OPACITY, vmin=0, vmax=largest)
    bar.set_facecolor("0.5")  # as over an image of medium brightness
    axes[0].figure.colorbar(heat, cax=bar, orientation="horizontal")
    bar.set_xticks([0, largest], labels=["0", f"{largest:.2g} %"], fontsize=8)

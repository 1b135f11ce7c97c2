"""From an image to a normalised tensor: the transform of timm, and which of its arguments `augmentation` may set."""

import inspect
from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor

from utilities.extras import import_needed

NO_AUGMENTATION = (
    "input_size",
    "is_training",
    "mean",
    "std",
    "crop_pct",
    "crop_mode",
    "crop_border_pixels",
    "tf_preprocessing",
)
NO_TENSOR = ("use_prefetcher", "normalize", "separate", "naflex", "patch", "max_seq_len")
"""Prefixes of arguments with which timm's transform returns something other than one normalised image."""

Transform = Callable[[Image.Image], Tensor]


def make_transform(config: dict[str, Any], augmentation: dict[str, Any] | None) -> Transform:
    """Make a transform from an RGB image to a normalised float tensor (3, height, width), and try it on one image.

    Args:
        config: Settings input_size, mean, std, interpolation, crop_pct and crop_mode of timm's transform.
        augmentation: Further arguments for training; None for evaluation.

    Raises:
        ValueError: If timm does not accept these arguments.
    """
    timm_data = import_needed("timm.data", "images", "timm")
    options = {**config, **(augmentation or {})}
    try:
        transform = timm_data.create_transform(is_training=augmentation is not None, **options)
        with isolate_rng():
            tensor = transform(Image.new("RGB", (2 * config["input_size"][2], 2 * config["input_size"][1])))
    except Exception as error:  # timm asserts, and hands values on to torchvision and Pillow
        argument = f"`augmentation` = {augmentation}" if augmentation else f"Image settings {config}"
        raise ValueError(f"{argument} was not accepted by timm ({type(error).__name__}: {error}); correct it.") from error
    if tuple(tensor.shape) != tuple(config["input_size"]) or not tensor.is_floating_point():
        raise ValueError(
            f"Argument `augmentation` expected to give float images {config['input_size']} but got {tensor.dtype} "
            f"{tuple(tensor.shape)}; leave out what changes the form of images."
        )
    return transform


def check_augmentation(augmentation: dict[str, Any]) -> None:
    """Raise a ValueError if timm's transform does not know an argument, or would not return a normalised image with it."""
    parameters = inspect.signature(import_needed("timm.data", "images", "timm").create_transform).parameters
    accepted = [name for name in parameters if name not in NO_AUGMENTATION and not name.startswith(NO_TENSOR)]
    unknown = sorted(set(augmentation) - set(accepted))
    if unknown:
        raise ValueError(
            f"Argument `augmentation` expected arguments of timm.data.create_transform but got "
            f"{', '.join(map(repr, unknown))}; accepted are {', '.join(accepted)}."
        )

"""Make, load and save vision transformers by their own library, timm or transformers.

The name decides which library it is: a directory's config.json says so, a hub id `owner/name` belongs to transformers unless it
begins with timm's `hf-hub:`, and every other name belongs to timm. Weights are read from safetensors only.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utilities.safe_load import brief, weights_only

WEIGHTS = "model.safetensors"
SOURCES = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Arguments of `timm.create_model` that name a source of weights."""
CLASS_BLOCKS = ("blocks_token_only", "cls_attn_blocks")
"""Blocks of CaiT's and XCiT's class tokens."""


def make_model(
    name: str, pretrained: bool = False, checkpoint: str | None = None, model_args: dict[str, Any] | None = None
) -> nn.Module:
    """Make or load an image classifier.

    Args:
        name: A name of timm, `hf-hub:owner/name`, a hub id of transformers, or a directory that either library wrote.
        pretrained: Whether to download the weights of a name; those of a directory are always read.
        checkpoint: A .safetensors file for a model of timm.
        model_args: Further arguments of `timm.create_model`, such as img_size and num_classes.

    Raises:
        ValueError: If the name is unknown, the arguments contradict one another, or a file does not fit the model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if checkpoint or pretrained or model_args:
            raise ValueError(
                f"Argument `model_name_or_path` = {name!r} is a directory, which holds model and weights. Leave out "
                "`checkpoint`, `pretrained` and `model_args`, or give the name of a model."
            )
        config = _read_config(folder)
        if "architecture" not in config:
            return _from_transformers(str(folder))
        import timm

        with _loading(name):
            return timm.create_model(f"local-dir:{folder}", pretrained=True)
    if pretrained and checkpoint:
        raise ValueError(
            "Arguments `pretrained` and `checkpoint` are two sources of weights: expected one, not both, but got "
            f"True and {checkpoint!r}. Leave one of them out."
        )
    if "/" in name and not name.startswith("hf-hub:"):
        return _hub_id_of_transformers(name, pretrained, checkpoint, model_args)
    return _from_timm(name, pretrained, checkpoint, dict(model_args or {}))


def check_given(model: nn.Module, pretrained: bool, checkpoint: str | None) -> None:
    """Check that a model in memory is an image classifier, and that no argument says how to load it.

    Args:
        model: The model.
        pretrained: Argument of ImageClassifier.
        checkpoint: Argument of ImageClassifier.

    Raises:
        ValueError: If it is not, or an argument does.
    """
    if not is_timm(model) and not hasattr(getattr(model, "config", None), "num_labels"):
        raise ValueError(
            f"Argument `model_name_or_path` expected a name, a directory, or an image classifier of timm or transformers, but "
            f"got a {type(model).__name__}."
        )
    if not is_timm(model) and not hasattr(model, "image_processor"):
        raise ValueError(
            "Argument `model_name_or_path` is a model of transformers in memory, whose image processor is not known. Set "
            "`model.image_processor`, or give its directory or hub id."
        )
    for name, value in (("pretrained", pretrained), ("checkpoint", checkpoint)):
        if value:
            raise ValueError(
                f"Argument `{name}` = {value!r} says how a model is loaded, but `model_name_or_path` is a model in memory. "
                "Leave it out."
            )


def _from_timm(name: str, pretrained: bool, checkpoint: str | None, model_args: dict[str, Any]) -> nn.Module:
    import timm

    if not name.startswith("hf-hub:") and not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ValueError(
            f"Argument `model_name_or_path` = {name!r} is neither a model of timm nor a directory. "
            f"{'Near: ' + ', '.join(near) + '. ' if near else ''}`timm.list_models()` lists all."
        )
    if checkpoint is not None and (not checkpoint.endswith(".safetensors") or not Path(checkpoint).expanduser().is_file()):
        raise ValueError(f"Argument `checkpoint` expected to be an existing .safetensors file but got {checkpoint!r}.")
    if sources := [argument for argument in SOURCES if argument in model_args]:
        raise ValueError(
            f"Argument `model_args`: {', '.join(sources)} would say where weights come from. Use `checkpoint`, a .safetensors "
            "file, or `pretrained`."
        )
    try:
        with weights_only():
            model = timm.create_model(name, pretrained=pretrained, **model_args)
    except TypeError as error:
        raise ValueError(f"Argument `model_args` = {model_args}: {error}.") from error
    if checkpoint is not None:
        from safetensors.torch import load_file

        try:
            tensors = load_file(Path(checkpoint).expanduser())
        except Exception as error:  # SafetensorError, or anything that damaged bytes make its reader raise
            raise ValueError(
                f"Argument `checkpoint` = {checkpoint!r} is no intact safetensors file ({brief(error)}). Copy it again."
            ) from error
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(
                f"Argument `checkpoint` = {checkpoint!r} does not fit {name} with model_args = {model_args}; img_size, "
                f"patch_size and num_classes must be those that it was trained with. {error}"
            ) from error
    return model


def _hub_id_of_transformers(name: str, pretrained: bool, checkpoint: str | None, model_args: dict | None) -> nn.Module:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(
            f"Argument `model_name_or_path` = {name!r} is not an existing directory. Give a name of timm, a hub id "
            "(owner/name), or a directory that holds a model; configs/deit/digits.yaml trains and writes one."
        )
    if not pretrained or checkpoint or model_args:
        raise ValueError(
            f"Argument `model_name_or_path` = {name!r} is a hub id of transformers: set `pretrained`, and leave out "
            "`checkpoint` and `model_args`. Models of timm are named without owner, or as hf-hub:owner/name."
        )
    return _from_transformers(name)


def _from_transformers(name: str) -> nn.Module:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    with _loading(name):
        model = AutoModelForImageClassification.from_pretrained(name, use_safetensors=True)
        model.image_processor = AutoImageProcessor.from_pretrained(name)
    return model


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Raise errors of libraries again, with the argument to blame; no object is unpickled within the context."""
    try:
        with weights_only():
            yield
    except Exception as error:  # timm, transformers, the hub client and safetensors share no base class below this one
        raise ValueError(
            f"Argument `model_name_or_path`: no model could be loaded from {name!r} ({brief(error)}). Give a name of timm, a "
            "hub id, or a directory that timm or transformers wrote, with weights as safetensors."
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file() or not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"Argument `model_name_or_path` = {str(folder)!r} holds no config.json and {WEIGHTS}. "
            "Give a directory that timm or transformers wrote, or that a run here saved."
        )
    with _loading(str(folder)):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError("config.json is no JSON object")
    return config


def is_timm(model: nn.Module) -> bool:
    """Return whether a model belongs to timm."""
    return hasattr(model, "pretrained_cfg")


def model_type(model: nn.Module) -> str:
    """Return the key of a model in ARCHITECTURES, or the name of a class of timm that has no entry, for the error."""
    if not is_timm(model):
        return model.config.model_type
    from timm.models import VisionTransformer

    return "vision_transformer" if isinstance(model, VisionTransformer) else type(model).__name__


def num_classes(model: nn.Module) -> int:
    """Return the number of classes."""
    return model.num_classes if is_timm(model) else model.config.num_labels


def data_config(model: nn.Module) -> dict[str, Any]:
    """Return the images that a model expects, as timm writes it: input_size (C, H, W), mean, std, interpolation, crop_pct."""
    if is_timm(model):
        from timm.data import resolve_data_config

        patches = getattr(model, "patch_embed", None) or getattr(model, "stem", None)  # the latter in an MLP-Mixer
        size = getattr(patches, "img_size", None)
        channels = getattr(model, "in_chans", 3)
        found = resolve_data_config({"input_size": (channels, *size)} if size else {}, model=model)
        return found | {name: tuple(found[name]) for name in ("input_size", "mean", "std")}  # from a file they are lists
    processor, config = model.image_processor, model.config
    size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
    resized = processor.size.get("height") or processor.size.get("shortest_edge")
    crop = processor.crop_size["height"] if getattr(processor, "do_center_crop", False) else resized
    names = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
    return {
        "input_size": (config.num_channels, *size),
        "mean": tuple(processor.image_mean),
        "std": tuple(processor.image_std),
        "interpolation": names[int(processor.resample)],
        "crop_pct": crop / resized,
        "crop_mode": "center",
    }


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits of images, (samples, classes)."""
    output = model(images)
    return output if isinstance(output, Tensor) else output.logits


def call_fused_projections(model: nn.Module) -> None:
    """Let attentions of timm call their fused projection and add its bias afterwards; up to rounding that is the same.

    By default BEiT, EVA and Swin V2 multiply by the weight of qkv without calling the module, so hooks see nothing of it.

    Args:
        model: The model.
    """
    for module in model.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True


def two_images(model: nn.Module) -> Tensor:
    """Return two random images of the size, dtype and device that a model expects, (2, channels, height, width)."""
    weight, size = next(model.parameters()), data_config(model)["input_size"]
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0), device="cpu")  # on whatever device a run is
    return images.to(weight.device, weight.dtype)


def class_tokens(model: nn.Module) -> int:
    """Return the number of class and distillation tokens, the first tokens of the blocks; registers come after them.

    CaiT and XCiT have none in their blocks: their class tokens have blocks of their own, after the others.
    """
    if is_timm(model):
        if any(getattr(model, name, None) is not None for name in CLASS_BLOCKS):
            return 0
        registers = getattr(model, "reg_token", None)
        return getattr(model, "num_prefix_tokens", 0) - (0 if registers is None else registers.shape[1])
    return {"vit": 1, "deit": 2}.get(model.config.model_type, 0)


def patch_grid(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Return the numbers of rows and columns of patches of an image, which are the last of its tokens."""
    patch = model.patch_embed.patch_size if is_timm(model) else model.config.patch_size
    rows, columns = patch if isinstance(patch, (tuple, list)) else (patch, patch)
    return math.ceil(images.shape[-2] / rows), math.ceil(images.shape[-1] / columns)


def save_model(model: nn.Module, directory: Path, model_args: dict[str, Any]) -> None:
    """Write safetensors and config in the format of the model's own library.

    Args:
        model: The model.
        directory: Existing directory.
        model_args: Arguments that a model of timm was made with.
    """
    if not is_timm(model):
        model.save_pretrained(directory)
        model.image_processor.save_pretrained(directory)
        return
    from timm.models import save_for_hf

    save_for_hf(model, directory, model_args=model_args, safe_serialization=True)


def loaded_args(name: str, model_args: dict[str, Any] | None) -> dict[str, Any]:
    """Return the arguments that a model of timm was made with: those given, or those in the directory that it came from."""
    folder = Path(name).expanduser()
    return dict(_read_config(folder).get("model_args") or {}) if name and folder.is_dir() else dict(model_args or {})


def decayed_and_not(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups: matrices with weight decay; biases, norms and whatever the model excludes without."""
    from timm.optim import param_groups_weight_decay

    excluded = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=excluded)


@torch.no_grad()
def denormalised(images: Tensor, config: dict[str, Any]) -> Tensor:
    """Return images as they were before normalisation, (samples, 3, H, W) in [0, 1]."""
    mean, std = (images.new_tensor(config[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    return (images * std + mean).clamp(0, 1)

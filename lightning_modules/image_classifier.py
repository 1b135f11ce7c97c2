"""ImageClassifier: a vision model of timm or transformers with top-1 and top-5 accuracy, prunable block by block."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_modules.base.prunable import PrunableModule
from lightning_modules.parts import vision_models
from lightning_modules.parts.adapters import add_adapters, has_adapters
from lightning_modules.parts.discovery import Discovery
from lightning_modules.parts.predictions import Predictions
from lightning_modules.parts.vision_discovery import discover_vision
from utilities.contract import ModelFacts, data_of

SPLITS = ("val", "heldout")
"""Names of the validation dataloaders, in order."""
PRINTED = 4
"""Number of predictions that `predict` prints; all of them are written."""


class ImageClassifier(PrunableModule):
    """A DeiT, ViT, Swin, ConvNeXt or other image classifier for training, pruning and evaluation.

    Weights are made or loaded when a run starts, not when the object is made. Any model can be evaluated and trained. Those in
    `lightning_modules.parts.architectures.ARCHITECTURES` can be pruned, and others whose blocks can be discovered. A batch is
    ``{"image": (samples, channels, height, width), "label": (samples,), "index": (samples,)}``.

    Args:
        model_name_or_path: A name of timm's such as deit_tiny_patch16_224, `hf-hub:owner/name`, a hub id of transformers, or
            a directory that either library, or a run of this module, wrote. Adapters that lie in it are added. From Python also
            a model of timm, or an image classifier of transformers, which is changed in place.
        pretrained: Whether to download the weights of a name.
        checkpoint: A .safetensors file for a model of timm.
        model_args: Further arguments of `timm.create_model`, such as img_size, patch_size, num_classes, drop_path_rate. For a
            model in memory, the arguments that it was made with, which are saved beside it.
        learning_rate: Largest learning rate of AdamW.
        weight_decay: Weight decay of matrices; biases and norms have none.
        warmup: Share of the training steps in which the learning rate rises; then it falls to zero as a cosine.
        label_smoothing: Probability that training labels spread evenly over all classes.
        mixup: α of mixup; 0 turns it off.
        cutmix: α of CutMix; 0 turns it off.
    """

    judge = "heldout/loss"

    def __init__(
        self,
        model_name_or_path: str | nn.Module,
        pretrained: bool = False,
        checkpoint: str | None = None,
        model_args: dict[str, Any] | None = None,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        label_smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value, below in (("warmup", warmup, 1), ("label_smoothing", label_smoothing, 1)):
            if not 0 <= value < below:
                raise ValueError(f"Argument `{name}` expected to be in [0, {below}) but got {value}.")
        least = {"mixup": mixup, "cutmix": cutmix, "learning_rate": learning_rate, "weight_decay": weight_decay}
        for name, value in least.items():
            if not value >= 0:
                raise ValueError(f"Argument `{name}` expected to be at least 0 but got {value}.")
        given = model_name_or_path if isinstance(model_name_or_path, nn.Module) else None
        if given is not None:
            vision_models.check_given(given, pretrained, checkpoint)
        self.save_hyperparameters(ignore=["model_name_or_path"] if given is not None else [])
        self.path = "" if given is not None else str(model_name_or_path)
        """Name or directory of the model; empty for one in memory."""
        self.model: nn.Module | None = given
        self.num_classes: int | None = None
        self.metrics = nn.ModuleDict()
        self._mixup: Any = None
        self._skipped: dict[str, int] = {}
        self._predictions = Predictions()

    @property
    def family(self) -> str:
        """`model_type` of transformers, vision_transformer, or the name of timm's class."""
        return vision_models.model_type(self.model)

    def configure_model(self) -> None:
        """Make the model or load it, once."""
        if self.num_classes is not None:
            return
        options, model = self.hparams, self.model
        if model is None:
            model = vision_models.make_model(self.path, options.pretrained, options.checkpoint, options.model_args)
        self._check_size(model)
        if self.model is None and has_adapters(self.path) and vision_models.is_timm(model):
            add_adapters(model, self.path)
        self.model = model
        if self.calibration_step is not None:
            self._architecture = self.find_architecture()  # a model that cannot be pruned is refused at once
        self.num_classes = vision_models.num_classes(model)
        accuracies = {
            f"top{k}": MulticlassAccuracy(self.num_classes, top_k=k, average="micro") for k in (1, 5) if k <= self.num_classes
        }
        metrics = MetricCollection({"loss": MeanMetric(), **accuracies}, compute_groups=False)
        self.metrics.update({split: metrics.clone() for split in SPLITS})
        if options.mixup or options.cutmix:
            from timm.data import Mixup

            self._mixup = Mixup(
                options.mixup, options.cutmix, label_smoothing=options.label_smoothing, num_classes=self.num_classes
            )

    def discover(self) -> Discovery:
        """Find blocks and linears by running the model on two images."""
        vision_models.call_fused_projections(self.model)
        return discover_vision(self.model, self.forward, vision_models.two_images(self.model), self.family)

    def _check_size(self, model: nn.Module) -> None:
        """Check the image size, which positions are tied to unless the model was made for any size."""
        size = data_of(self._trainer).facts().image_size
        own = vision_models.data_config(model)["input_size"][-1]
        if size not in (None, own) and getattr(getattr(model, "patch_embed", None), "strict_img_size", True):
            raise ValueError(
                f"Argument `image_size` expected to be {own}, that of {self.path}, but got {size}. Leave "
                "it out, or make the model for it with model_args (img_size, or dynamic_img_size: true)."
            )

    @property
    def data_config(self) -> dict[str, Any]:
        """Image size and normalisation that the model expects, as timm writes them."""
        return vision_models.data_config(self.model)

    def model_facts(self) -> ModelFacts:
        """Return facts with the number of classes and the expected images, once the model is made."""
        return ModelFacts() if self.num_classes is None else ModelFacts(self.num_classes, self.data_config)

    def described(self) -> dict[str, Any]:
        """Return the hyperparameters, the class of a model in memory, and what was discovered."""
        return {"model_name_or_path": self.path or type(self.model).__name__, **super().described()}

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (samples, classes)."""
        return vision_models.logits(self.model, images)

    @property
    def class_tokens(self) -> int:
        """Number of class and distillation tokens, which come first in the blocks; register tokens are not counted.

        None counts where a block adds them, or takes them away, so that others lack them.
        """
        return vision_models.class_tokens(self.model) if self.architecture.uniform else 0

    def pictures(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the images of a batch without normalisation, (samples, channels, height, width) in [0, 1]."""
        return vision_models.denormalised(batch["image"], self.data_config)

    def patch_grid(self, batch: dict[str, Tensor]) -> tuple[int, int]:
        """Return the numbers of rows and columns of patches, which are the last tokens of the blocks."""
        return vision_models.patch_grid(self.model, batch["image"])

    def training_loss(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
        """Return the cross-entropy with smoothed, and possibly mixed, labels; None for a batch without images."""
        images, labels, smoothing = batch["image"], batch["label"], self.hparams.label_smoothing
        if not len(images):
            return None
        if self._mixup is not None and len(images) > 1:
            even = len(images) // 2 * 2  # images are mixed in pairs
            images, labels = self._mixup(images[:even], labels[:even])
            smoothing = 0.0  # the mixed labels are smooth already
        loss = nn.functional.cross_entropy(self(images), labels, label_smoothing=smoothing)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def calibration_forward(self, batch: dict[str, Tensor]) -> None:
        """Run the model on a batch of images."""
        self(batch["image"])

    def sample_positions(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the positions of the images in the calibration set."""
        return batch["index"]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the losses and hits of a batch."""
        split = SPLITS[dataloader_idx]
        self._skipped[split] = self._skipped.get(split, 0) + int(batch.get("skipped", 0))
        if not len(batch["image"]):
            return
        predicted = self(batch["image"]).float()
        for name, metric in self.metrics[split].items():
            if name == "loss":
                metric.update(nn.functional.cross_entropy(predicted, batch["label"], reduction="none"))
            else:
                metric.update(predicted, batch["label"])

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics. Done here, since a later `fit` could not use a state that was made in inference mode."""
        self._skipped = {}
        for metrics in self.metrics.values():
            metrics.reset()
            for metric in metrics.values():
                metric.set_dtype(self.metric_dtype)  # a trainer with precision bf16-true has changed it

    def on_validation_epoch_end(self) -> None:
        """Log loss, top-1 and top-5 of each dataloader, and how many images could not be read."""
        for split, metrics in self.metrics.items():
            if split not in self._skipped or not self.sum_over_processes(metrics["loss"].update_called):
                continue
            values = {f"{split}/{name}": value for name, value in metrics.compute().items()}
            if skipped := self.sum_over_processes(self._skipped[split]):
                rank_zero_info(f"{split}: {skipped:.0f} images could not be read and are in no metric.")
                values[f"{split}/skipped"] = skipped
            # A pruning run logs by block; the trainer's step would be the number of calibration batches.
            self.log_dict(values, prog_bar=self.calibration_step is None, logger=self.calibration_step is None)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the five most probable classes of each image and their probabilities."""
        probabilities, classes = self(batch["image"]).float().softmax(-1).topk(min(5, self.num_classes))
        names = data_of(self._trainer).facts().class_names or range(self.num_classes)
        for index, best, shares in zip(batch["index"].tolist(), classes.tolist(), probabilities.tolist(), strict=True):
            self._predictions.add(index=index, classes=[names[label] for label in best], probabilities=shares)
        return {"index": batch["index"], "classes": classes, "probabilities": probabilities}

    def on_predict_epoch_end(self) -> None:
        """Write the predictions of all processes, and print the first few."""
        for row in self._predictions.write(self.trainer)[:PRINTED]:
            self.print(f"[{row['index']}] {row['classes'][0]} {row['probabilities'][0]:.1%}")

    def configure_optimizers(self) -> dict[str, Any] | None:
        """Return AdamW with warm-up and a cosine schedule by step; None while pruning."""
        if self.calibration_step is not None:
            return None
        options, steps = self.hparams, max(int(self.trainer.estimated_stepping_batches), 2)
        groups = vision_models.decayed_and_not(self.model, options.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=options.learning_rate)
        rising = min(max(round(options.warmup * steps), 1), steps - 1)
        schedule = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 1 / rising, total_iters=max(rising - 1, 1)),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - rising),
            ],
            milestones=[rising],
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def save(self, directory: Path) -> None:
        """Write the format of the model's own library: safetensors and config.json."""
        vision_models.save_model(self.model, directory, vision_models.loaded_args(self.path, self.hparams.model_args))

    def load_arguments(self, directory: Path) -> dict[str, str]:
        """Return the directory as the only source of weights; the other arguments that name one are reset."""
        emptied = {name: "null" for name in ("checkpoint", "model_args") if self.hparams[name] is not None}
        return super().load_arguments(directory) | emptied | ({"pretrained": "false"} if self.hparams.pretrained else {})

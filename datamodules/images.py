"""Images for training, pruning and validating vision transformers: calibration, held-out, training and validation images.

Calibration and held-out images are drawn from the training images, as evenly over the classes as possible. No image is in both
parts: one is drawn from the front of each shuffled class, the other from its end. Neither is augmented. All draws follow from
`seed`; they neither use nor change the global random state.

Labels are indices into a class map. With `classes`, the map does not depend on which folders are present. Size, mean, std and
interpolation are those of the model. It is asked when a dataloader is made, since it does not exist earlier.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lightning import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from datamodules.image_batches import Collate, ImageDataset
from datamodules.image_classes import map_labels, read_classes
from datamodules.image_draws import Pool
from datamodules.image_sources import (
    ACCEPTED_ROOTS,
    HUB_ID,
    DigitImages,
    FolderImages,
    HubImages,
    Images,
    LooseImages,
    UnreadableImage,
    class_folders,
)
from datamodules.image_transform import check_augmentation, make_transform
from datamodules.shards import in_order
from utilities.checks import check_integer
from utilities.contract import CalibrationData, DataFacts, model_of
from utilities.extras import import_needed

Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
STAGES = ("fit", "validate", "predict")


class ImageDataModule(LightningDataModule, CalibrationData):
    """Training images for `fit`, or calibration images when the module is armed for pruning; validation and held-out images.

    A batch is ``{"image": (samples, 3, height, width), "label": LongTensor (samples,), "index": LongTensor (samples,)}``;
    `index` is the position in the dataset. With `on_corrupt` = skip, batches for training, validation and prediction have fewer
    samples, maybe none, where images could not be read, and ``"skipped"``, a LongTensor (), says how many.

    Args:
        root: digits (scikit-learn's scans of handwritten digits, 8 x 8; the same fifth of them is always for validation), a
            folder with <train>/<class>/ and <val>/<class>/, or a dataset on the hub, owner/name[:config].
        train: Name of the folder or split of training images; has no effect on digits.
        val: Name of the folder or split of validation images; has no effect on digits.
        classes: Names of all classes in the order of the model's outputs: imagenet, or a text file with one class a line,
            `name` or `index<TAB>name`. null takes the sorted folders of `train`, or the dataset's own class names.
        num_calibration: Number of calibration images.
        num_heldout: Number of held-out images of `train`, by which a pruning run may choose; 0 for none. They are a second
            validation set of `fit` while it prunes.
        seed: Seed of the draws of calibration and held-out images.
        batch_size: Number of images in a batch.
        num_workers: Number of worker processes of each dataloader.
        image_size: Height and width of the images in pixels; null takes the model's.
        mean: Mean of each of the three channels, for normalisation; null takes the model's.
        std: Standard deviation of each of the three channels, for normalisation; null takes the model's.
        interpolation: Interpolation by which images are resized; null takes the model's.
        crop_pct: Share of the resized image's edge that is kept in evaluation; null takes the model's.
        augmentation: Further arguments of `timm.data.create_transform` for training, such as hflip, scale or auto_augment.
        on_corrupt: Treatment of images that cannot be read. error: the run ends. skip: they are left out, or replaced
            among calibration and held-out images, and counted.
    """

    def __init__(
        self,
        root: str = "digits",
        train: str = "train",
        val: str = "val",
        classes: str | None = None,
        num_calibration: int = 128,
        num_heldout: int = 0,
        seed: int = 0,
        batch_size: int = 64,
        num_workers: int = 0,
        image_size: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        interpolation: Interpolation | None = None,
        crop_pct: float | None = None,
        augmentation: dict[str, Any] | None = None,
        on_corrupt: Literal["error", "skip"] = "error",
    ) -> None:
        super().__init__()
        if root == "self":
            raise ValueError(
                "Argument `root` = 'self': an image model writes no images to calibrate on, as a language model writes text. "
                "Give a folder, a repository of the hub, or digits."
            )
        for name, value in (("root", root), ("train", train), ("val", val), ("classes", classes)):
            if value == "":
                raise ValueError(f"Argument `{name}` expected to be a name but got ''; give one or leave it out.")
        check_integer("num_calibration", num_calibration, 1)
        check_integer("num_heldout", num_heldout, 0)
        check_integer("seed", seed, 0)
        check_integer("batch_size", batch_size, 1)
        check_integer("num_workers", num_workers, 0)
        if image_size is not None:
            check_integer("image_size", image_size, 1)
        for name, value in (("mean", mean), ("std", std)):
            if value is not None and (len(value) != 3 or (name == "std" and min(value) <= 0)):
                raise ValueError(f"Argument `{name}` expected a number for R, G and B but got {value}; null takes the model's.")
        if interpolation is not None and interpolation not in get_args(Interpolation):
            raise ValueError(
                f"Argument `interpolation` expected one of {', '.join(get_args(Interpolation))} but got {interpolation!r}; "
                "null takes the model's."
            )
        if crop_pct is not None and not 0 < crop_pct <= 1:
            raise ValueError(f"Argument `crop_pct` expected to be in (0, 1] but got {crop_pct}; 1 keeps the whole edge.")
        if on_corrupt not in ("error", "skip"):
            raise ValueError(f"Argument `on_corrupt` expected error or skip but got {on_corrupt!r}; skip leaves images out.")
        if augmentation:
            check_augmentation(augmentation)
        self.save_hyperparameters()
        self.classes: list[str] = []
        """Names of the classes in the order of their indices; empty before `setup`."""
        self._sources: dict[str, Images] = {}
        self._labels: dict[str, list[int]] = {}
        self._pool: Pool | None = None
        self._drawn: dict[str, list[int]] = {}
        self._calibrating = False

    def facts(self) -> DataFacts:
        """Return image size, class names, numbers and settings."""
        options = self.hparams
        return DataFacts(
            image_size=options.image_size,
            class_names=tuple(self.classes),
            num_calibration=options.num_calibration,
            batch_size=options.batch_size,
            settings=dict(options),
            seed=options.seed,
        )

    def begin_calibration(self, batch_size: int | None) -> None:
        """Let the train dataloader give calibration images; held-out images become a second validation set."""
        self._calibrating = True

    def end_calibration(self) -> None:
        """Let the train dataloader give all training images again."""
        self._calibrating = False

    def setup(self, stage: str) -> None:
        """Find the images that the stage needs and that no earlier stage has found.

        Raises:
            ValueError: If `root` or a part of it is missing or empty, or has classes that the class map does not have.
        """
        if stage not in STAGES:
            raise ValueError(
                f"Argument `stage` expected one of {', '.join(STAGES)} but got {stage!r}; validate measures accuracy."
            )
        needs_train = stage == "fit"
        missing = [part for part in ("train", "val") if part not in self._sources and (part == "val" or needs_train)]
        if not missing:
            return
        found = {part: self._find(part) for part in missing}
        classes = self.classes or self._class_map(found)
        hint = (
            "`classes` is null, so the classes are those of the training images: give data.classes, or remove them."
            if self.hparams.classes is None
            else f"`classes` = {self.hparams.classes!r} names {len(classes)} others: add these, or give another map."
        )
        self._labels |= {part: map_labels(source, classes, hint) for part, source in found.items()}
        self._sources |= found
        self.classes = classes
        sizes = ", ".join(f"{len(source):,} in {source.where}" for source in found.values())
        rank_zero_info(f"Images: {sizes}; {len(classes)} classes; seed {self.hparams.seed}")

    def _find(self, part: Literal["train", "val"]) -> Images:
        root, name = self.hparams.root, self.hparams[part]
        if root == "digits":
            return DigitImages(part)
        if (folder := Path(root).expanduser()).is_dir():
            try:
                return FolderImages(folder / name)
            except ValueError as error:
                raise ValueError(f"Arguments `root` = {root!r}, `{part}` = {name!r}: {error}") from error
        if not HUB_ID.fullmatch(root):
            raise ValueError(
                f"Argument `root` expected {ACCEPTED_ROOTS}, but got {root!r}, which does not exist; check the path."
            )
        return HubImages(root, name)

    def _class_map(self, found: dict[str, Images]) -> list[str]:
        if self.hparams.classes is not None:
            return read_classes(self.hparams.classes)
        source = found.get("train") or found["val"]
        if not isinstance(source, FolderImages) or "train" in found:
            return source.names
        folder = Path(self.hparams.root).expanduser() / self.hparams.train
        try:
            return class_folders(folder)
        except ValueError as error:
            raise ValueError(f"Argument `classes` is null, so the folders of `train` would be the classes: {error}") from error

    def train_dataloader(self) -> DataLoader:
        """Return all training images, shuffled; while a run prunes, the calibration images in a fixed order."""
        return self.calibration_dataloader() if self._calibrating else self._dataloader("train", training=True)

    def calibration_dataloader(self) -> DataLoader:
        """Return calibration images; an image has the same index in every epoch."""
        return self._shared_out("train", "num_calibration", self._draw("calibration"))

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return validation images and, while a run prunes, held-out images as a second dataloader if there are any."""
        loader = self._shared_out("val", "val")
        if not (self._calibrating and self.hparams.num_heldout):
            return loader
        return [loader, self._shared_out("train", "num_heldout", self._draw("heldout"))]

    def predict_dataloader(self) -> DataLoader:
        """Return validation images."""
        return self._dataloader("val")

    def rule_dataloader(self, source: str | list[str], number: int) -> DataLoader:
        """Draw random images from other folders with the same seed, for an update rule to look at. Their labels are -1.

        Args:
            source: A folder, or several, with images at any depth.
            number: Number of images.

        Raises:
            ValueError: If a folder has no images or together they have fewer than `number` that can be read.
        """
        check_integer("number", number, 1)
        try:
            images = LooseImages([source] if isinstance(source, str) else source)
        except ValueError as error:
            raise ValueError(f"Argument `update_rule.source` {error}") from error
        positions = self._take(Pool(images.labels, self.hparams.seed), images, "rule", number, "first")
        return self._make_loader(images, images.labels, positions)

    def _draw(self, part: Literal["calibration", "heldout"]) -> list[int]:
        """Draw a part of the training images and return its positions. The held-out part is always drawn first."""
        if part == "calibration" and self.hparams.num_heldout:
            self._draw("heldout")
        if part not in self._drawn:
            source, options = self._sources["train"], self.hparams
            wanted = options.num_heldout + (options.num_calibration if part == "calibration" else 0)
            if wanted > len(source):
                raise ValueError(
                    f"Arguments `num_calibration` = {options.num_calibration} and `num_heldout` = {options.num_heldout} "
                    f"expected at most {len(source)} images together, those in {source.where}; lower one or give more images."
                )
            if self._pool is None:
                self._pool = Pool(self._labels["train"], options.seed)
            end = "last" if part == "heldout" else "first"
            self._drawn[part] = self._take(self._pool, source, part, options[f"num_{part}"], end)
        return self._drawn[part]

    def _take(self, pool: Pool, source: Images, part: str, count: int, end: Literal["first", "last"]) -> list[int]:
        """Draw images that can be read; each is opened to see whether it can."""
        unreadable: list[int] = []

        def accept(position: int) -> bool:
            try:
                source.read(position)
            except UnreadableImage:
                if self.hparams.on_corrupt == "error":
                    raise
                unreadable.append(position)
                return False
            return True

        taken = pool.take(count, end, accept)
        skipped = f", {len(unreadable)} that could not be read replaced" if unreadable else ""
        if len(taken) < count:
            raise ValueError(
                f"The {part} images expected to be {count} but only {len(taken)} could be drawn from {source.where} "
                f"({len(unreadable)} could not be read); ask for fewer or give more images."
            )
        rank_zero_info(f"Images, {part}: {count} drawn from {source.where}, seed {self.hparams.seed}{skipped}")
        return taken

    def _dataloader(
        self, part: Literal["train", "val"], positions: Sequence[int] | None = None, training: bool = False
    ) -> DataLoader:
        self._check_num_classes()
        return self._make_loader(self._sources[part], self._labels[part], positions, training)

    def _shared_out(self, part: Literal["train", "val"], argument: str, positions: Sequence[int] | None = None) -> DataLoader:
        """Make a dataloader of images in order; with several processes, each gets its own part of them."""
        self._check_num_classes()
        dataset, collate = self._dataset(self._sources[part], self._labels[part], positions)
        return in_order(dataset, argument, self.trainer, self.hparams.batch_size, collate, self.hparams.num_workers)

    def _make_loader(
        self, source: Images, labels: list[int], positions: Sequence[int] | None = None, training: bool = False
    ) -> DataLoader:
        dataset, collate = self._dataset(source, labels, positions, training)
        options = self.hparams
        return DataLoader(
            dataset, batch_size=options.batch_size, shuffle=training, num_workers=options.num_workers, collate_fn=collate
        )

    def _dataset(
        self, source: Images, labels: list[int], positions: Sequence[int] | None, training: bool = False
    ) -> tuple[ImageDataset, Collate]:
        """Make a dataset of all images, or of those at `positions`, which could be read before: failing now is an error."""
        options, config = self.hparams, self._data_config()
        skip = options.on_corrupt == "skip" and positions is None
        positions = range(len(source)) if positions is None else positions
        transform = make_transform(config, options.augmentation or {} if training else None)
        return ImageDataset(source, positions, labels, transform, skip), Collate(config["input_size"], skip)

    def _check_num_classes(self) -> None:
        outputs, count = model_of(self.trainer).num_classes, len(self.classes)
        if outputs is None or outputs == count or (self.hparams.classes is not None and count < outputs):
            return
        if self.hparams.classes is not None:
            raise ValueError(
                f"Argument `classes` = {self.hparams.classes!r} expected to name at most as many classes as the model has, "
                f"{outputs}, but got {count}; give the map that the model was trained with."
            )
        raise ValueError(
            f"Argument `classes` is null, so that the classes are the {count} of {self.hparams.root!r}, but the model has "
            f"{outputs}: a map made of the classes that are present would give wrong labels. Give "
            f"data.classes (imagenet, or a file with one class a line), or a model with {count} classes."
        )

    def _data_config(self) -> dict[str, Any]:
        """Return the arguments of `create_transform`: this module's where they are given, else the model's."""
        options, own = self.hparams, model_of(self.trainer).image_config
        if own is None:
            if options.image_size is None:
                raise ValueError("Argument `image_size` is null and there is no model to ask; give it, or run with a Trainer.")
            own = import_needed("timm.data", "images", "timm").resolve_data_config({"img_size": options.image_size})
        size = own["input_size"] if options.image_size is None else (own["input_size"][0], *2 * (options.image_size,))
        if size[0] != 3:
            raise ValueError(f"Images have 3 channels, but the model expected {size[0]}; make it with in_chans = 3.")
        names = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        config = {name: own[name] for name in names if name in own}
        return config | {name: options[name] for name in names if options.get(name) is not None} | {"input_size": tuple(size)}

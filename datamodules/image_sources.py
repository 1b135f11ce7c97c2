"""Sources of images: folders of classes, scikit-learn's digits, Hugging Face datasets.

Every image becomes 8-bit RGB, whatever its file holds. An image that cannot be read raises an UnreadableImage with its
name. Everything else that is wrong with a source raises a ValueError that names the folder, the file or the split, and what to
do about it.
"""

import io
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from typing_extensions import override

from datamodules.image_draws import Pool
from utilities.extras import import_needed
from utilities.safe_load import brief

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(:[^:/]+)?")
ACCEPTED_ROOTS = "digits, a folder with <train>/<class>/ and <val>/<class>/, or a dataset on the hub as owner/name[:config]"
DIGITS_HELD_OUT = 0.2
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""Formats that are accepted, whatever a file's name. Pillow knows more, and would start Ghostscript for one of them."""
LONGEST_SIDE = 1000
"""Largest ratio of an image's sides. Resized by its shorter side, an image beyond that would take gigabytes."""


class UnreadableImage(RuntimeError, ValueError):
    """Raised for a file that is missing, truncated or not an image."""


class Images(ABC):
    """Images and their labels.

    `names[label]` is the class. `where` names the source in messages.
    """

    where: str
    names: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, position: int) -> Image.Image:
        """Read one image as RGB.

        Raises:
            UnreadableImage: If its file is missing or cannot be decoded.
        """


class EncodedImages(Images):
    """Images that are decoded when they are read."""

    @override
    def read(self, position: int) -> Image.Image:
        try:
            return decode(self.encoded(position))
        except Exception as error:  # damaged data makes Pillow raise anything from OSError to SyntaxError and MemoryError
            raise UnreadableImage(
                f"Image {self.name(position)} cannot be read ({brief(error)}). Delete or replace it, or set data.on_corrupt to "
                "skip."
            ) from error

    @abstractmethod
    def encoded(self, position: int) -> bytes:
        """Return the content of the image's file."""

    @abstractmethod
    def name(self, position: int) -> str:
        """Return the image's name for messages."""


class FolderImages(EncodedImages):
    """Image files at any depth below the class folders of a folder."""

    def __init__(self, folder: Path) -> None:
        self.where, self.names = f"'{folder}'", class_folders(folder)
        self.paths: list[str] = []
        self.labels = []
        for label, name in enumerate(self.names):
            found = find_images(folder / name)
            self.paths += found
            self.labels += [label] * len(found)
        if not self.paths:
            raise ValueError(f"Folder '{folder}' holds {len(self.names)} folders but no {_extensions()} below them.")

    @override
    def encoded(self, position: int) -> bytes:
        return Path(self.paths[position]).read_bytes()

    @override
    def name(self, position: int) -> str:
        return f"'{self.paths[position]}'"


class LooseImages(FolderImages):
    """Image files at any depth below some folders; their labels are -1."""

    def __init__(self, folders: Sequence[str]) -> None:
        self.where, self.names, self.paths = f"{list(folders)}", [], []
        for folder in folders:
            path = Path(folder).expanduser()
            found = find_images(path) if path.is_dir() else []
            if not found:
                raise ValueError(f"expected a folder with {_extensions()} files but got {folder!r}; name one that has some.")
            self.paths += found
        self.labels = [-1] * len(self.paths)


class DigitImages(Images):
    """Scikit-learn's 1,797 scans of handwritten digits, 8 x 8; the same fifth of each digit is always `val`."""

    def __init__(self, part: Literal["train", "val"]) -> None:
        digits = import_needed("sklearn.datasets", "digits", "scikit-learn").load_digits()
        labels = digits.target.tolist()
        held_out = set(Pool(labels, seed=0).take(round(DIGITS_HELD_OUT * len(labels)), "last"))
        kept = [position for position in range(len(labels)) if (position in held_out) == (part == "val")]
        self.where = f"{part} of digits"
        self.names = [str(digit) for digit in range(10)]
        self.scans = np.rint(digits.images[kept] * (255 / 16)).astype(np.uint8)
        self.labels = [labels[position] for position in kept]

    @override
    def read(self, position: int) -> Image.Image:
        return Image.fromarray(self.scans[position]).convert("RGB")


class HubImages(EncodedImages):
    """A split of a dataset of the `datasets` library that has one column of images and one of class labels."""

    def __init__(self, root: str, split: str) -> None:
        self.where = f"split {split!r} of {root!r}"
        datasets = import_needed("datasets", repr(root), "--editable '.[data]'")
        repository, _, config = root.partition(":")
        try:
            rows = datasets.load_dataset(repository, config or None, split=split)
        except Exception as error:  # builders, hub client and HTTP client share no base class below this one
            cause = error.__cause__ or error  # a DatasetGenerationError says nothing itself, only its cause does
            raise ValueError(
                f"Argument `root` = {root!r} is no existing folder, and as a dataset its split {split!r} could not be loaded: "
                f"{type(cause).__name__}: {cause}. Check name, config, split and connection, or give {ACCEPTED_ROOTS}."
            ) from error
        images = self._only_column(rows, datasets.Image, "images")
        labels = self._only_column(rows, datasets.ClassLabel, "class labels")
        self.names = rows.features[labels].names
        self.labels = rows[labels][:]
        missing = [row for row, label in enumerate(self.labels) if label is None or label < 0]
        if missing:
            raise ValueError(
                f"Dataset {self.where} has {len(missing)} rows without label, first {missing[0]}; use another split."
            )
        if not self.labels:
            raise ValueError(f"Dataset {self.where} has no rows; use another split.")
        self.rows = rows.select_columns([images]).cast_column(images, datasets.Image(decode=False))
        self.column = images

    def _only_column(self, rows, kind: type, what: str) -> str:
        names = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
        if len(names) != 1:
            raise ValueError(
                f"Dataset {self.where} expected one column of {what} but got {len(names)}: its columns are "
                f"{dict(rows.features)}; select or cast them and save as folders."
            )
        return names[0]

    @override
    def encoded(self, position: int) -> bytes:
        cell = self.rows[position][self.column]
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    @override
    def name(self, position: int) -> str:
        return f"in row {position} of {self.where}"


def decode(content: bytes) -> Image.Image:
    """Decode a whole image file to 8-bit RGB; 16 bits are scaled, transparency is dropped as timm and torchvision do.

    Raises:
        Exception: Of any type, if the content is not one of FORMATS, is damaged, or is too long for its width.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged metadata, and large images; twice that size is an error
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    if max(image.size) > LONGEST_SIDE * min(image.size):
        raise ValueError(f"its size is {image.width} x {image.height}, more than {LONGEST_SIDE} to 1")
    if image.mode.startswith("I"):  # Pillow would clip these at 255
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.rint(values.clip(0, 65535) / 257).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:  # straight to RGB, Pillow warns
        image = image.convert("RGBA")
    return image.convert("RGB")


def class_folders(folder: Path) -> list[str]:
    """Return the sorted names of the folders in a folder, without hidden ones.

    Raises:
        ValueError: If the folder does not exist or has none.
    """
    if not folder.is_dir():
        raise ValueError(f"Folder '{folder}' does not exist; expected it to hold a folder of images for each class.")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"Folder '{folder}' expected to hold a folder of images for each class but has no folders.")
    return names


def find_images(folder: Path) -> list[str]:
    """Return the sorted paths of the image files below a folder. Links are followed, hidden names left out."""
    extensions, found = tuple(_extensions().split()), []
    for directory, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.join(directory, name)
            for name in files
            if name.lower().endswith(extensions) and not name.startswith(".")  # macOS leaves ._x.jpg beside x.jpg
        ]
    return sorted(found)


def _extensions() -> str:
    readers = import_needed("timm.data.readers.img_extensions", "image folders", "timm")
    return " ".join(readers.get_img_extensions())

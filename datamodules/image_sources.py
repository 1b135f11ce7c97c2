"""Where images come from: folders of classes, scikit-learn's digits, Hugging Face datasets; class maps; draws by class.

Every image becomes 8-bit RGB, whatever its file holds. One that cannot be read is an UnreadableImage that names it; whatever
else is wrong with a source is a ValueError that names the folder, the file or the split, and what to do about it.
"""

import io
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from utilities.safe_load import brief

INDEX = re.compile(r"[0-9]{1,9}")
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(:[^:/]+)?")
ACCEPTED_ROOTS = "digits, a folder with <train>/<class>/ and <val>/<class>/, or a dataset on the hub as owner/name[:config]"
DIGITS_HELD_OUT = 0.2
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""What is looked for in a file, whatever its name; Pillow knows others, and starts Ghostscript for one of them."""
LONGEST_SIDE = 1000
"""Times the shorter one; resized to the shorter side, an image beyond that would take gigabytes."""


class UnreadableImage(RuntimeError, ValueError):
    """A file that is missing, truncated or no image."""


class Images(ABC):
    """Images and their labels; `names[label]` is the class, `where` says in messages where they are from."""

    where: str
    names: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, position: int) -> Image.Image:
        """One image as RGB.

        Raises:
            UnreadableImage: If it cannot be had or decoded.
        """


class EncodedImages(Images):
    """Images that are decoded when they are read."""

    def read(self, position: int) -> Image.Image:
        try:
            return decode(self.encoded(position))
        except Exception as error:  # of damaged data Pillow makes anything from OSError to SyntaxError and MemoryError
            raise UnreadableImage(
                f"Image {self.name(position)} cannot be read ({brief(error)}). Delete or replace it, or set data.on_corrupt to "
                "skip."
            ) from error

    @abstractmethod
    def encoded(self, position: int) -> bytes:
        """The content of the image's file."""

    @abstractmethod
    def name(self, position: int) -> str:
        """What a message calls the image."""


class FolderImages(EncodedImages):
    """Image files, at any depth, below the class folders of a folder."""

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

    def encoded(self, position: int) -> bytes:
        return Path(self.paths[position]).read_bytes()

    def name(self, position: int) -> str:
        return f"'{self.paths[position]}'"


class LooseImages(FolderImages):
    """Image files, at any depth, below some folders; their labels are -1."""

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

    def read(self, position: int) -> Image.Image:
        return Image.fromarray(self.scans[position]).convert("RGB")


class HubImages(EncodedImages):
    """A split of a dataset of the `datasets` library that has one column of images and one of class labels."""

    def __init__(self, root: str, split: str) -> None:
        self.where = f"split {split!r} of {root!r}"
        datasets = import_needed("datasets", repr(root), "'d2prune[data]'")
        repository, _, config = root.partition(":")
        try:
            rows = datasets.load_dataset(repository, config or None, split=split)
        except Exception as error:  # builders, hub client and HTTP client share no base class below this one
            cause = error.__cause__ or error  # of a DatasetGenerationError only the cause says anything
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

    def encoded(self, position: int) -> bytes:
        cell = self.rows[position][self.column]
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    def name(self, position: int) -> str:
        return f"in row {position} of {self.where}"


class ImageDataset(Dataset):
    """Images of a source at some positions, transformed; None in place of one that cannot be read if `skip`."""

    def __init__(self, source: Images, positions: Sequence[int], labels: list[int], transform: Callable, skip: bool) -> None:
        self.source, self.positions, self.labels = source, positions, labels
        self.transform, self.skip = transform, skip

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> dict[str, Tensor | int] | None:
        position = self.positions[index]
        try:
            image = self.source.read(position)
        except UnreadableImage:
            if self.skip:
                return None
            raise
        return {"image": self.transform(image), "label": self.labels[position], "index": index}


class Collate:
    """Make a batch of items, leaving out and, if `skip`, counting those that are None; the batch may have no samples."""

    def __init__(self, size: tuple[int, int, int], skip: bool) -> None:
        self.size, self.skip = size, skip

    def __call__(self, items: list[dict[str, Tensor | int] | None]) -> dict[str, Tensor]:
        kept = [item for item in items if item is not None]
        batch = {
            "image": torch.stack([item["image"] for item in kept]) if kept else torch.empty(0, *self.size),
            "label": torch.tensor([item["label"] for item in kept], dtype=torch.long),
            "index": torch.tensor([item["index"] for item in kept], dtype=torch.long),
        }
        return batch | {"skipped": torch.tensor(len(items) - len(kept))} if self.skip else batch


def decode(content: bytes) -> Image.Image:
    """Decode a whole image file to 8-bit RGB; 16 bits are scaled, transparency is dropped as timm and torchvision do.

    Raises:
        Exception: Of any type, if the content is not one of FORMATS, damaged, or too long for its breadth.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large images, an error from twice that size on; of damaged metadata
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
    """Sorted names of the folders in a folder, hidden ones left out.

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
    """Sorted paths of the image files below a folder; links are followed, hidden names left out."""
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


def read_classes(classes: str) -> list[str]:
    """Names of the classes in the order of their indices.

    Args:
        classes: `imagenet`, or a text file with one class a line: a name, or index, tab, name and anything after another tab.

    Raises:
        ValueError: If the file is missing, empty, of neither form, or has a name twice, or the indices are not 0 to n - 1.
    """
    if classes == "imagenet":
        return import_needed("timm.data", "the classes of ImageNet", "timm").ImageNetInfo().label_names()
    path = Path(classes).expanduser()
    accepted = "imagenet, or a text file with one class a line: `name`, or `index<TAB>name`"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # not UTF-8, or no possible path
        raise ValueError(f"Argument `classes` expected {accepted} but got {classes!r} ({error}); check the path.") from error
    lines = [line.strip("\r") for line in text.split("\n") if line.strip()]
    names = [line.strip() for line in lines]
    if any("\t" in line for line in lines):
        cells = [line.split("\t") for line in lines]
        wrong = [row for row in cells if len(row) < 2 or not INDEX.fullmatch(row[0].strip()) or not row[1].strip()]
        if wrong:
            raise ValueError(f"File '{path}' expected lines index<TAB>name but got {repr(wrong[0])[:200]}; correct that line.")
        indices = [int(row[0]) for row in cells]
        if sorted(indices) != list(range(len(indices))):
            raise ValueError(
                f"File '{path}' expected the indices 0 to {len(indices) - 1}, each once, but they go from {min(indices)} to "
                f"{max(indices)} and {len(set(indices))} differ; number its {len(indices)} classes as the model does."
            )
        names = [row[1].strip() for row in sorted(cells, key=lambda row: int(row[0]))]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice or not names:
        what = f"{repr(twice[0])[:200]} twice" if twice else "an empty file"
        raise ValueError(f"File '{path}' expected one class a line but got {what}; write each name once.")
    return names


def map_labels(source: Images, classes: list[str], hint: str) -> list[int]:
    """Labels of a source's images as indices into `classes`.

    Raises:
        ValueError: If a class that has a folder, or an image, is not among them; `hint` says what to do.
    """
    indices = {name: index for index, name in enumerate(classes)}
    present = set(source.labels) if isinstance(source, HubImages) else range(len(source.names))
    unknown = [source.names[label] for label in sorted(present) if source.names[label] not in indices]
    if unknown:
        shown = ", ".join(repr(name) for name in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise ValueError(f"Images in {source.where} are of {len(unknown)} classes that have no index: {shown}. {hint}")
    translated = [indices.get(name, -1) for name in source.names]
    return [translated[label] for label in source.labels]


class Pool:
    """Positions of images, shuffled within each class, from which parts are drawn without return.

    Positions are taken in turn, one of each class a round: the numbers of any two classes differ by at most one until a class
    is exhausted. Drawing from both ends keeps two parts independent of one another's size as long as classes have enough
    images.
    """

    def __init__(self, labels: Sequence[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        by_class: dict[int, list[int]] = {label: [] for label in sorted(set(labels))}
        for position, label in enumerate(labels):
            by_class[label].append(position)
        queues = [_shuffled(positions, generator) for positions in by_class.values()]
        self._queues = {end: list(_shuffled(queues, generator)) for end in ("first", "last")}

    def take(self, count: int, end: Literal["first", "last"], accept: Callable[[int], bool] = lambda _: True) -> list[int]:
        """Draw positions, fewer if there are no more; one not accepted is replaced by the next of its class."""
        taken: list[int] = []
        queues = self._queues[end]
        while len(taken) < count and any(queues):
            for queue in queues:
                while queue and len(taken) < count:
                    position = queue.popleft() if end == "first" else queue.pop()
                    if accept(position):
                        taken.append(position)
                        break
        return taken


def _shuffled(items: Sequence, generator: torch.Generator) -> deque:
    return deque(items[index] for index in torch.randperm(len(items), generator=generator).tolist())


def import_needed(module: str, needed_for: str, package: str) -> ModuleType:
    """Import a module of a package that is not always installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        message = f"Reading {needed_for} needs the package {error.name!r}: pip install {package}"
        raise ModuleNotFoundError(message, name=error.name) from error

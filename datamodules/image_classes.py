"""Class maps: reads which name has which index, and translates the labels of a source into these indices."""

import re
from collections import Counter
from pathlib import Path

from datamodules.image_sources import HubImages, Images
from utilities.extras import import_needed

INDEX = re.compile(r"[0-9]{1,9}")


def read_classes(classes: str) -> list[str]:
    """Read the names of the classes in the order of their indices.

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
    """Translate the labels of a source's images into indices into `classes`.

    Args:
        source: Images with labels of their own.
        classes: Names of the classes in the order of their indices.
        hint: Advice for the error about unknown classes.

    Raises:
        ValueError: If a class that has a folder or an image is not in `classes`.
    """
    indices = {name: index for index, name in enumerate(classes)}
    present = set(source.labels) if isinstance(source, HubImages) else range(len(source.names))
    unknown = [source.names[label] for label in sorted(present) if source.names[label] not in indices]
    if unknown:
        shown = ", ".join(repr(name) for name in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise ValueError(f"Images in {source.where} are of {len(unknown)} classes that have no index: {shown}. {hint}")
    translated = [indices.get(name, -1) for name in source.names]
    return [translated[label] for label in source.labels]

"""What the tests of images share: folders of squares of one colour, which says the class of an image and its number in it, so a
tensor tells where it is from; and data modules on them."""

import io
from types import SimpleNamespace

import torch
from PIL import Image

from datamodules import ImageDataModule
from utilities.contract import ModelFacts, TellsModelFacts

SIZE = 8
PLAIN = {"image_size": SIZE, "crop_pct": 1.0, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}


class Told(TellsModelFacts):
    """Tells the facts that it was given."""

    def __init__(self, facts):
        self._facts = facts

    def model_facts(self):
        return self._facts


def colour(label, number):
    return (10 + label, number, 200)


def write_folder(root, counts, size=SIZE):
    """counts: class -> number of images; labels in the colours are ranks of the sorted names."""
    for label, (name, count) in enumerate(sorted(counts.items())):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (size, size), colour(label, number)).save(root / name / f"{number:03}.png")


def make(root, **options):
    return ImageDataModule(str(root), **{**PLAIN, "num_calibration": 6, "batch_size": 4, **options})


def ready(root, stage="fit", **options):
    data = make(root, **options)
    data.setup(stage)
    return data


def pruning(root, **options):
    """As it is while a run prunes: with calibration and held-out images."""
    data = ready(root, **options)
    data.begin_calibration(None)
    return data


def attach(data, num_classes=3, **config):
    """A trainer whose module tells what data modules ask for."""
    config = {"input_size": (3, SIZE, SIZE), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 1.0), **config}
    data.trainer = SimpleNamespace(lightning_module=Told(ModelFacts(num_classes=num_classes, image_config=config)))
    return data


def joined(loader):
    batches = list(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in ("image", "label", "index")}


def identities(loader):
    """(class, number) of each image, read from its colour."""
    pixels = (joined(loader)["image"][:, :2, 0, 0] * 255).round().int().tolist()
    return [(first - 10, second) for first, second in pixels]


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def encoded(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()

"""Sources of images: files and rows that are found, the classes they get, what a file becomes, draws that are even."""

import warnings
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from datamodules import ImageDataModule
from datamodules.image_classes import read_classes
from datamodules.image_draws import Pool
from datamodules.image_sources import UnreadableImage, decode
from tests.helpers.coloured_images import PLAIN, SIZE, colour, encoded, identities, joined, ready, write_folder

# Files and rows


def test_files_are_found_at_any_depth_in_sorted_order(tmp_path):
    names = ["a/2.jpeg", "a/10.JPG", "a/deep/er/1.png", "b/._1.png", "b/notes.txt", "b/1.png", "b/.hidden/2.png"]
    for part in ("train", "val"):
        for name in names:
            path = tmp_path / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(Image.new("RGB", (SIZE, SIZE))))
    found = ready(tmp_path).val_dataloader().dataset.source.paths
    assert [str(Path(path).relative_to(tmp_path / "val")) for path in found] == [
        "a/10.JPG",
        "a/2.jpeg",
        "a/deep/er/1.png",
        "b/1.png",
    ]


def test_folders_that_are_missing_or_empty(root, tmp_path):
    with pytest.raises(ValueError, match=r"Folder '.*/valid' does not exist; expected it to hold a folder of images for each"):
        ready(root, val="valid")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "x.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"Folder '.*/flat' expected to hold a folder of images for each class but has no folders"
    ):
        ready(root, val="flat")
    (tmp_path / "bare" / "ant").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"Folder '.*/bare' holds 1 folders but no .png .jpg .jpeg below them"):
        ready(root, train="bare")
    with pytest.raises(
        ValueError, match=r"`classes` is null, so the folders of `train` would be the classes: Folder '.*/gone' does"
    ):
        ready(root, "validate", train="gone")
    for path in ("/nowhere/at/all", "./nowhere", "nowhere"):
        with pytest.raises(
            ValueError, match=f"Argument `root` expected digits, a folder .* but got '{path}', which does not exist"
        ):
            ready(path)


def test_digits_split_covers_everything_once_and_stays():
    data = ImageDataModule(**PLAIN, num_calibration=1438, seed=3)
    data.setup("fit")
    scans = load_digits()
    train, val = joined(data.calibration_dataloader()), joined(data.val_dataloader())
    assert len(val["label"]) == 359 and data.classes == list("0123456789")
    shares = torch.bincount(val["label"]) / torch.tensor(np.bincount(scans.target))
    assert shares.min() > 0.19 and shares.max() < 0.21
    seen = torch.cat([train["image"], val["image"]])
    assert torch.equal(seen[:, 0], seen[:, 1]) and seen.min() == 0 and seen.max() == 1
    levels = (seen[:, 2] * 16).round().to(torch.uint8).flatten(1).tolist()
    labelled = zip(levels, torch.cat([train["label"], val["label"]]).tolist(), strict=True)
    assert sorted(labelled) == sorted(zip(scans.data.astype(int).tolist(), scans.target.tolist(), strict=True))
    other = ImageDataModule(**PLAIN, num_calibration=100, seed=4)
    other.setup("fit")
    assert torch.equal(joined(other.val_dataloader())["image"], val["image"])  # no seed moves what was trained on into val
    assert joined(other.calibration_dataloader())["label"].bincount().tolist() == [10] * 10


@pytest.fixture
def hub(monkeypatch):
    """A hub of one dataset with splits train and test; returns what `load_dataset` was asked for."""
    asked = []

    def load(name, config=None, split=None):
        asked.append((name, config, split))
        if name != "owner/pets":
            raise FileNotFoundError("no such dataset")
        rows = {"train": [2, 0, 1, 1, 0, 2, 2], "test": [1, 2], "unlabelled": [-1], "empty": []}[split]
        features = datasets.Features(
            {
                "id": datasets.Value("int64"),
                "picture": datasets.Image(),
                "kind": datasets.ClassLabel(names=["yak", "ant", "cow"]),
            }
        )
        images = [Image.new("RGB", (SIZE, SIZE), colour(label, number)) for number, label in enumerate(rows)]
        return datasets.Dataset.from_dict({"id": [0] * len(rows), "picture": images, "kind": rows}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_a_hub_dataset(hub):
    data = ready("owner/pets:small", val="test", num_calibration=3)
    assert hub == [("owner/pets", "small", "train"), ("owner/pets", "small", "test")]
    assert data.classes == ["yak", "ant", "cow"]  # in the order of the dataset
    assert identities(data.val_dataloader()) == [(1, 0), (2, 1)] and joined(data.val_dataloader())["label"].tolist() == [1, 2]
    assert sorted(joined(data.calibration_dataloader())["label"].tolist()) == [0, 1, 2]
    assert [pair[0] for pair in identities(data.calibration_dataloader())] == joined(data.calibration_dataloader())[
        "label"
    ].tolist()
    hub.clear()
    ready("owner/pets", "validate", val="test")
    assert hub == [("owner/pets", None, "test")]


def test_a_hub_dataset_with_another_map(hub, tmp_path):
    (tmp_path / "classes.txt").write_text("cow\nant\nyak\n")
    (tmp_path / "fewer.txt").write_text("ant\ncow\n")
    data = ready("owner/pets", val="test", classes=str(tmp_path / "classes.txt"))
    assert joined(data.val_dataloader())["label"].tolist() == [1, 0]
    data = ready("owner/pets", "validate", val="test", classes=str(tmp_path / "fewer.txt"))  # no row is a yak
    assert joined(data.val_dataloader())["label"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="are of 1 classes that have no index: 'yak'"):
        ready("owner/pets", val="test", classes=str(tmp_path / "fewer.txt"))


@pytest.mark.parametrize(
    ("root", "split", "message"),
    [
        ("owner/none", "test", r"`root` = 'owner/none' is no existing folder, and as a dataset .*no such dataset"),
        ("owner/pets", "unlabelled", "has 1 rows without label, first 0"),
        ("owner/pets", "empty", "has no rows"),
    ],
)
def test_hub_errors(hub, root, split, message):
    with pytest.raises(ValueError, match=message):
        ready(root, "validate", val=split)


def test_a_corrupt_hub_image_is_named_by_its_row(hub, monkeypatch):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    rows = {"image": [{"bytes": encoded(Image.new("L", (4, 4)))[:40], "path": None}], "label": [0]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict(rows, features=features))
    with pytest.raises(UnreadableImage, match="Image in row 0 of split 'val' of 'o/d' cannot be read"):
        list(ready("o/d", "validate").val_dataloader())
    flat = datasets.Dataset.from_dict({"image": [1], "label": [2]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: flat)
    with pytest.raises(ValueError, match="expected one column of images but got 0"):
        ready("o/d", "validate")


# The class map


def test_imagenet_classes_do_not_depend_on_the_folders(tmp_path):
    write_folder(tmp_path / "val", {"n01443537": 2, "n15075141": 1})
    data = ready(tmp_path, "validate", classes="imagenet")  # there is no train folder
    assert len(data.classes) == 1000 and data.classes == sorted(data.classes) and data.classes[0] == "n01440764"
    assert joined(data.val_dataloader())["label"].tolist() == [1, 1, 999]


@pytest.mark.parametrize(
    "text", ["2\tbee\tApis\n0\tcat\n\n3\tant\tFormica\n1\tdog\n", "cat\r\ndog\r\nbee\r\nant\r\n", "\ufeffcat\ndog\nbee\nant"]
)
def test_class_file_gives_the_indices(root, text):
    (root / "classes.txt").write_text(text, encoding="utf-8", newline="")
    data = ready(root, classes=str(root / "classes.txt"))
    assert data.classes == ["cat", "dog", "bee", "ant"]
    assert joined(data.val_dataloader())["label"].tolist() == [3] * 4 + [2] * 2 + [0]
    own = [{0: 3, 1: 2, 2: 0}[label] for label, _ in identities(data.calibration_dataloader())]
    assert joined(data.calibration_dataloader())["label"].tolist() == own


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\tant\n2\tbee\n", "expected the indices 0 to 1, each once, but they go from 0 to 2 and 2 differ"),
        ("0\tant\n0\tbee\n", "each once, but they go from 0 to 0 and 1 differ"),
        ("1\tant\n2\tbee\n", "they go from 1 to 2"),
        ("0\tant\nbee\n", r"expected lines index<TAB>name but got \['bee'\]"),
        ("ant\tn1\n", r"expected lines index<TAB>name but got \['ant', 'n1'\]"),
        ("ant\nbee\nant\n", "got 'ant' twice"),
        ("0\tant\n1\tant\n", "got 'ant' twice"),
        ("\n", "an empty file"),
    ],
)
def test_wrong_class_files(tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_classes(str(tmp_path / "classes.txt"))


def test_missing_class_file(tmp_path):
    with pytest.raises(ValueError, match=r"Argument `classes` expected imagenet, or a text file .* but got 'imagenet21k'"):
        read_classes("imagenet21k")


def test_folders_are_the_classes_by_default_even_where_validation_has_fewer(tmp_path):
    write_folder(tmp_path / "train", {"b": 1, "a": 1, "c": 1, ".cache": 1})
    write_folder(tmp_path / "val", {"c": 1, "b": 1})
    for stage in ("fit", "validate", "predict"):
        data = ready(tmp_path, stage)
        assert data.classes == ["a", "b", "c"]
        assert joined(data.predict_dataloader())["label"].tolist() == [1, 2]


def test_a_class_without_index_is_named(root):
    write_folder(root / "val" / "zebra", {"striped": 1})
    with pytest.raises(ValueError, match=r"val' are of 1 classes that have no index: 'zebra'\. `classes` is null"):
        ready(root)
    (root / "classes.txt").write_text("ant\nbee\nzebra\n")
    with pytest.raises(
        ValueError, match=r"train' are of 1 classes that have no index: 'cat'\. `classes` = '.*classes.txt' names 3"
    ):
        ready(root, classes=str(root / "classes.txt"))


# One image


def pixel(content):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = decode(content)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def test_every_mode_becomes_rgb_without_a_warning():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 250, 20, 30])
    assert pixel(encoded(palette)) == (250, 20, 30)
    assert pixel(encoded(palette, transparency=bytes([128, 60]))) == (250, 20, 30)
    assert pixel(encoded(palette, transparency=1)) == (250, 20, 30)
    assert pixel(encoded(Image.new("L", (4, 4), 77))) == (77,) * 3
    assert pixel(encoded(Image.new("L", (4, 4), 77), transparency=77)) == (77,) * 3
    assert pixel(encoded(Image.new("LA", (4, 4), (77, 0)))) == (77,) * 3
    assert pixel(encoded(Image.new("1", (4, 4), 1))) == (255,) * 3
    assert pixel(encoded(Image.new("RGBA", (4, 4), (1, 2, 3, 0)))) == (1, 2, 3)
    red = pixel(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG"))
    assert red[0] > 240 and max(red[1:]) < 15
    assert max(pixel(encoded(Image.new("CMYK", (4, 4), (0, 0, 0, 255)), "JPEG"))) < 15


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257, 1), (30000, 117), (65535, 255)])
def test_16_bits_are_scaled_and_not_clipped(value, expected):
    assert pixel(encoded(Image.fromarray(np.full((4, 4), value, np.uint16)))) == (expected,) * 3


# Draws


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 7, 30, 61])
def test_pool_is_even_up_to_exhaustion(seed, count):
    sizes = {0: 1, 1: 5, 2: 20, 3: 35}
    labels = [label for label, size in sizes.items() for _ in range(size)]
    taken = Pool(labels, seed).take(count, "first")
    assert len(taken) == len(set(taken)) == count
    counts = Counter(labels[position] for position in taken)
    for label, size in sizes.items():
        assert counts[label] == size or counts[label] >= max(counts.values()) - 1


def test_pool_replaces_by_the_same_class_then_by_any():
    labels = [0] * 3 + [1] * 6
    taken = Pool(labels, 0).take(4, "first", lambda position: position not in (0, 1))
    assert Counter(labels[position] for position in taken) == {0: 1, 1: 3}
    assert Counter(labels[i] for i in Pool(labels, 0).take(4, "first", lambda position: position != 0)) == {0: 2, 1: 2}
    assert len(Pool(labels, 0).take(9, "last", lambda position: position != 4)) == 8

"""ImageDataModule: draws are even, disjoint and repeatable, labels follow the class map, every file becomes the same kind of
tensor.

Images are made here: each is a square of one colour, which says its class and its number in it, so a tensor tells where it is
from.
"""

import io
import random
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import RandomSampler, SequentialSampler

from datamodules import ImageDataModule
from datamodules.image_sources import Pool, UnreadableImage, decode, read_classes

SIZE = 8
PLAIN = {"image_size": SIZE, "crop_pct": 1.0, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}


def colour(label, number):
    return (10 + label, number, 200)


def write_folder(root, counts, size=SIZE):
    """counts: class -> number of images; labels in the colours are ranks of the sorted names."""
    for label, (name, count) in enumerate(sorted(counts.items())):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (size, size), colour(label, number)).save(root / name / f"{number:03}.png")


@pytest.fixture
def root(tmp_path):
    write_folder(tmp_path / "train", {"ant": 9, "bee": 12, "cat": 3})
    write_folder(tmp_path / "val", {"ant": 4, "bee": 2, "cat": 1})
    return tmp_path


def make(root, **options):
    return ImageDataModule(str(root), **{**PLAIN, "num_calibration": 6, "batch_size": 4, **options})


def ready(root, stage="fit", **options):
    data = make(root, **options)
    data.setup(stage)
    return data


def attach(data, num_classes=3, armed=False, **config):
    """A trainer whose module has what data modules ask for."""
    config = {"input_size": (3, SIZE, SIZE), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 1.0), **config}
    module = SimpleNamespace(num_classes=num_classes, calibration_step=print if armed else None, data_config=config)
    data.trainer = SimpleNamespace(lightning_module=module)
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


# Calibration and held-out images


def test_calibration_images_are_spread_evenly_over_classes_and_disjoint_from_heldout(root):
    data = ready(root, num_calibration=10, num_heldout=6)
    calibration, heldout = data.calibration_dataloader(), data.val_dataloader()[1]
    assert Counter(label for label, _ in identities(heldout)) == {0: 2, 1: 2, 2: 2}
    counts = Counter(label for label, _ in identities(calibration))
    assert counts[2] == 1 and {counts[0], counts[1]} == {4, 5}  # only one cat is left
    assert not set(identities(calibration)) & set(identities(heldout))
    assert len(set(identities(calibration))) == 10
    labels = joined(calibration)["label"].tolist()
    assert labels == [label for label, _ in identities(calibration)]
    assert sorted(labels[:3]) == [0, 1, 2] and labels != sorted(labels)
    assert joined(calibration)["index"].tolist() == list(range(10)) and joined(heldout)["index"].tolist() == list(range(6))


def test_all_training_images_can_be_drawn_but_no_more(root):
    data = ready(root, num_calibration=20, num_heldout=4)
    drawn = identities(data.calibration_dataloader()) + identities(data.val_dataloader()[1])
    assert sorted(drawn) == [(label, number) for label, count in enumerate((9, 12, 3)) for number in range(count)]
    data = ready(root, num_calibration=21, num_heldout=4)
    assert len(identities(data.predict_dataloader())) == 7  # nothing is drawn that is not needed
    with pytest.raises(ValueError, match=r"`num_calibration` = 21 and `num_heldout` = 4 expected at most 24 images together"):
        data.calibration_dataloader()
    with pytest.raises(ValueError, match="expected at most 24"):
        ready(root, num_heldout=25).val_dataloader()


def test_draws_depend_on_the_seed_alone(root):
    def drawn(part, seed=1, stage="fit", **options):
        data = ready(root, stage, **{"seed": seed, "num_heldout": 3, **options})
        torch.manual_seed(len(options))
        state = torch.get_rng_state()
        loader = data.calibration_dataloader() if part == "calibration" else data.val_dataloader()[1]
        assert torch.equal(torch.get_rng_state(), state)
        return identities(loader)

    calibration, heldout = drawn("calibration"), drawn("heldout")
    assert drawn("calibration") == calibration != drawn("calibration", seed=2)
    assert drawn("heldout", stage="validate") == heldout != drawn("heldout", seed=2)
    assert drawn("heldout", num_calibration=9) == heldout  # of another size, it leaves the other part alone
    assert drawn("calibration", num_heldout=0) == calibration
    assert drawn("calibration", num_calibration=3) == calibration[:3]


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


def test_the_map_must_suit_the_model(root):
    data = attach(ready(root), num_classes=3)
    data.train_dataloader()
    for outputs in (2, 5):
        with pytest.raises(ValueError, match=f"the 3 of .* but the model has {outputs}: .* Give data.classes"):
            attach(ready(root), num_classes=outputs).val_dataloader()
    (root / "classes.txt").write_text("ant\nbee\ncat\ndog\n")
    data = ready(root, classes=str(root / "classes.txt"))
    attach(data, num_classes=5).val_dataloader()  # a map may leave outputs without name
    with pytest.raises(ValueError, match=r"`classes` = .* at most as many classes as the model has, 3, but got 4"):
        attach(data, num_classes=3).val_dataloader()


# One image


def encoded(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


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


def test_evaluation_equals_a_naive_computation(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / part / "a" / "x.PNG")
    mean, std = [0.1, 0.5, 0.4], [0.2, 0.3, 1.5]
    data = ready(tmp_path, mean=mean, std=std, num_calibration=1)
    expected = torch.empty(3, SIZE, SIZE, dtype=torch.float64)
    for channel in range(3):
        for row in range(SIZE):
            for column in range(SIZE):
                expected[channel, row, column] = (pixels[row, column, channel] / 255 - mean[channel]) / std[channel]
    for loader in (data.val_dataloader(), data.predict_dataloader(), data.calibration_dataloader()):
        batch = next(iter(loader))
        assert batch["image"].dtype == torch.float32 and batch["label"].dtype == batch["index"].dtype == torch.int64
        torch.testing.assert_close(batch["image"][0].double(), expected, rtol=0, atol=1e-6)
        assert "skipped" not in batch


def test_crop_keeps_the_middle(tmp_path):
    image = Image.new("RGB", (16, 16), (255, 255, 255))
    image.paste((0, 0, 0), (4, 4, 12, 12))
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        image.save(tmp_path / part / "a" / "x.png")
    assert next(iter(ready(tmp_path, crop_pct=0.5).val_dataloader()))["image"].max() == 0
    assert next(iter(ready(tmp_path, crop_pct=1.0).val_dataloader()))["image"].max() > 0.9


# Images that cannot be read


def test_a_corrupt_image_is_an_error_that_names_it(root):
    truncate(root / "train" / "bee" / "004.png")
    truncate(root / "val" / "cat" / "000.png")
    data = ready(root, num_calibration=24)
    remedy = r"cannot be read .*Delete or replace it, or set data\.on_corrupt to skip"
    for loader, name in ((data.train_dataloader(), "bee/004.png"), (data.val_dataloader(), "cat/000.png")):
        with pytest.raises(RuntimeError, match=f"{name}' {remedy}"):
            list(loader)
    with pytest.raises(RuntimeError, match=f"bee/004.png' {remedy}"):
        data.calibration_dataloader()
    with pytest.raises(RuntimeError, match=f"cat/000.png' {remedy}"):
        list(ready(root, num_workers=1).val_dataloader())


def test_skip_leaves_images_out_and_counts_them(root):
    truncate(root / "train" / "bee" / "004.png")
    (root / "train" / "cat" / "001.png").write_bytes(b"")
    for number in (0, 1, 2, 3):
        (root / "val" / "ant" / f"{number:03}.png").write_text("<html>")
    data = ready(root, on_corrupt="skip")
    batches = list(data.val_dataloader())  # of 4 and 3, all of the first unreadable
    assert [batch["skipped"].item() for batch in batches] == [4, 0]
    assert all(batch["skipped"].shape == () and batch["skipped"].dtype == torch.int64 for batch in batches)
    assert batches[0]["image"].shape == (0, 3, SIZE, SIZE) and batches[0]["image"].dtype == torch.float32
    assert batches[0]["label"].shape == batches[0]["index"].shape == (0,) and batches[0]["label"].dtype == torch.int64
    assert batches[1]["index"].tolist() == [4, 5, 6] and batches[1]["label"].tolist() == [1, 1, 2]
    batches = list(data.train_dataloader())
    assert sum(batch["skipped"].item() for batch in batches) == 2 and sum(len(batch["image"]) for batch in batches) == 22
    assert data.val_dataloader().dataset[0] is None


def test_skip_replaces_calibration_and_heldout_images(root, caplog):
    for number in (0, 2):
        truncate(root / "train" / "cat" / f"{number:03}.png")
    for number in range(6):
        truncate(root / "train" / "ant" / f"{number:03}.png")
    data = ready(root, on_corrupt="skip", num_calibration=10, num_heldout=3)
    with caplog.at_level("INFO"):
        loaders = data.val_dataloader()[1], data.calibration_dataloader()
    heldout, calibration = (identities(loader) for loader in loaders)
    assert Counter(label for label, _ in heldout) == {0: 1, 1: 1, 2: 1}  # the one cat, one of three ants
    assert Counter(label for label, _ in calibration) == {0: 2, 1: 8}
    assert not set(heldout) & set(calibration) and len(set(calibration)) == 10
    assert all("skipped" not in batch for loader in loaders for batch in loader)
    assert joined(loaders[1])["index"].tolist() == list(range(10))
    lines = [record.message for record in caplog.records if "could not be read replaced" in record.message]
    assert sum(int(line.split(", ")[-1].split()[0]) for line in lines) == 8
    with pytest.raises(
        ValueError, match=r"calibration images expected to be 17 but only 16 could be drawn .*\(8 could not be read"
    ):
        ready(root, on_corrupt="skip", num_calibration=17).calibration_dataloader()


def test_an_image_that_vanishes_is_unreadable(root):
    data = ready(root)
    (root / "val" / "cat" / "000.png").unlink()
    with pytest.raises(UnreadableImage, match=r"cat/000.png' cannot be read \(FileNotFoundError"):
        list(data.val_dataloader())


# Dataloaders


def test_training_is_shuffled_by_the_global_seed_and_whole(root):
    data = ready(root)
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        orders.append(joined(data.train_dataloader())["index"].tolist())
    assert orders[0] == orders[1] != orders[2] and orders[0] != sorted(orders[0])
    assert sorted(orders[0]) == list(range(24))
    states = torch.get_rng_state(), random.getstate()
    loader = ready(root, augmentation={"hflip": 0.5, "re_prob": 0.5}).train_dataloader()
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert isinstance(loader.sampler, RandomSampler)


def test_an_armed_module_gets_calibration_images(root):
    data = attach(ready(root, mean=None, std=None, augmentation={"hflip": 1.0}), armed=True)
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, SequentialSampler) and not loader.drop_last
    assert [len(batch["index"]) for batch in loader] == [4, 2]
    first, again = joined(loader), joined(data.train_dataloader())
    assert all(torch.equal(first[key], again[key]) for key in first)
    data.trainer.lightning_module.calibration_step = None
    assert len(joined(data.train_dataloader())["index"]) == 24


def test_the_model_is_asked_and_arguments_go_first(root):
    own = attach(ready(root, image_size=None, mean=None, std=None, crop_pct=None), input_size=(3, 6, 4), crop_pct=1.0)
    images = next(iter(own.val_dataloader()))["image"]
    assert images.shape[1:] == (3, 6, 4)
    expected = (torch.tensor([10, 0, 200]) / 255 - 0.5) / torch.tensor([0.25, 0.5, 1.0])
    torch.testing.assert_close(images[0, :, 0, 0], expected)
    given = attach(ready(root, image_size=5, std=[1.0, 1.0, 1.0]), input_size=(3, 6, 4), interpolation="bicubic")
    images = next(iter(given.val_dataloader()))["image"]
    assert images.shape[1:] == (3, 5, 5)
    torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([10, 0, 200]) / 255)
    with pytest.raises(ValueError, match="3 channels, but the model expected 1"):
        attach(ready(root), input_size=(1, 8, 8)).val_dataloader()


def test_without_a_model_the_size_is_asked_for_and_the_rest_is_that_of_imagenet(root):
    with pytest.raises(ValueError, match="`image_size` is null and there is no model to ask; give it"):
        ready(root, image_size=None).val_dataloader()
    images = next(iter(ready(root, mean=None, std=None).val_dataloader()))["image"]
    expected = (torch.tensor([10, 0, 200]) / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(images[0, :, 0, 0], expected)


def test_augmentation_reaches_timm(tmp_path):
    ramp = np.repeat(np.arange(SIZE, dtype=np.uint8)[None, :, None] * 30, SIZE, 0).repeat(3, 2)
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.fromarray(ramp).save(tmp_path / part / "a" / "x.png")
    still = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "color_jitter": 0.0}
    plain = next(iter(ready(tmp_path).val_dataloader()))["image"]
    flipped = next(iter(ready(tmp_path, augmentation={**still, "hflip": 1.0}).train_dataloader()))["image"]
    torch.testing.assert_close(flipped, plain.flip(-1))
    unflipped = next(iter(ready(tmp_path, augmentation={**still, "hflip": 0.0}).train_dataloader()))["image"]
    torch.testing.assert_close(unflipped, plain)
    strong = {"auto_augment": "rand-m9-mstd0.5", "re_prob": 0.25, "scale": [0.8, 1.0], "interpolation": "random"}
    data = ready(tmp_path, augmentation=strong)
    image = next(iter(data.train_dataloader()))["image"]
    assert image.dtype == torch.float32 and image.shape == (1, 3, SIZE, SIZE)
    torch.testing.assert_close(next(iter(data.val_dataloader()))["image"], plain)


def test_wrong_augmentation(root):
    with pytest.raises(ValueError, match=r"got 'flip', 'normalize'; accepted are no_aug, .*hflip"):
        make(root, augmentation={"hflip": 0.5, "flip": 1, "normalize": False})
    with pytest.raises(ValueError, match=r"`augmentation` = {'auto_augment': 'nonsense'} was not accepted by timm"):
        ready(root, augmentation={"auto_augment": "nonsense"}).train_dataloader()


def test_workers_change_nothing(root):
    parts = []
    for number in (0, 2):
        data = ready(root, num_workers=number, batch_size=2, num_heldout=3)
        parts.append([joined(loader) for loader in (*data.val_dataloader(), data.calibration_dataloader())])
    for alone, two in zip(*parts, strict=True):
        assert all(torch.equal(alone[key], two[key]) for key in alone)


def test_batches_of_one_and_a_rest_of_one(root):
    assert [len(batch["image"]) for batch in ready(root, batch_size=3).val_dataloader()] == [3, 3, 1]
    batches = list(ready(root, batch_size=1).train_dataloader())
    assert len(batches) == 24 and all(batch["image"].shape == (1, 3, SIZE, SIZE) for batch in batches)


def test_rule_images(root, tmp_path):
    write_folder(tmp_path / "other" / "deep", {"x": 5})
    write_folder(tmp_path / "more", {"y": 5, "z": 5})
    data = ready(root)
    both = [str(tmp_path / "other"), str(tmp_path / "more")]
    batch = joined(data.rule_dataloader(both, 7))
    assert batch["label"].tolist() == [-1] * 7 and batch["index"].tolist() == list(range(7))
    assert len({tuple(image[:, 0, 0].tolist()) for image in batch["image"]}) > 3
    assert torch.equal(joined(data.rule_dataloader(both, 7))["image"], batch["image"])
    assert not torch.equal(joined(ready(root, seed=5).rule_dataloader(both, 7))["image"], batch["image"])
    assert sorted(identities(data.rule_dataloader(both[0], 5))) == [(0, number) for number in range(5)]
    with pytest.raises(ValueError, match="rule images expected to be 6 but only 5"):
        data.rule_dataloader(both[0], 6)
    with pytest.raises(
        ValueError, match=r"Argument `rule_source` expected a folder with .png .jpg .jpeg files but got '/nowhere'"
    ):
        data.rule_dataloader("/nowhere", 1)


# Sources


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


def test_setup_scans_what_a_stage_needs_once(root, monkeypatch):
    found = []
    find = ImageDataModule._find
    monkeypatch.setattr(ImageDataModule, "_find", lambda self, part: found.append(part) or find(self, part))
    data = make(root)
    for stage in ("predict", "validate", "fit", "fit", "validate"):
        data.setup(stage)
    assert found == ["val", "train"]
    found.clear()
    ready(root, "validate", num_heldout=1)
    assert found == ["train", "val"]
    with pytest.raises(ValueError, match="`stage` expected one of fit, validate, predict but got 'test'"):
        data.setup("test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_calibration": 0}, "`num_calibration` must be an integer of at least 1, got 0"),
        ({"num_heldout": -1}, "`num_heldout`"),
        ({"batch_size": True}, "`batch_size`"),
        ({"image_size": 0}, "`image_size`"),
        ({"mean": [0.5]}, "`mean` expected a number for R, G and B"),
        ({"std": [1.0, 0.0, 1.0]}, "`std` expected"),
        ({"interpolation": "cubic"}, "`interpolation` expected one of nearest, bilinear, bicubic"),
        ({"crop_pct": 1.5}, r"`crop_pct` expected to be in \(0, 1\]"),
        ({"on_corrupt": "ignore"}, "`on_corrupt` expected error or skip"),
        ({"root": ""}, "`root` expected to be a name"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule(**options)


# With Lightning


class Learner(LightningModule):
    """Keeps the sizes of the batches that it is given."""

    calibration_step = None
    automatic_optimization = False

    def configure_model(self):  # after `setup` of the data module, as in ImageClassifier
        self.num_classes, self.seen = 10, {"train": [], "val": [], "heldout": []}
        self.data_config = {"input_size": (3, SIZE, SIZE), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(len(batch["label"]))

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen[("val", "heldout")[dataloader_idx]].append(len(batch["label"]))

    def configure_optimizers(self):
        return None


@pytest.mark.parametrize("armed", [False, True])
def test_a_trainer_runs_it(armed):
    module = Learner()
    module.calibration_step = print if armed else None
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, num_sanity_val_steps=0, **quiet)
    trainer.fit(module, ImageDataModule(num_calibration=70, num_heldout=30, batch_size=64))
    assert sum(module.seen["train"]) == (70 if armed else 1438)
    assert sum(module.seen["val"]) == 359 and sum(module.seen["heldout"]) == 30


@pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonargparse|.* was deprecated in v4\.49)")
def test_every_argument_survives_the_way_through_yaml(tmp_path, monkeypatch):
    arguments = {
        "root": "owner/name:config",
        "train": "training",
        "val": "validation",
        "classes": "imagenet",
        "num_calibration": 7,
        "num_heldout": 3,
        "seed": 11,
        "batch_size": 2,
        "num_workers": 1,
        "image_size": 32,
        "mean": [0.1, 0.2, 0.3],
        "std": [1.0, 2.0, 3.0],
        "interpolation": "lanczos",
        "crop_pct": 0.9,
        "augmentation": {"scale": [0.8, 1.0], "hflip": 0.0, "auto_augment": "rand-m9-mstd0.5"},
        "on_corrupt": "skip",
    }
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")

    def load(config):
        (tmp_path / "config.yaml").write_text(config)
        options = {"subclass_mode_data": True, "run": False, "save_config_callback": None, "seed_everything_default": 0}
        cli = LightningCLI(Learner, LightningDataModule, args=[f"--config={tmp_path / 'config.yaml'}"], **options)
        hparams = {name: value for name, value in cli.datamodule.hparams.items() if not name.startswith("_")}
        return hparams, cli.parser.dump(cli.config)

    hparams, dumped = load(yaml.safe_dump({"data": {"class_path": "datamodules.ImageDataModule", "init_args": arguments}}))
    assert hparams == arguments and load(dumped) == (arguments, dumped)

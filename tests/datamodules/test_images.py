"""ImageDataModule: draws are even, disjoint and repeatable, dataloaders give what each stage needs, unreadable images are named
or left out."""

import random
import sys
from collections import Counter

import pytest
import torch
import yaml
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import RandomSampler, SequentialSampler

from datamodules import ImageDataModule
from datamodules.image_sources import UnreadableImage
from tests.helpers.coloured_images import SIZE, attach, identities, joined, make, pruning, ready, truncate, write_folder
from tests.helpers.tiny import quiet
from utilities.contract import ModelFacts, TellsModelFacts

# Calibration and held-out images


def test_calibration_images_are_spread_evenly_over_classes_and_disjoint_from_heldout(root):
    data = pruning(root, num_calibration=10, num_heldout=6)
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
    data = pruning(root, num_calibration=20, num_heldout=4)
    drawn = identities(data.calibration_dataloader()) + identities(data.val_dataloader()[1])
    assert sorted(drawn) == [(label, number) for label, count in enumerate((9, 12, 3)) for number in range(count)]
    data = ready(root, num_calibration=21, num_heldout=4)
    assert len(identities(data.predict_dataloader())) == 7  # nothing is drawn that is not needed
    with pytest.raises(ValueError, match=r"`num_calibration` = 21 and `num_heldout` = 4 expected at most 24 images together"):
        data.calibration_dataloader()
    with pytest.raises(ValueError, match="expected at most 24"):
        pruning(root, num_heldout=25).val_dataloader()


def test_draws_depend_on_the_seed_alone(root):
    def drawn(part, seed=1, **options):
        data = pruning(root, **{"seed": seed, "num_heldout": 3, **options})
        torch.manual_seed(len(options))
        state = torch.get_rng_state()
        loader = data.calibration_dataloader() if part == "calibration" else data.val_dataloader()[1]
        assert torch.equal(torch.get_rng_state(), state)
        return identities(loader)

    calibration, heldout = drawn("calibration"), drawn("heldout")
    assert drawn("calibration") == calibration != drawn("calibration", seed=2)
    assert drawn("heldout") == heldout != drawn("heldout", seed=2)
    assert drawn("heldout", num_calibration=9) == heldout  # of another size, it leaves the other part alone
    assert drawn("calibration", num_heldout=0) == calibration
    assert drawn("calibration", num_calibration=3) == calibration[:3]


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
        list(batches := iter(ready(root, num_workers=1).val_dataloader()))
    batches._shutdown_workers()  # left to the collection of garbage, it waits 5 s for the worker


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
    data = pruning(root, on_corrupt="skip", num_calibration=10, num_heldout=3)
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


def test_a_pruning_run_gets_calibration_images(root):
    data = attach(pruning(root, mean=None, std=None, augmentation={"hflip": 1.0}))
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, SequentialSampler) and not loader.drop_last
    assert [len(batch["index"]) for batch in loader] == [4, 2]
    first, again = joined(loader), joined(data.train_dataloader())
    assert all(torch.equal(first[key], again[key]) for key in first)
    data.end_calibration()
    assert len(joined(data.train_dataloader())["index"]) == 24


def test_workers_change_nothing(root):
    parts = []
    for number in (0, 2):
        data = pruning(root, num_workers=number, batch_size=2, num_heldout=3)
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
        ValueError, match=r"Argument `update_rule.source` expected a folder with .png .jpg .jpeg files but got '/nowhere'"
    ):
        data.rule_dataloader("/nowhere", 1)


# Stages and arguments


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
    assert found == ["val"]  # images are held out for a pruning run only
    with pytest.raises(ValueError, match="`stage` expected one of fit, validate, predict but got 'test'"):
        data.setup("test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_calibration": 0}, "`num_calibration` expected to be an integer of at least 1 but got 0"),
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


class Learner(LightningModule, TellsModelFacts):
    """Keeps the sizes of the batches that it is given."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.seen = {"train": [], "val": [], "heldout": []}

    def model_facts(self):
        config = {"input_size": (3, SIZE, SIZE), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
        return ModelFacts(num_classes=10, image_config=config)

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(len(batch["label"]))

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen[("val", "heldout")[dataloader_idx]].append(len(batch["label"]))

    def configure_optimizers(self):
        return None


@pytest.mark.parametrize("prunes", [False, True])
def test_a_trainer_runs_it(tmp_path, prunes):
    module, data = Learner(), ImageDataModule(num_calibration=70, num_heldout=30, batch_size=64)
    if prunes:
        data.begin_calibration(None)
    quiet(tmp_path).fit(module, data)
    assert sum(module.seen["train"]) == (70 if prunes else 1438)
    assert sum(module.seen["val"]) == 359 and sum(module.seen["heldout"]) == (30 if prunes else 0)


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

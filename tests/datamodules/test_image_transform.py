"""From an image to its tensor: what is given, what the model is asked for, and what training augments."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.coloured_images import SIZE, attach, make, ready


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

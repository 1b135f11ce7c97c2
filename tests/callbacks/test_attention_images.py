"""AttentionImages: what reaches TensorBoard, and what the figure says of labels, predictions and attention."""

import re

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from callbacks import AttentionImages, BlockwisePruning
from callbacks.attention_images import Row, attention_over_image
from datamodules import ImageDataModule
from lightning_modules import ImageClassifier
from tests.helpers.tiny import tiny_images, tiny_vit, vision_classifier

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 7}
DIGITS = {"img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 10}


def classifier(name="deit_tiny_patch16_224", model_args=SMALL):
    torch.manual_seed(3)
    module = ImageClassifier(name, model_args=model_args)
    module.configure_model()
    with torch.no_grad():  # large enough that attention matters beside the residual
        for parameter in module.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return module


def trainer(folder, *callbacks, **options):
    """One epoch with TensorBoard, and nothing else that is written."""
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "accelerator": "cpu"}
    options |= {"max_epochs": 1, "num_sanity_val_steps": 0, "logger": TensorBoardLogger(folder)}
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **silent, **options)


def loaders(*counts):
    return [DataLoader(tiny_images(count, seed), batch_size=8) for seed, count in enumerate(counts)]


def texts(figure):
    """All texts of a figure that are not empty."""
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.fixture
def figures(monkeypatch):
    """Collects the figures that are drawn."""
    drawn = []

    def keep(*args, **kwargs):
        drawn.append(attention_over_image(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr("callbacks.attention_images.attention_over_image", keep)
    return drawn


def test_attention_over_images_reaches_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module = classifier("deit_tiny_distilled_patch16_224")
    images = AttentionImages(images=[1, 4], blocks=[0, 1])
    seen = []
    look = images._look
    images._look = lambda trainer, module: seen.append(look(trainer, module)) or seen[-1]
    pruning = BlockwisePruning(sparsity=0.9, method="magnitude", output_dir=str(tmp_path / "pruned"))
    run = trainer(tmp_path, pruning, images)
    run.fit(module, *loaders(24, 10))
    events = EventAccumulator(run.log_dir, size_guidance={"images": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["images"] if tag.startswith("class_token")]
    assert tags == ["class_token_attention/blocks.0", "class_token_attention/blocks.1"]
    assert [event.step for event in events.Images(tags[0])] == [1, 4]
    before, after = (look.attention["blocks.1"] for look in seen)
    assert before.shape == (2, 4, 4, 4) and not torch.allclose(before, after)
    # By hand: the last block of the pruned model, class token to patches.
    block, batch = module.model.blocks[1], torch.stack([tiny_images(10, 1)[i]["image"] for i in (1, 4)])
    kept = []
    handle = block.attn.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        module.eval()(batch)
        handle.remove()
        query, key, _ = block.attn.qkv(kept[0]).double().unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        attention = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)[:, :, 0, 2:]
    torch.testing.assert_close(after.double(), attention.unflatten(-1, (4, 4)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prunes", [True, False])
def test_label_and_prediction_are_in_the_figure(tmp_path, figures, prunes):
    names = [f"digit {i}" for i in range(10)]
    module, data = classifier(model_args=DIGITS), ImageDataModule(num_calibration=16, batch_size=512)
    images = AttentionImages(images=[5, 2])
    extra = [BlockwisePruning(sparsity=0.9, method="magnitude", output_dir=str(tmp_path / "pruned"))] if prunes else []
    data.setup("fit")
    data.classes = names
    trainer(tmp_path, images, *extra).fit(module, datamodule=data)
    shown = [data.val_dataloader().dataset[i] for i in (5, 2)]
    with torch.no_grad():  # the model as `fit` has left it
        probabilities, classes = module.eval()(torch.stack([item["image"] for item in shown])).softmax(-1).max(-1)
    for figure, position, item, share, label in zip(figures, (5, 2), shown, probabilities, classes, strict=True):
        found = texts(figure)
        assert f"Validation image {position}: attention of the class token in blocks.1" in found
        assert f"label:\n{names[item['label']]}" in found
        before, after = (text for text in found if text.startswith("predicted"))
        assert re.fullmatch(r"predicted:\ndigit \d \(\d+\.\d%\)", before)
        assert after == f"predicted:\n{names[label]} ({float(share):.1%})"
        assert {"dense", "pruned"} <= set(found) if prunes else {"before training", "after training"} <= set(found)


def test_colour_bars_have_the_scale_of_their_head():
    maps = torch.tensor([[[0.1, 0.2], [0.3, 0.25]], [[0.0, 0.0], [0.01, 0.0]]])
    rows = {"dense": Row(maps, "cat (50.0%)"), "pruned": Row(maps / 2, "dog (40.0%)")}
    figure = attention_over_image(torch.rand(3, 4, 4), rows, label="cat", title="above")
    found = texts(figure)
    assert {"above", "label:\ncat", "predicted:\ncat (50.0%)", "predicted:\ndog (40.0%)", "30 %", "1 %"} <= set(found)
    assert any("from the class token to a patch" in text.replace("\n", " ") for text in found)
    bars = [axis.get_xlim() for axis in figure.axes if "30 %" in [t.get_text() for t in axis.get_xticklabels()]]
    assert bars == [(0.0, pytest.approx(30))]
    drawn = [axis.images[1] for axis in figure.axes if len(axis.images) == 2]
    assert len(drawn) == 4 and all(image.get_clim()[0] == 0 for image in drawn)
    assert sorted(image.get_clim()[1] for image in drawn) == pytest.approx([1, 1, 30, 30])


def test_images_that_cannot_be_read_are_left_out(tmp_path, figures):
    images = tiny_images(6, 7)
    images[1] = None
    train, validation = *loaders(8), DataLoader(images, batch_size=1)
    trainer(tmp_path, AttentionImages([1, 4]), limit_val_batches=1).fit(classifier(), train, validation)
    (figure,) = figures
    assert "Validation image 4: attention of the class token in blocks.1" in texts(figure)
    assert f"label:\n{int(images[4]['label'])}" in texts(figure)


def test_half_precision(tmp_path, figures):
    trainer(tmp_path, AttentionImages([0]), precision="bf16-true").fit(classifier(), *loaders(8, 8))
    assert len(figures) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": [2]}, r"`blocks` expected to name some of 2 blocks but got \[2\]"),
        ({"images": [6]}, r"`images` expected positions in 6 validation images but got \[6\]"),
    ],
)
def test_positions_out_of_range(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, AttentionImages(**arguments)).fit(classifier(), *loaders(6, 6))


@pytest.mark.parametrize("family", ["swin", "xcit"])
def test_blocks_that_do_not_attend_to_the_whole_image_are_refused(family, tmp_path):
    module = vision_classifier(family)
    with pytest.raises(
        ValueError, match=rf"tokens attend to the whole image, but those of {module.family} do not.*Leave it out"
    ):
        trainer(tmp_path, AttentionImages()).fit(module, *loaders(4, 4))


def test_other_modules_are_refused(tmp_path):
    with pytest.raises(TypeError, match="AttentionImages needs an ImageClassifier but got TinyViT"):
        trainer(tmp_path, AttentionImages()).fit(tiny_vit(), *loaders(6, 6))

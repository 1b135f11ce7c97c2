"""ImageClassifier: loading, accuracy, training, saving; fused and separate projections; pruning through every update rule."""

import json

import pytest
import timm
import torch
import transformers
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from callbacks import AttentionRule, BlockwisePruning, FixedRule, OutlierRule, SaveModel
from lightning_modules import ImageClassifier
from lightning_modules.parts.vision_models import denormalised
from tests.helpers.tiny import tiny_images

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 7}
TIMM = ("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch16_224")


def loader(count=24, seed=0, batch_size=8):
    return DataLoader(tiny_images(count, seed), batch_size=batch_size)


def quiet(path, **arguments):
    options = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=path, enable_checkpointing=False, **{**options, **arguments})


def classifier(name=TIMM[0], **arguments):
    torch.manual_seed(3)
    module = ImageClassifier(name, model_args=SMALL, **arguments)
    module.configure_model()
    with torch.no_grad():  # large enough that attention matters beside the residual
        for parameter in module.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return module


def save_transformers(path, kind):
    config = getattr(transformers, f"{kind}Config")(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=7,
    )
    torch.manual_seed(4)
    name = {"ViT": "ViTForImageClassification", "DeiT": "DeiTForImageClassificationWithTeacher"}[kind]
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    model.save_pretrained(path)
    processor = getattr(transformers, f"{kind}ImageProcessor")
    processor(size={"height": 20, "width": 20}, crop_size={"height": 16, "width": 16}, do_center_crop=True).save_pretrained(
        path
    )
    return str(path)


@pytest.mark.parametrize("name", TIMM)
def test_accuracy_and_loss_equal_counting_by_hand(name, tmp_path):
    module = classifier(name)
    module.eval()
    metrics = quiet(tmp_path).validate(module, [loader(20, 1), loader(9, 2, batch_size=1)], verbose=False)
    found = {key: value for entry in metrics for key, value in entry.items()}
    for split, count, seed in (("val", 20, 1), ("heldout", 9, 2)):
        items = tiny_images(count, seed)
        labels = torch.tensor([int(item["label"]) for item in items])
        with torch.no_grad():
            scores = module.model(torch.stack([item["image"] for item in items])).double()
        log_probabilities = scores - scores.exp().sum(1, keepdim=True).log()
        ranks = (scores > scores.gather(1, labels[:, None])).sum(1)
        assert found[f"{split}/loss"] == pytest.approx(-log_probabilities.gather(1, labels[:, None]).mean().item(), rel=1e-5)
        assert found[f"{split}/top1"] == pytest.approx((ranks < 1).double().mean().item())
        assert found[f"{split}/top5"] == pytest.approx((ranks < 5).double().mean().item())


def test_unreadable_images_are_counted_and_in_no_metric(tmp_path):
    module = classifier()
    batch = next(iter(loader(4, 1)))
    empty = {"image": batch["image"][:0], "label": batch["label"][:0], "index": batch["index"][:0]}
    batches = [batch | {"skipped": torch.tensor(1)}, empty | {"skipped": torch.tensor(2)}]
    found = quiet(tmp_path).validate(module, DataLoader(batches, batch_size=None), verbose=False)[0]
    alone = quiet(tmp_path).validate(module, DataLoader([batch], batch_size=None), verbose=False)[0]
    assert found.pop("val/skipped") == 3
    assert found == alone


@pytest.mark.parametrize(
    ("name", "model_args", "expected"),
    [
        (TIMM[0], {}, 1),
        (TIMM[1], {}, 2),
        (TIMM[2], {"reg_tokens": 3}, 1),
        (TIMM[2], {"class_token": False, "global_pool": "avg"}, 0),
        (TIMM[2], {"class_token": False, "global_pool": "avg", "reg_tokens": 3}, 0),
    ],
)
def test_class_tokens_come_first_in_the_blocks(name, model_args, expected):
    """They are where changes of their parameters arrive; registers do not count."""
    module = ImageClassifier(name, model_args=SMALL | model_args)
    module.configure_model()
    assert module.class_tokens == expected
    hidden = []
    module.model.eval().blocks[0].register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    with torch.no_grad():
        for _ in range(2):
            module(torch.zeros(1, 3, 16, 16))
            for parameter in ("cls_token", "dist_token"):
                if getattr(module.model, parameter, None) is not None:
                    getattr(module.model, parameter).add_(1)
    changed = (hidden[0] != hidden[1]).any(-1)[0]
    assert changed[:expected].all() and not changed[expected:].any()


@pytest.mark.parametrize(("kind", "expected"), [("ViT", 1), ("DeiT", 2)])
def test_class_tokens_of_models_of_transformers(kind, expected, tmp_path):
    module = ImageClassifier(save_transformers(tmp_path, kind))
    module.configure_model()
    assert module.class_tokens == expected


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.8, "cutmix": 1.0}])
def test_training_lowers_the_loss_of_what_it_sees(name, mixing, tmp_path):
    torch.manual_seed(1)
    module = ImageClassifier(name, model_args=SMALL, learning_rate=3e-3, label_smoothing=0.0, **mixing)
    module.configure_model()
    data = loader(21, 5)  # the last batch is odd
    before = quiet(tmp_path).validate(module, data, verbose=False)[0]["val/loss"]
    trainer = quiet(tmp_path, max_epochs=60, limit_val_batches=0)
    trainer.fit(module, data)
    assert quiet(tmp_path).validate(module, data, verbose=False)[0]["val/loss"] < before * 0.8


def test_warm_up_then_cosine_to_zero_and_no_decay_on_biases(tmp_path):
    module = classifier(learning_rate=0.01, warmup=0.2, weight_decay=0.3)
    rates = []

    class Watch(SaveModel):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            groups = trainer.optimizers[0].param_groups
            for group in groups:
                decayed = group["weight_decay"] > 0
                assert all((parameter.ndim > 1) == decayed or not decayed for parameter in group["params"])
            assert {group["weight_decay"] for group in groups} == {0.0, 0.3}

    trainer = quiet(tmp_path, max_epochs=10, callbacks=[Watch(str(tmp_path / "m"))], limit_val_batches=0)
    trainer.fit(module, loader(16, 5))
    assert len(rates) == 20
    assert rates[:4] == sorted(rates[:4]) and rates[0] < 0.005
    assert max(rates) == pytest.approx(0.01) and rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] < 2e-3


@pytest.mark.parametrize("name", TIMM)
def test_what_is_saved_loads_here_and_in_timm(name, tmp_path):
    module = classifier(name)
    quiet(tmp_path, max_epochs=1, callbacks=[SaveModel(str(tmp_path / "m"))], limit_val_batches=0).fit(module, loader())
    assert sorted(file.name for file in (tmp_path / "m").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = ImageClassifier(str(tmp_path / "m"))
    again.configure_model()
    elsewhere = timm.create_model(name, checkpoint_path=tmp_path / "m" / "model.safetensors", **SMALL)
    for state in (again.model.state_dict(), elsewhere.state_dict()):
        assert all(torch.equal(value, state[key]) for key, value in module.model.state_dict().items())
    assert again.data_config == module.data_config and again.data_config["input_size"] == (3, 16, 16)
    assert again.load_arguments(tmp_path) == {"model_name_or_path": str(tmp_path)}
    assert module.load_arguments(tmp_path) == {"model_name_or_path": str(tmp_path), "model_args": "null"}
    again.save(tmp_path)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "m")]
    for config in configs:  # of the hub's weights, or of these: releases of timm differ
        assert config["pretrained_cfg"].pop("num_classes") in (1000, SMALL["num_classes"])
    assert configs[0] == configs[1]


@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_models_of_transformers_prune_and_load_again(kind, tmp_path):
    module = ImageClassifier(save_transformers(tmp_path / "dense", kind))
    callback = BlockwisePruning(sparsity=0.5, output_dir=str(tmp_path / "pruned"), update_rule=AttentionRule(windows=3))
    quiet(tmp_path, callbacks=[callback]).fit(module, loader(), loader(10, 7))
    assert module.data_config["input_size"] == (3, 16, 16) and module.data_config["crop_pct"] == 0.8
    again = ImageClassifier(str(tmp_path / "pruned"))
    again.configure_model()
    assert all(torch.equal(value, again.model.state_dict()[key]) for key, value in module.model.state_dict().items())
    linears = [x for block in again.blocks.values() for x in again.linears(block).values()]
    assert len(linears) == 12
    assert all((linear.weight == 0).float().mean().item() == pytest.approx(0.5, abs=0.02) for linear in linears)


def fused_from(separate, name):
    """A timm model with the weights of a ViT of transformers."""
    fused = timm.create_model(name, **SMALL, mlp_ratio=1.5).eval()
    source, vit = separate.state_dict(), separate.vit
    with torch.no_grad():
        fused.cls_token.copy_(source["vit.embeddings.cls_token"])
        fused.pos_embed.copy_(source["vit.embeddings.position_embeddings"])
        fused.patch_embed.proj.load_state_dict(vit.embeddings.patch_embeddings.projection.state_dict())
        for block, layer in zip(fused.blocks, vit.layers, strict=True):
            parts = [getattr(layer.attention, f"{role}_proj") for role in "qkv"]
            block.attn.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
            block.attn.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
            block.attn.proj.load_state_dict(layer.attention.o_proj.state_dict())
            block.mlp.fc1.load_state_dict(layer.mlp.fc1.state_dict())
            block.mlp.fc2.load_state_dict(layer.mlp.fc2.state_dict())
            for norm, other in ((block.norm1, layer.layernorm_before), (block.norm2, layer.layernorm_after)):
                norm.load_state_dict(other.state_dict())
                norm.eps = other.eps
        fused.norm.load_state_dict(vit.layernorm.state_dict())
        fused.norm.eps = vit.layernorm.eps
        fused.head.load_state_dict(separate.classifier.state_dict())
    return fused


@pytest.mark.parametrize("rule", [AttentionRule(), FixedRule("k"), OutlierRule()])
def test_fused_and_separate_projections_give_the_same_weights(rule, tmp_path):
    separate = ImageClassifier(save_transformers(tmp_path / "dense", "ViT"))
    separate.configure_model()
    fused = classifier("vit_tiny_patch16_224")
    fused.model = fused_from(separate.model, "vit_tiny_patch16_224")
    images = torch.stack([item["image"] for item in tiny_images(6, 8)])
    with torch.no_grad():
        torch.testing.assert_close(fused(images), separate.eval()(images), rtol=1e-4, atol=1e-5)
    records = []
    for module, name in ((separate, "s"), (fused, "f")):
        callback = BlockwisePruning(sparsity=0.5, output_dir=str(tmp_path / name), update_rule=rule)
        quiet(tmp_path, callbacks=[callback]).fit(module, loader())
        records.append(callback.records)
    assert [record.choice for record in records[0]] == [record.choice for record in records[1]]
    for block, layer in zip(fused.model.blocks, separate.model.vit.layers, strict=True):
        parts = torch.cat([getattr(layer.attention, f"{role}_proj").weight for role in "qkv"])
        torch.testing.assert_close(block.attn.qkv.weight, parts, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(block.mlp.fc2.weight, layer.mlp.fc2.weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("rule", ["attention", "outlier", "perplexity", "fixed"])
def test_every_rule_prunes_and_validates(name, rule, tmp_path):
    module = classifier(name)
    callback = BlockwisePruning(pattern="2:4", update_rule=rule, output_dir=str(tmp_path / "pruned"))
    quiet(tmp_path, callbacks=[callback]).fit(module, loader(), [loader(10, 7), loader(12, 9)])
    assert set(callback.metrics["pruned"]) == {
        f"{split}/{name}" for split in ("val", "heldout") for name in ("loss", "top1", "top5")
    }
    for block in module.blocks.values():
        for linear in module.linears(block).values():
            assert (linear.weight.unflatten(1, (-1, 4)) == 0).sum(-1).eq(2).all()
    if rule == "perplexity":  # judged by the held-out images, not by those that are reported
        losses = {held: callback.metrics[f"hold_{held}"]["heldout/loss"] for held in "qkv"}
        assert callback.metrics["pruned"]["heldout/loss"] == pytest.approx(min(losses.values()))


def test_the_perplexity_rule_never_takes_validation_images(tmp_path):
    callback = BlockwisePruning(sparsity=0.5, update_rule="perplexity", output_dir=str(tmp_path / "pruned"))
    with pytest.raises(ValueError, match=r"heldout/loss on held-out data.*data.num_heldout"):
        quiet(tmp_path, callbacks=[callback]).fit(classifier(), loader(), loader(10, 7))


def test_pictures_undo_the_normalisation():
    config = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.1)}
    picture = torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(denormalised((picture - mean) / std, config), picture, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_name_or_path": "deit_tinny"}, r"'deit_tinny' is neither a model of timm.*Near: deit"),
        ({"model_name_or_path": "logs/no/such"}, r"not an existing directory"),
        ({"model_name_or_path": "owner/model"}, r"hub id of transformers: set `pretrained`"),
        ({"model_name_or_path": "resnet18"}, r"'ResNet' is not in ARCHITECTURES"),
        ({"model_name_or_path": TIMM[0], "checkpoint": "weights.pth"}, r"existing .safetensors file but got 'weights.pth'"),
        ({"model_name_or_path": TIMM[0], "pretrained": True, "checkpoint": "a.safetensors"}, r"not both"),
        ({"model_name_or_path": TIMM[0], "model_args": {"colour": 1}}, r"`model_args` = .'colour': 1.*colour"),
    ],
)
def test_wrong_models(arguments, message):
    with pytest.raises(ValueError, match=message):
        module = ImageClassifier(**arguments)
        module.arm(print)
        module.configure_model()


def test_weights_of_another_shape_are_refused(tmp_path):
    classifier().save(tmp_path)
    arguments = {"checkpoint": str(tmp_path / "model.safetensors"), "model_args": SMALL | {"num_classes": 9}}
    with pytest.raises(ValueError, match=r"does not fit deit_tiny_patch16_224.*num_classes must be those"):
        ImageClassifier(TIMM[0], **arguments).configure_model()
    with pytest.raises(ValueError, match="is a directory, which holds model and weights"):
        ImageClassifier(str(tmp_path), **arguments).configure_model()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no config.json and model.safetensors"):
        ImageClassifier(str(tmp_path)).configure_model()


@pytest.mark.parametrize("arguments", [{"warmup": 1.0}, {"label_smoothing": -0.1}, {"mixup": -1}, {"learning_rate": -1}])
def test_wrong_settings_fail_when_written(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` expected"):
        ImageClassifier(TIMM[0], **arguments)


def test_predict_gives_the_most_probable_classes(tmp_path, capsys):
    module = classifier()
    results = quiet(tmp_path).predict(module, loader(5, 1))
    with torch.no_grad():
        scores = nn.functional.softmax(module.model.eval()(next(iter(loader(5, 1)))["image"]), -1)
    assert torch.equal(results[0]["classes"][:, 0], scores.argmax(-1)) and results[0]["classes"].shape == (5, 5)
    printed = capsys.readouterr().out
    assert "[3] " in printed and "[4] " not in printed  # the first few; the file has all
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(5))
    assert [row["classes"] for row in rows] == results[0]["classes"].tolist()

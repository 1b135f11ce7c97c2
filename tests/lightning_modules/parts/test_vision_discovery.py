"""Discovery of vision models: families of timm without an entry are pruned and load again; others are refused with reasons."""

import json

import pytest
import timm
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader

from callbacks import AttentionRule, BlockwisePruning, FixedRule, KeepSparsity, Score
from lightning_modules import ImageClassifier
from lightning_modules.parts.architectures import PrunableLinear
from lightning_modules.parts.attention_form import run_attention_eagerly
from lightning_modules.parts.vision_discovery import discover_vision
from tests.helpers.tiny import DISCOVERED, quiet, tiny_images, vision_classifier

QKV_FAMILIES = ("beit", "beitv2", "eva", "eva02", "dinov3", "swin", "swinv2", "cait", "relpos")
"""Families whose q, k and v are found."""
STAGED = ("swin", "swinv2", "convnext", "convnextv2", "maxvit", "davit", "relpos")
"""Families whose stages, or stem, are in the chain and downsample."""
ANY_SIZE = ("ConvNeXt", "MaxxVit", "DaVit")
"""Classes that take images of any size, here of 64 pixels."""


def size_of(module):
    return 64 if module.family in ANY_SIZE else module.data_config["input_size"][-1]


def loader(module, count=12, seed=0, batch_size=4):
    return DataLoader(tiny_images(count, seed, size_of(module)), batch_size=batch_size)


def images_of(module, count=3):
    return torch.stack([item["image"] for item in tiny_images(count, 5, size_of(module))])


def prune(module, folder, **settings):
    callback = BlockwisePruning(output_dir=str(folder / "pruned"), **{"method": "d2_sparsegpt", "sparsity": 0.5} | settings)
    quiet(folder, callback, max_epochs=None).fit(module, loader(module))
    module.eval()
    return callback


def linears_of(module):
    """Full name of a weight -> linear with that weight, whole."""
    names = {value: name for name, value in module.model.named_modules()}
    found = [linear for block in module.blocks.values() for linear in module.linears(block).values()]
    return {f"{names[linear.module]}.weight": PrunableLinear(linear.module) for linear in found}


def check_stream(module, images):
    """Blocks run one by one return what they return in the model, and the head makes the model's logits of it."""
    blocks, leaving = list(module.blocks.values()), []
    hooks = [block.register_forward_hook(lambda _, args, out: leaving.append(out)) for block in blocks]
    with torch.no_grad():
        module(images)
    for hook in hooks:
        hook.remove()
    stream = module.block_stream()
    stream.capture(0, lambda: module(images))
    for index, expected in enumerate(leaving):
        stream.advance(0, index)
        torch.testing.assert_close(stream.hidden(0), expected[0] if isinstance(expected, tuple) else expected)


@pytest.mark.parametrize("family", DISCOVERED)
def test_a_family_is_pruned_and_loads_again(family, tmp_path):
    module = vision_classifier(family).eval()
    images = images_of(module)
    check_stream(module, images)
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    prune(module, tmp_path)
    check_stream(module, images)
    linears = linears_of(module)
    assert len(linears) >= 8
    assert all(2 * int((linear.weight == 0).sum()) == linear.weight.numel() for linear in linears.values())
    assert {name for name, value in module.model.state_dict().items() if not torch.equal(value, before[name])} == set(linears)
    again = ImageClassifier(str(tmp_path / "pruned"))
    again.configure_model()
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images), module(images), rtol=1e-4, atol=1e-4)
    report = json.loads((tmp_path / "pruned" / "pruning.json").read_text(encoding="utf-8"))
    assert f"{len(module.blocks)} blocks at" in json.dumps(report)


@pytest.mark.parametrize("family", DISCOVERED)
def test_what_is_found_of_a_family(family):
    module = vision_classifier(family)
    found = module.architecture
    assert isinstance(found.blocks, tuple) == (not found.uniform) == (family in STAGED)
    assert set(found.projections) == (set("qkvo") if family in QKV_FAMILIES else set())
    names = [name for block in module.blocks.values() for name in module.linears(block)]
    wanted = {"eva02": {"mlp.fc1_g", "mlp.fc1_x", "attn.q_proj"}, "swin": {"proj", "reduction", "attn.qkv.v"}}
    wanted |= {"convnext": {"0", "1", "mlp.fc2"}, "cait": {"attn.qkv.q"}, "xcit": {"attn.qkv"}}
    wanted |= {
        "maxvit": {"conv.conv1_1x1", "attn_grid.attn.qkv"},
        "davit": {"conv", "attn.qkv"},
        "relpos": {"proj", "attn.qkv.k"},
    }
    assert wanted.get(family, {"mlp.fc1", "mlp.fc2"}) <= set(names)
    assert module.discovered in module.described().values()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.model.modules())


def test_a_model_is_discovered_while_it_is_validated():
    """The Trainer validates in inference mode, whose tensors have no versions."""
    module = vision_classifier("swin")
    with torch.inference_mode():
        assert len(module.blocks) == 8


@pytest.mark.parametrize("family", QKV_FAMILIES)
def test_rows_of_q_k_and_v_are_those_that_the_attention_reads(family):
    """q of a token changes its own attention only, k the attention of others, v none."""
    module = vision_classifier(family).eval()
    block = next(block for block in module.blocks.values() if module.architecture.projections["q"] in module.linears(block))
    attention, linears, calls = module.attention(block), module.linears(block), []
    hook = attention.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        module(images_of(module))
        hook.remove()
        _, dense = run_attention_eagerly(attention, *calls[0])
        moved = {}
        for role in "qkv":
            linear = linears[module.architecture.projections[role]]

            def change(_, args, output, rows=linear.rows):
                output = output.clone()
                output[0, 1, rows] += 5 * torch.randn(len(output[0, 1, rows]), generator=torch.Generator().manual_seed(1))
                return output

            handle = linear.module.register_forward_hook(change)
            difference = (run_attention_eagerly(attention, *calls[0])[1] - dense).abs().amax(1)
            handle.remove()
            moved[role] = difference.amax(-1)[0] > 1e-5  # queries of the first sample, or window
    assert moved["q"].nonzero().flatten().tolist() == [1]
    assert moved["k"].sum() > 1 and not moved["v"].any()


@pytest.mark.parametrize("family", ["beit", "eva02", "swin", "cait"])
def test_the_attention_rule_chooses_in_every_block_with_an_attention(family, tmp_path):
    module = vision_classifier(family)
    callback = prune(module, tmp_path, method="d2prune", update_rule=AttentionRule(windows=3))
    has_attention = [module.architecture.projections["q"] in module.linears(block) for block in module.blocks.values()]
    assert [set(record.update_shares) == set("qkv") for record in callback.records] == has_attention
    assert [bool(record.attention) for record in callback.records] == has_attention


@pytest.mark.parametrize("family", ["beit", "swin", "convnext"])
@pytest.mark.parametrize("allocation", ["uniform", "error"])
def test_the_joint_solver_with_a_target(family, allocation, tmp_path):
    module = vision_classifier(family)
    callback = prune(module, tmp_path, solver="joint", allocation=allocation)
    linears = linears_of(module).values()
    zeros, weights = sum(int((x.weight == 0).sum()) for x in linears), sum(x.weight.numel() for x in linears)
    assert zeros == pytest.approx(weights / 2, abs=1)
    assert all(0 < linear.relative_error < 1 for record in callback.records for linear in record.linears.values())


@pytest.mark.parametrize("family", ["beit", "swin"])
def test_offload_changes_no_bit(family, tmp_path):
    states = []
    for offload in (False, True):
        module = vision_classifier(family)
        prune(module, tmp_path, offload=offload)
        states.append({name: value.clone() for name, value in module.model.state_dict().items()})
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


@pytest.mark.parametrize("family", ["eva", "swinv2", "convnext"])
def test_two_of_four(family, tmp_path):
    module = vision_classifier(family)
    prune(module, tmp_path, sparsity=None, pattern="2:4", method="wanda")
    for linear in linears_of(module).values():
        assert (linear.weight.unflatten(1, (-1, 4)) == 0).sum(-1).eq(2).all()


def test_a_rule_without_roles_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`update_rule` = .*this model has no projection q, k, v, only none. Use FixedRule"):
        prune(vision_classifier("convnext"), tmp_path, method="d2prune")
    callback = prune(vision_classifier("convnext"), tmp_path, method="d2prune", update_rule=FixedRule("none"))
    assert callback.metrics["dense"] == {} and all(record.sparsity == 0.5 for record in callback.records)


def test_a_convolution_is_its_matrix():
    """Its positions as tokens give what it gives; what a stride leaves over is read by neither."""
    torch.manual_seed(0)
    images = torch.randn(2, 5, 7, 8)
    for conv in (nn.Conv2d(5, 6, 2, stride=2), nn.Conv2d(5, 6, (3, 2), stride=(3, 2), bias=False), nn.Conv2d(5, 6, 1)):
        linear = PrunableLinear(conv)
        tokens = linear.tokens_in(images)
        bias = 0 if conv.bias is None else conv.bias
        torch.testing.assert_close(tokens @ linear.weight.T + bias, linear.tokens_out(conv(images)))
        linear.clear(linear.weight > 0)
        assert (conv.weight <= 0).all() and linear.in_features == conv.weight[0].numel()
        linear.assign(torch.ones(6, linear.in_features))
        assert (conv.weight == 1).all()


@pytest.mark.parametrize("family", ["swin", "convnext", "maxvit"])
def test_samples_are_told_apart_in_windows_and_convolutions(family, tmp_path):
    """The official norms weight each sample by its position, so rows of another sample would change the masks."""
    weights = []
    for batch_size in (1, 6):
        module = vision_classifier(family)
        settings = {"method": "d2_wanda", "score": Score(activation_norm="official", lambda1=3.0)}
        callback = BlockwisePruning(sparsity=0.5, output_dir=str(tmp_path / "pruned"), **settings)
        quiet(tmp_path, callback, max_epochs=None).fit(module, loader(module, 6, batch_size=batch_size))
        weights.append({name: linear.weight.clone() for name, linear in linears_of(module).items()})
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight)


@pytest.mark.parametrize("family", DISCOVERED)
def test_class_tokens_are_where_changes_of_their_parameter_arrive(family):
    module = vision_classifier(family).eval()
    hidden = []
    next(iter(module.blocks.values())).register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    with torch.no_grad():
        for _ in range(2):
            module(images_of(module, 1))
            if getattr(module.model, "cls_token", None) is not None:
                module.model.cls_token.add_(1)
    changed = (hidden[0] != hidden[1]).any(-1).flatten()
    assert changed[: module.class_tokens].all() and not changed[module.class_tokens :].any()
    assert module.class_tokens == (family in ("beit", "beitv2", "eva", "eva02", "dinov3"))


@pytest.mark.parametrize("family", ["swin", "convnext"])
def test_zeros_stay_while_the_model_is_trained_on(family, tmp_path):
    prune(vision_classifier(family), tmp_path)
    module = ImageClassifier(str(tmp_path / "pruned"))
    module.configure_model()
    before = {name: linear.weight.clone() for name, linear in linears_of(module).items()}
    quiet(tmp_path, KeepSparsity(), max_epochs=1).fit(module, loader(module))
    for name, linear in linears_of(module).items():
        assert torch.equal(linear.weight == 0, before[name] == 0) and not torch.equal(linear.weight, before[name])


def test_an_mlp_mixer_mixes_tokens_with_linears_too(tmp_path):
    sizes = {"img_size": 48, "patch_size": 8, "num_blocks": 2, "embed_dim": 64, "num_classes": 7}
    model = timm.models.build_model_with_cfg(timm.models.MlpMixer, "mixer_s32_224", False, **sizes)
    with torch.no_grad():
        model.head.weight.normal_()
    module = ImageClassifier(model)
    prune(module, tmp_path)
    assert {"mlp_tokens.fc2", "mlp_channels.fc1"} <= set(module.architecture.linears)
    check_stream(module, images_of(module))


class Block(nn.Module):
    """A block with linears of which some cannot be pruned."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.up, self.down, self.gate, self.few = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(4, 32)

    def forward(self, x, other=None):
        y = self.up(x)
        if self.kind == "flipped":
            y = y * self.gate(x.flip(0)).flip(0)
        if self.kind == "pooled":
            y = y * self.gate(x.mean(1, keepdim=True))
        if self.kind == "twice":
            y = y + self.gate(x) * self.gate(x)
        if self.kind == "constant":
            y = y + self.gate(torch.ones(3, 32)).mean()
        y = y + y.roll(1, -1) * (0 if other is None else other)
        return x + self.down(y.relu()) + self.few(x[..., :4])


class Toy(nn.Module):
    """A classifier whose blocks need not be a chain."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.stem = nn.Conv2d(3, 32, 4, stride=4)
        self.blocks = nn.ModuleList([Block(kind) for _ in range(3)])
        self.head = nn.Linear(32, 7)

    def forward(self, images):
        if self.kind == "size":
            raise AssertionError("Images are too small.")
        x = self.stem(images).flatten(2).mT
        for block in self.blocks:
            if self.kind == "outside":
                x = x + block(x)
            elif self.kind == "second":
                x = block(x, x.square().mean())
            elif self.kind == "changed":
                x = block(x.mul_(2))
            else:
                x = block(x)
        return self.head(x.mean(1))


def found_in(model):
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return discover_vision(model.eval(), model, images, "toy")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("size", r"it does not run on images of \(3, 16, 16\): Images are too small"),
        ("outside", r"blocks.0 to blocks.0 .*they hold only 31% of its parameters"),
        ("second", r"blocks.0 to blocks.2 \(3 modules\) were taken for its blocks, but run one by one they change the logits"),
        ("changed", "run one by one they change the logits"),
    ],
)
def test_what_is_no_chain_is_refused(kind, reason):
    model = Toy(kind)
    with pytest.raises(ValueError, match=rf"'toy' is not in ARCHITECTURES, and could not be .*: .*{reason}.*Add an entry"):
        found_in(model)
    assert not any(part._forward_hooks for part in model.modules())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("plain", "is not called"),
        ("twice", "is called 2 times"),
        ("flipped", "does not read the images in the order of the batch"),
        ("pooled", "reads one token of an image"),
        ("constant", "does not read images"),
    ],
)
def test_linears_that_cannot_be_pruned_stay_dense(kind, reason):
    found = found_in(Toy(kind))
    assert found.left_dense == {"gate": reason, "few": "has 4 inputs only"}
    assert found.architecture.linears == ("up", "down") and found.architecture.blocks == "blocks"


def test_a_resnet_of_overlapping_convolutions_is_refused():
    module = ImageClassifier("resnet18", model_args={"num_classes": 7})
    module.arm(print)
    with pytest.raises(ValueError, match=r"'ResNet' is not in ARCHITECTURES, and could not be discovered"):
        module.configure_model()


def test_a_model_of_transformers_is_discovered_in_its_wrapper():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    config = transformers.Dinov2Config(**sizes, mlp_ratio=2, num_labels=7)
    model = transformers.Dinov2ForImageClassification(config).eval()
    with torch.no_grad():
        found = discover_vision(model, lambda images: model(images).logits, torch.randn(2, 3, 16, 16), "dinov2").architecture
    assert found.blocks == "dinov2.encoder.layer" and {"mlp.fc1", "mlp.fc2"} <= set(found.linears)

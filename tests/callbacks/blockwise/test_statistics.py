"""Weights of class tokens, against naive float64 sums over samples in which these tokens are repeated."""

import json

import pytest
import torch

from callbacks import BlockwisePruning
from callbacks.blockwise.statistics import StatisticsCollector
from datamodules import ImageDataModule
from functional.pruning import InputStatistics, OutputStatistics, Perturbation, prune_linears
from lightning_modules import ImageClassifier
from lightning_modules.parts.architectures import PrunableLinear
from tests.helpers.tiny import quiet

SAMPLES, TOKENS, INPUTS, OUTPUTS = 5, 7, 8, 6
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 10}


def repeated(x, number, times, others):
    """Samples whose first `number` tokens come `times` times, and the rest `others` times, float64."""
    parts = (x[:, :number].repeat_interleave(times, 1), x[:, number:].repeat_interleave(others, 1))
    return torch.cat(parts, 1).double()


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(INPUTS, INPUTS, generator=generator)
    x, lack, written = (torch.randn(SAMPLES, TOKENS, n, generator=generator) for n in (INPUTS, INPUTS, OUTPUTS))
    return [value.to(dtype) for value in (x @ mix, 0.1 * lack, 0.1 * written)]


def collected(x, lacks, class_tokens, weight):
    """A collector of two linears: `a` lacks inputs, `b` outputs; the latter reads a flat copy, as OPT's MLP does."""
    torch.manual_seed(1)
    modules = {name: torch.nn.Linear(INPUTS, OUTPUTS).to(x.dtype) for name in "ab"}
    linears = {name: PrunableLinear(module) for name, module in modules.items()}
    collector = StatisticsCollector(linears, "auto", True, {"a": 0, "b": OUTPUTS}, class_tokens, weight)
    with torch.no_grad():
        for chosen in (slice(0, 2), slice(2, None)):
            part, missing = x[chosen], {name: lack[chosen] for name, lack in lacks.items()}
            with collector.collecting(torch.arange(SAMPLES)[chosen], lambda name, *_, missing=missing: missing[name]):
                modules["a"](part)
                modules["b"](part.flatten(0, 1))
    return collector, modules


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("number", "times", "others"), [(1, 16, 1), (2, 4, 1), (2, 5, 2), (1, 1, 3), (0, 16, 1)])
def test_sums_are_those_of_repeated_class_tokens(number, times, others, dtype):
    x, *missing = problem(dtype)
    lacks = dict(zip("ab", missing, strict=True))
    given = [value.clone() for value in (x, *missing)]
    collector, modules = collected(x, lacks, number, times / others)
    assert all(torch.equal(value, before) for value, before in zip((x, *missing), given, strict=True))  # not in place
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 2e-3, "atol": 1e-4 if dtype == torch.float32 else 2e-2}
    positions = torch.arange(1, SAMPLES + 1).double()[:, None]
    for name in "ab":
        inputs, outputs, perturbation = collector.inputs(name), collector.outputs[name], collector.perturbations[name]
        again = repeated(x, number, times, others)
        tokens, norms = again.flatten(0, 1), again.norm(dim=1) / others**0.5
        expected = {
            "gram": sum(torch.outer(token, token) for token in tokens) / others,
            "square_norm": norms.square().sum(0),
            "weighted_norm": (positions * norms).sum(0),
            "root_weighted_norm": ((2 * positions).sqrt() * norms).sum(0),
        }
        for sums, value in expected.items():
            torch.testing.assert_close(getattr(inputs, sums).double(), value, **tolerance)
        with torch.no_grad():
            y = repeated(modules[name](x), number, times, others)
        torch.testing.assert_close(outputs.square_norm.double(), y.square().sum((0, 1)) / others, **tolerance)
        lack = repeated(lacks[name], number, times, others).flatten(0, 1)
        cross = sum(torch.outer(left, right) for left, right in zip(lack, tokens, strict=True)) / others
        torch.testing.assert_close(perturbation.mean().double(), 2 / SAMPLES * cross, **tolerance)
        assert inputs.tokens_per_sample() == TOKENS and inputs.num_samples == SAMPLES  # whatever the weight
        inputs.check_whole()


@pytest.mark.parametrize("settings", [{"lambda1": 30.0, "solver": "joint"}, {"lambda1": 1.0, "lambda2": 0.5}], ids=str)
def test_weights_of_a_linear_are_those_of_repeated_class_tokens(settings):
    """With the scale of the tokens themselves: the terms of a score keep their relation."""
    x, *missing = problem()
    collector, modules = collected(x, dict(zip("ab", missing, strict=True)), 1, 16.0)
    weight = modules["a"].weight.detach()
    again = repeated(x, 1, 16, 1).float()
    inputs = InputStatistics(INPUTS).update(again, 0)
    outputs = OutputStatistics(OUTPUTS).update(modules["a"](again), 0)
    perturbation = Perturbation(INPUTS).update(again, repeated(missing[0], 1, 16, 1).float())
    common = {"sparsity": 0.5, "dense_share": 0.2, **settings}
    (expected,) = prune_linears([weight], inputs, [outputs], scale=TOKENS, perturbation=perturbation, **common)
    given = collector.inputs("a"), [collector.outputs["a"]]
    (found,) = prune_linears([weight], *given, perturbation=collector.perturbations["a"], **common)
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
    assert (found.error, found.norm) == pytest.approx((expected.error, expected.norm), rel=1e-4)


def test_a_bad_class_token_is_found_by_name():
    x, *missing = problem()
    x[3, 0, 2] = torch.nan
    collector, _ = collected(x, dict(zip("ab", missing, strict=True)), 1, 16.0)
    with pytest.raises(ValueError, match=r"^block\.a: Argument `inputs` holds NaN or Inf, first in calibration batch 1 "):
        collector.check("block")


def prune(folder, model_args, **settings):
    torch.manual_seed(3)
    module = ImageClassifier("deit_tiny_distilled_patch16_224", model_args=VIT | model_args)
    module.configure_model()
    dense = {name: linear.weight.clone() for name, linear in module.linears(module.model.blocks[0]).items()}
    data = ImageDataModule("digits", num_calibration=24, num_heldout=8, batch_size=7, crop_pct=1.0)
    callback = BlockwisePruning(method="sparsegpt", sparsity=0.5, output_dir=str(folder), **settings)
    quiet(folder, callback, max_epochs=None).fit(module, data)
    return module, dense, data


def test_a_run_weights_class_and_distillation_tokens(tmp_path):
    module, dense, data = prune(tmp_path, {}, class_token_weight=9.0)
    data.begin_calibration(None)
    images = torch.cat([batch["image"] for batch in data.train_dataloader()])
    with torch.no_grad():
        x = module.model.blocks[0].norm1(module.model._pos_embed(module.model.patch_embed(images)))
    inputs = InputStatistics(32).update(repeated(x, 2, 9, 1).float(), 0)
    q, *_ = prune_linears([dense[f"attn.qkv.{role}"] for role in "qkv"], inputs, [None] * 3, method="sparsegpt")
    torch.testing.assert_close(module.model.blocks[0].attn.qkv.weight[:32], q.weight, rtol=1e-3, atol=1e-4)
    report = json.loads((tmp_path / "pruning.json").read_text())
    assert report["settings"]["class_token_weight"] == 9.0


def test_models_without_class_tokens_are_refused_before_any_weight_moves(tmp_path):
    without = {"class_token": False, "global_pool": "avg"}
    torch.manual_seed(3)
    module = ImageClassifier("vit_tiny_patch16_224", model_args=VIT | without)
    module.configure_model()
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    data = ImageDataModule("digits", num_calibration=8, num_heldout=8, batch_size=8, crop_pct=1.0)
    callback = BlockwisePruning(sparsity=0.5, class_token_weight=16.0, output_dir=str(tmp_path / "pruned"))
    message = (
        "`class_token_weight` = 16 needs a model with class tokens, but VisionTransformer has none. Leave it out, or set it"
    )
    with pytest.raises(ValueError, match=message):
        quiet(tmp_path, callback, max_epochs=None).fit(module, data)
    assert all(torch.equal(value, before[name]) for name, value in module.model.state_dict().items())
    assert not (tmp_path / "pruned").exists()

"""Golden results: every shipped config, run by train.py on tiny models, gives the masks, weights and metrics on file.

A change of structure must leave these files alone. A change of numbers that is meant is recorded by

    python -m tests.test_golden          rewrites tests/golden/*, to be committed with the reason

Masks are stored bit by bit and weights as a few projections of each linear, so that another CPU's rounding passes (`AGREEMENT`,
`TOLERANCE`) and another formula does not. All starting weights are drawn here, not by a library's initialisation.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.helpers.tiny import VOCABULARY, make_tokenizer, tiny_config

ROOT = Path(__file__).parents[1]
MASKS, NUMBERS = ROOT / "tests/golden/masks.safetensors", ROOT / "tests/golden/numbers.json"
AGREEMENT = 0.999
"""Share of mask entries that must be as on file."""
TOLERANCE = 2e-3
"""Relative, of metrics and of projections of weights."""

PRUNE = "--trainer.callbacks."
TEXT = {"data.seq_len": 24, "data.num_calibration": 12, "data.num_heldout": 4, "data.batch_size": 3, "model.dtype": "float32"}
MORE_WINDOWS = {"data.num_calibration": 24}
"""With 12 windows a CPU's rounding decides between two weights of the second block, and the masks after it follow."""
VIT = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
IMAGES = {
    "model.model_name_or_path": "deit_tiny_patch16_224", "model.pretrained": "false", "model.model_args": json.dumps(VIT),
    "model.checkpoint": "vit.safetensors", "data.root": "digits", "data.classes": "null", "data.crop_pct": 1.0,
    "data.num_calibration": 24, "data.num_heldout": 40, "data.batch_size": 12, "data.num_workers": 0,
}  # fmt: skip
GRAPH = {
    "data.source": "karate", "data.split": "random", "data.labels_per_class": 2, "data.val_per_class": "null",
    "data.num_val": 8, "data.num_test": -1,
    "model.view": "SvdView", "model.view.rank": 6, "model.pseudo_labels": "PredictedLabels",
    "model.pseudo_labels.warmup_epochs": 4, "trainer.max_epochs": 8,
}  # fmt: skip
JOINT = {"model.view.base": "joint", "model.view.mix": 1.0}
"""In place of nearest neighbours, which this graph without features does not have."""
UNFILTERED = {"data.drop_dissimilar": "null"}
"""Its nodes have no words in common."""
FAMILY = {"opt-125m": "opt", "qwen3-8b": "qwen3", "qwen3-14b": "qwen3"}
"""Config -> family of the tiny model; llama for all others."""

DIVERGENCE = json.dumps(
    {
        "class_path": "AttentionRule",
        "init_args": {"candidates": "all", "objective": "divergence", "reference": "block", "rho": 2.0, "windows": 2},
    }
)
VARIANTS: dict[str, list[str]] = {
    "magnitude": ["method", "magnitude"],
    "wanda": ["method", "wanda"],
    "sparsegpt": ["method", "sparsegpt", "solver", "ObsSolver", "solver.damping", "0.1"],
    "d2_wanda": ["method", "d2_wanda", "score.lambda2", "0.5", "score.activation_norm", "official"],
    "k held": ["update_rule", "FixedRule", "update_rule.held", "k", "score", "{activation_norm: official, lambda1: 0.5}"],
    "all held": ["update_rule", "{class_path: FixedRule, init_args: {held: all}}"],
    "outlier": ["update_rule", "outlier", "solver", "{class_path: ObsSolver, init_args: {block_size: 16}}"],
    "perplexity": ["update_rule", "perplexity"],
    "divergence": ["update_rule", DIVERGENCE],
    "owl": ["allocation", "OwlAllocation", "allocation.spread", "0.05", "allocation.threshold", "3.0"],
    "error and admm": ["sparsity", "0.7", "allocation", "error", "solver", "admm"],
    "ignored": ["ignore", "['*.down_proj']", "solver", "admm"],
}
"""Name -> settings of the callback of configs/published.yaml, beside those that it has."""


def _arguments() -> dict[str, list[str]]:
    """Case -> command line; relative paths are those that `_prepare` writes."""
    cases = {}
    for config in [
        ROOT / "configs/quickstart.yaml",
        ROOT / "configs/published.yaml",
        ROOT / "configs/best.yaml",
        *(ROOT / "configs/d2prune").glob("*"),
    ]:
        options = TEXT | {"model.model_name_or_path": FAMILY.get(config.stem, "llama"), "data.source": "words.jsonl"}
        options |= MORE_WINDOWS if config.stem == "quickstart" else {}
        cases[f"{config.relative_to(ROOT / 'configs')}"] = _command(config, options)
    published = cases["published.yaml"]
    for name, settings in VARIANTS.items():
        options = [part for key, value in zip(settings[::2], settings[1::2], strict=True) for part in (PRUNE + key, value)]
        cases[f"published.yaml, {name}"] = [*published, *options]
    cases["published.yaml, 2:4"] = [*published, PRUNE + "sparsity", "null", PRUNE + "pattern", "2:4"]
    for config in (ROOT / "configs/deit").glob("[ip]*.yaml"):
        cases[f"{config.relative_to(ROOT / 'configs')}"] = _command(config, IMAGES)
    for config in (ROOT / "configs/csg2l").glob("*.yaml"):
        options = GRAPH | JOINT | UNFILTERED if config.stem == "poisoned" else GRAPH
        cases[f"{config.relative_to(ROOT / 'configs')}"] = _command(config, options)
    for name in ("smollm2_full", "smollm2_lora"):
        options = TEXT | {"model.model_name_or_path": "sparse", "data.source": "words.jsonl"}
        cases[f"recover/{name}.yaml"] = _command(ROOT / f"configs/recover/{name}.yaml", options)
    return dict(
        sorted({_settings_of(command): (name, command) for name, command in sorted(cases.items(), reverse=True)}.values())
    )


def _settings_of(command: list[str]) -> str:
    """All that a tiny run depends on: configs that differ in model size or name only are one case."""
    content = yaml.safe_load(Path(command[2]).read_text())
    kept = content["model"]["class_path"], content["trainer"]["callbacks"], content["data"]["init_args"].get("sampling")
    model = content["model"]["init_args"] if "CSG2L" in kept[0] else content["model"]["init_args"].get("learning_rate")
    return json.dumps([kept, model, command[3:]])


def _command(config: Path, options: dict[str, object]) -> list[str]:
    quiet = {"trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false", "trainer.logger": "false"}
    parts = [part for key, value in (options | quiet).items() for part in (f"--{key}", str(value))]
    return ["fit", "--config", str(config), *parts]


CASES = _arguments()


def _prepare(folder: Path) -> None:
    """Write tiny models, an image classifier's weights and a text, all of seeded draws."""
    import timm
    import transformers

    for family in sorted({"llama", *FAMILY.values()}):
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(family))
        _draw(model, seed=1)
        model.save_pretrained(folder / family)
        make_tokenizer(family).save_pretrained(folder / family)
    vit = timm.create_model("deit_tiny_patch16_224", **VIT)
    _draw(vit, seed=2)
    save_file(vit.state_dict(), folder / "vit.safetensors")
    sparse = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama")
    for name, parameter in sparse.named_parameters():
        if "proj" in name:
            parameter.data[:, ::2] = 0
    sparse.save_pretrained(folder / "sparse")
    make_tokenizer("llama").save_pretrained(folder / "sparse")
    steps = np.random.RandomState(3).randint(1, 5, 4000).cumsum() % (VOCABULARY - 2) + 2
    rows = [json.dumps({"text": " ".join(f"w{i}" for i in document)}) for document in steps.reshape(40, 100)]
    (folder / "words.jsonl").write_text("\n".join(rows))


@torch.no_grad()
def _draw(model: torch.nn.Module, seed: int) -> None:
    """Matrices of seeded normal numbers, large enough that attention and MLP matter; norms 1, biases small."""
    generator = np.random.RandomState(seed)
    for name, parameter in sorted(model.named_parameters()):
        drawn = torch.from_numpy(generator.standard_normal(parameter.shape)).to(parameter)
        if parameter.ndim == 1:
            drawn = 0.05 * drawn + float("norm" in name and name.endswith("weight"))
        elif parameter.ndim == 2:
            drawn *= 0.16
        else:
            drawn *= 0.1
        parameter.copy_(drawn)


def _run(case: str, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float]]]:
    """Weights of the pruned linears by full name, and metrics, of one command."""
    from callbacks import BlockwisePruning
    from train import main

    before = os.getcwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["train.py"]
    try:
        cli = main(CASES[case])
    finally:
        os.chdir(before[0])
        sys.argv = before[1]
    module, callback = cli.model, next((c for c in cli.trainer.callbacks if isinstance(c, BlockwisePruning)), None)
    if callback is None:
        found = cli.trainer.callback_metrics.items()
        metrics = {name: float(value) for name, value in found if not name.endswith(("accuracy", "selection"))}
        return {}, {"trained": metrics}
    weights = {
        f"{block}.{name}": linear.weight.detach().clone()
        for block, found in module.blocks.items()
        for name, linear in module.linears(found).items()
    }
    return weights, callback.metrics


def _bits(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    mask = torch.cat([torch.empty(0, dtype=torch.bool), *((weight != 0).flatten() for weight in weights.values())])
    return torch.from_numpy(np.packbits(mask.numpy()))


def _projections(weights: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Σ|w|, and products with two seeded vectors, of each linear."""
    found = {}
    for name, weight in weights.items():
        flat = weight.double().flatten().numpy()
        vectors = np.random.RandomState(len(flat)).standard_normal((2, len(flat)))
        found[name] = [float(f"{value:.6g}") for value in (np.abs(flat).sum(), *(vectors @ flat))]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("golden")
    _prepare(made)
    return made


@pytest.mark.parametrize("case", CASES)
def test_as_on_file(case, folder):
    weights, metrics = _run(case, folder)
    expected = json.loads(NUMBERS.read_text())[case]
    bits = load_file(MASKS)[case]
    differing = int(np.unpackbits((bits ^ _bits(weights)).numpy()).sum())
    assert differing <= (1 - AGREEMENT) * 8 * len(bits), f"{differing} of {8 * len(bits)} mask entries differ"
    assert metrics.keys() == expected["metrics"].keys()
    for state, values in expected["metrics"].items():
        assert metrics[state] == pytest.approx(values, rel=TOLERANCE), state
    for name, values in _projections(weights).items():
        scale = expected["weights"][name][0]
        assert values[0] == pytest.approx(scale, rel=TOLERANCE), name
        assert values[1:] == pytest.approx(expected["weights"][name][1:], abs=TOLERANCE * scale), name


def test_every_case_is_on_file():
    assert set(json.loads(NUMBERS.read_text())) == set(load_file(MASKS)) == set(CASES)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        _prepare(Path(scratch))
        masks, numbers = {}, {}
        for case in CASES:
            weights, metrics = _run(case, Path(scratch))
            masks[case] = _bits(weights)
            numbers[case] = {"metrics": metrics, "weights": _projections(weights)}
        save_file(masks, MASKS)
        NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")

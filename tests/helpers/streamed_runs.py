"""Pruning runs of models whose blocks stay in their files, beside runs of the same models in memory."""

from dataclasses import replace
from pathlib import Path

import torch
import transformers
from safetensors.torch import load, load_file
from torch import Tensor

from callbacks import AttentionRule, Diagnostics, FixedRule
from lightning_modules.parts.shards import find_shards
from tests.helpers.launchers import PruningRun, go, tiny

SETTINGS = {
    "attention": {},
    "outlier": {"update_rule": "outlier"},
    "fixed": {"update_rule": FixedRule("v"), "resume": True},
    "block": {"update_rule": AttentionRule(reference="block", objective="divergence")},
    "wanda": {"method": "wanda", "ignore": ["*.1.*"], "diagnostics": Diagnostics(attention=True)},
    "joint": {"method": "d2_sparsegpt", "solver": "joint", "resume": True},
    "owl": {"method": "sparsegpt", "allocation": "owl"},
    "error": {"method": "sparsegpt", "allocation": "error"},
    "depth": {"method": "sparsegpt", "allocation": "depth"},
    "pattern": {"method": "sparsegpt", "sparsity": None, "pattern": "2:4"},
}
"""Name -> arguments of BlockwisePruning, beside its sparsity."""


def tensors_of(directory) -> dict[str, Tensor]:
    """All tensors of a directory."""
    return {name: tensor for path in find_shards(Path(directory)) for name, tensor in load_file(path).items()}


def assert_same(found, expected) -> None:
    """The same names, and the same bits."""
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def run_of(folder: Path) -> PruningRun:
    """A streamed run of a tiny model in files of 12 KB, which split blocks."""
    model, text = tiny(folder)
    whole = transformers.AutoModelForCausalLM.from_pretrained(model)
    (Path(model) / "model.safetensors").unlink()
    whole.save_pretrained(model, max_shard_size="12KB")
    return PruningRun(model, text, str(folder / "whole"), stream=True)


class WholeRuns:
    """Runs of the same model in memory, in one process, that nothing happens to; each is done once."""

    def __init__(self, streamed: PruningRun) -> None:
        self._streamed = streamed
        self._found: dict[str, dict[str, Tensor]] = {}

    def __call__(self, settings, data=()) -> dict[str, Tensor]:
        """Tensors of the result."""
        key = str((settings, data))
        if key not in self._found:
            output = f"{self._streamed.output}-{len(self._found)}"
            run = replace(self._streamed, stream=False, output=output, settings=settings, data=dict(data))
            assert go(run) == [0]
            self._found[key] = load(run.weights)
        return self._found[key]

"""NaN, Inf and numbers too large in a pruning run: found before a weight of that block moves, with block, linear and batch."""

import math

import pytest
import torch

from callbacks import BlockwisePruning
from callbacks.blockwise.settings import PruningSettings
from callbacks.blockwise.solve import solve
from callbacks.blockwise.statistics import StatisticsCollector
from lightning_modules import CausalLM
from lightning_modules.parts.architectures import PrunableLinear
from tests.callbacks.test_blockwise_pruning import fit

BLOCK = "model.layers.1"


def loaded(directory):
    module = CausalLM(directory)
    module.configure_model()
    return module


def weights_of(module):
    return {name: value.clone() for name, value in module.model.state_dict().items()}


def corrupt_when(module, name, wanted, value, outputs=False):
    """Let a linear of `BLOCK` read, or write, a bad number in its n-th call while statistics are collected."""
    linear = module.blocks[BLOCK].get_submodule(name)
    calls = iter(range(1000))

    def before(_, args):
        if module.calibration_step is None or linear not in hooked():
            return None
        x = args[0].clone()
        if not outputs and next(calls) == wanted:
            x.view(-1)[3] = value
        return (x, *args[1:])

    def after(_, args, output):
        if outputs and linear in hooked() and next(calls) == wanted:
            output = output.clone()
            output.view(-1)[3] = value
        return output

    def hooked():
        return [linear] if len(linear._forward_hooks) > 1 else []  # a second one is the collector's

    linear.register_forward_pre_hook(before)
    linear.register_forward_hook(after)


@pytest.mark.parametrize(
    ("name", "outputs", "message"),
    [
        ("mlp.down_proj", False, "mlp.down_proj: Argument `inputs` holds NaN or Inf, first in"),
        ("self_attn.v_proj", True, "self_attn.v_proj: Argument `outputs` holds NaN or Inf, first in"),
    ],
)
@pytest.mark.parametrize(("batch", "samples", "value"), [(0, "samples 0 to 2", math.nan), (2, "samples 6 to 7", -math.inf)])
def test_the_first_bad_batch_is_named(batch, samples, name, outputs, message, value, tiny_model, text_file, tmp_path):
    module = loaded(tiny_model("llama"))
    before = weights_of(module)
    corrupt_when(module, name, batch, value, outputs)
    with pytest.raises(ValueError, match=rf"^{BLOCK}\.{message} calibration batch {batch} \({samples}, .*Look at"):
        fit(tiny_model("llama"), text_file, tmp_path, BlockwisePruning(method="wanda", sparsity=0.5), module=module)
    moved = {name for name, weight in module.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved and all(name.startswith("model.layers.0.") for name in moved)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("rule", ["attention", "outlier", "fixed"])
def test_a_bad_weight(rule, tiny_model, text_file, tmp_path):
    module = loaded(tiny_model("qwen3"))
    with torch.no_grad():
        module.blocks[BLOCK].get_submodule("mlp.up_proj").weight[0, 0] = math.nan
    before = weights_of(module)
    message = rf"^{BLOCK}\.mlp\.up_proj: Argument `weight` holds NaN or Inf\. .*calibration batch 0 \(samples 0 to 2"
    with pytest.raises(ValueError, match=message):
        fit(tiny_model("qwen3"), text_file, tmp_path, BlockwisePruning(sparsity=0.5, update_rule=rule), module=module)
    for name, weight in module.model.state_dict().items():
        if not name.startswith("model.layers.0."):
            torch.testing.assert_close(weight, before[name], equal_nan=True, rtol=0, atol=0)


def test_inputs_whose_squares_overflow(tiny_model, text_file, tmp_path):
    module = loaded(tiny_model("llama"))
    corrupt_when(module, "mlp.down_proj", 1, 1e20)
    message = rf"^{BLOCK}\.mlp\.down_proj: Argument `inputs` reaches 1e\+20 in magnitude in calibration batch 1 \(samples 3 "
    with pytest.raises(ValueError, match=message):
        fit(tiny_model("llama"), text_file, tmp_path, BlockwisePruning(sparsity=0.5), module=module)


def collected(batches, weight=None):
    """A collector of two linears that read the same tensor, the batches of one sample each at positions 5, 6, ..."""
    modules = {name: torch.nn.Linear(4, 3, bias=False) for name in "ab"}
    collector = StatisticsCollector({name: PrunableLinear(module) for name, module in modules.items()})
    with torch.no_grad():
        for position, x in enumerate(batches, start=5):
            with collector.collecting(torch.tensor([position])):
                for module in modules.values():
                    module(x)
    return collector


def test_the_check_is_made_by_every_first_solve_and_again_after_more_batches():
    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    settings = PruningSettings.of(method="wanda", sparsity=0.5)
    collector = collected([x, x])
    assert solve(settings, collector, "block", ["b"], "wanda")["b"].weight.isfinite().all()
    collector = collected([x, x, x * math.nan, x * math.inf])
    for name in "ab":  # whichever is asked for: nothing of the block may move
        with pytest.raises(ValueError, match=r"^block\.a: Argument `inputs` .* batch 2 \(sample 7, all counted from 0\)"):
            solve(settings, collector, "block", [name], "wanda")


def test_a_linear_that_was_never_called_is_an_error():
    with pytest.raises(RuntimeError, match="'a' was never called"):
        collected([]).check("block")


def test_collecting_waits_for_nothing(monkeypatch):
    """No batch may look at a number: on a GPU it would wait for all work before."""
    for name in ("item", "tolist", "__bool__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"Tensor.{name} was called"))
    positions = torch.tensor([0])
    monkeypatch.setattr("functional.pruning.statistics.positions_of", lambda *_: positions.float() + 1)
    linear = torch.nn.Linear(4, 3)
    collector = StatisticsCollector({"a": PrunableLinear(linear)})
    with torch.no_grad(), collector.collecting(positions):
        linear(torch.ones(1, 2, 4))

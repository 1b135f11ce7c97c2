"""Which of the linears that share their input are merged when they are compressed, and that `predict` does it."""

import gc
import weakref

import pytest
import torch
import transformers
from torch import nn

from datamodules import TextDataModule
from functional.pruning.masks import Pattern, keep_largest_of_groups
from lightning_modules import CausalLM
from lightning_modules.parts import compressed_linears, fastest_form
from lightning_modules.parts.compressed_linears import compress_linears
from lightning_modules.parts.csr_linear import CsrLinear
from lightning_modules.parts.lane_linear import LaneLinear
from lightning_modules.parts.linear24 import Linear24
from lightning_modules.parts.merged_linears import MergedPart
from lightning_modules.parts.sparse_linear import SparseLinear
from tests.helpers.marks import needs_mkl
from tests.helpers.tiny import make_model, make_tokenizer, quiet


class Attention(nn.Module):
    """q of 2:4, k of 70 % zeros in no pattern, v of 2:4, o dense; all read the same tensor."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        for name in "qkvo":
            linear = nn.Linear(64, 48, bias=name != "v", dtype=dtype).requires_grad_(False)
            if name in "qv":
                linear.weight.mul_(keep_largest_of_groups(linear.weight.abs(), Pattern(2, 4)))
            elif name == "k":
                linear.weight.masked_fill_(torch.rand(48, 64) < 0.7, 0)
            setattr(self, name, linear)

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x), self.v(x), self.o(x)], -1)


def merged_of(dtype, *arguments, **options):
    block = Attention(dtype)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = block(x)
    found = compress_linears([block], *arguments, run_model=lambda: block(x), **options)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(block(x), expected, rtol=tolerance, atol=tolerance)
    return block, found


def test_those_that_stay_dense_do_not_drag_others():
    block, found = merged_of(torch.float32, "2:4")
    assert found.forms == {"2:4": 2} and (found.total, found.merged) == (4, 2)
    assert block.q.merged is block.v.merged and isinstance(block.q.merged.linear, Linear24)
    assert type(block.k) is type(block.o) is nn.Linear  # dense ones are not merged on a CPU
    weights = 48 * 64 * 4
    assert found.before == 4 * weights + 3 * 48 * 4 and found.after == 2 * weights + 2 * weights * 17 // 32 + 4 * 48 * 4


def test_those_that_stay_dense_are_merged_on_a_gpu(monkeypatch):
    monkeypatch.setattr(compressed_linears, "on_gpu", lambda x: True)
    block, found = merged_of(torch.float32, "2:4")
    assert found.forms == {"2:4": 2} and found.merged == 4 and found.replaced == 2
    assert block.k.merged is block.o.merged and type(block.k.merged.linear) is nn.Linear
    assert block.k.merged is not block.q.merged


def test_unstructured_ones_are_merged_whatever_their_pattern():
    block, found = merged_of(torch.bfloat16, "unstructured")
    assert found.forms == {"unstructured": 3} and found.merged == 3 and type(block.o) is nn.Linear
    assert block.q.merged is block.k.merged is block.v.merged and isinstance(block.k.merged.linear, SparseLinear)
    block, found = merged_of(torch.bfloat16, "unstructured", timed=("2:4", "lanes"))
    assert found.forms == {"lanes": 3} and isinstance(block.k.merged.linear, LaneLinear)


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """Says how long forms take from now on; the list has forms and rows of every call."""
    calls = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def set_times(times):
        def measure(modules, tokens):
            calls.append([*modules, modules["dense"].out_features])
            return {name: times[name] for name in modules}

        monkeypatch.setattr(fastest_form, "measure_forms", measure)
        return calls

    return set_times


def test_auto_times_the_merged_shape(timed):
    calls = timed({"dense": 10.0, "2:4": 5.0, "lanes": 6.0})
    block, found = merged_of(torch.bfloat16, "auto", timed=("2:4", "lanes"))
    assert calls == [["dense", "2:4", "lanes", 96], ["dense", "lanes", 48]]
    assert found.forms == {"2:4": 2, "lanes": 1} and found.merged == 2 and isinstance(block.k, LaneLinear)


@needs_mkl
def test_auto_on_a_cpu_leaves_linears_as_they_are_where_dense_is_faster(timed):
    timed({"dense": 10.0, "csr": 20.0})
    block, found = merged_of(torch.float32, "auto")
    assert not found.merged and found.after == found.before and all(type(getattr(block, n)) is nn.Linear for n in "qkvo")
    timed({"dense": 10.0, "csr": 5.0})
    block, found = merged_of(torch.float32, "auto", tokens=2)
    assert found.forms == {"csr": 3} and found.merged == 3 and isinstance(block.q.merged.linear, CsrLinear)


def test_the_dense_weights_are_freed(monkeypatch):
    block = Attention(torch.float32)
    references = [weakref.ref(getattr(block, name)) for name in "qv"]
    alive = []
    original = Linear24.from_linear

    def from_linear(linear):
        gc.collect()
        alive.extend(reference() is not None for reference in references)
        return original(linear)

    monkeypatch.setattr(Linear24, "from_linear", from_linear)
    compress_linears([block], "2:4", run_model=lambda: block(torch.zeros(1, 64)))
    assert alive == [False, False]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A LLaMA that is 2:4."""
    path = str(tmp_path_factory.mktemp("merged"))
    model = make_model("llama").requires_grad_(False)
    for linear in [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]:
        linear.weight.mul_(keep_largest_of_groups(linear.weight.abs(), Pattern(2, 4)))
    model.save_pretrained(path)
    make_tokenizer("llama").save_pretrained(path)
    return path


@pytest.mark.parametrize(("stage", "merges"), [("validate", False), ("test", False), ("predict", True)])
def test_predict_merges(directory, stage, merges, text_file, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(compressed_linears, "rank_zero_info", messages.append)
    data = TextDataModule(directory, source=text_file, seq_len=16, num_calibration=1, num_heldout=2, batch_size=2)
    module = CausalLM(directory, compressed="2:4", max_new_tokens=3)
    getattr(quiet(tmp_path), stage)(module, data)
    assert any(isinstance(part, MergedPart) for part in module.model.modules()) == merges
    assert "21 of 21 linears were compressed (21 as 2:4)" in messages[0]
    assert ("15 that share their input" in messages[0]) == merges


def test_linears_are_found_on_the_host_whatever_attention_is_chosen(directory):
    """As flash_attention_2, which runs on a GPU only: the model is on the host when its linears are compressed."""

    def fails(*args, **kwargs):
        raise RuntimeError("for a GPU only")

    transformers.AttentionInterface.register("gpu_only", fails)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    model.set_attn_implementation("gpu_only")
    module = CausalLM(model, compressed="2:4")
    module.configure_model()
    assert isinstance(module.model.model.layers[0].self_attn.q_proj, MergedPart)
    assert module.model.config._attn_implementation == "gpu_only"
    with pytest.raises(RuntimeError, match="for a GPU only"):
        module.eval()(torch.arange(2)[None])


def test_continuations_equal_those_of_the_dense_model(directory, text_file, tmp_path):
    data = TextDataModule(directory, source=text_file, seq_len=16, num_calibration=1, num_heldout=3, batch_size=2)
    options = [{}, {"compressed": "2:4"}, {"compressed": "2:4", "static_cache": True}]
    dense, merged, static = (quiet(tmp_path).predict(CausalLM(directory, max_new_tokens=5, **given), data) for given in options)
    assert dense == merged == static

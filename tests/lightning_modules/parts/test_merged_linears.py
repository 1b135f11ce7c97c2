"""Linears that share their input are one product: which are found, and that nothing else changes."""

import copy
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
from lightning_modules.parts.discovery import chain_of
from lightning_modules.parts.lane_linear import LaneLinear
from lightning_modules.parts.linear24 import Linear24
from lightning_modules.parts.merged_linears import MergedLinears, MergedPart, concatenated, sharing_linears
from lightning_modules.parts.sparse_linear import SparseLinear
from tests.helpers.tiny import FAMILIES, FURTHER_FAMILIES, VOCABULARY, make_mixture, make_model, make_tokenizer, quiet

QKV, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
LLAMA = {tuple(f"self_attn.{name}" for name in QKV), tuple(f"mlp.{name}" for name in MLP)}
NONE_SHARE = ("bloom", "falcon", "gpt2", "gpt_neox", "mpt", "phi3")
"""Families whose q, k and v, and gate and up, are one linear to begin with."""
needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch multiplies sparse rows through MKL")


def tokens(seed=0, shape=(2, 7)):
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def blocks_of(model):
    return chain_of(model, "")[1]


def linears_of(model):
    return [module for block in blocks_of(model) for module in block.modules() if isinstance(module, nn.Linear)]


def runs(model):
    return lambda: model(input_ids=torch.arange(2)[None], use_cache=False)


def groups_of(model):
    """Paths of the groups of each block."""
    groups, found = sharing_linears(blocks_of(model), runs(model)), []
    for block in blocks_of(model):
        paths = {linear: path for path, linear in block.named_modules()}
        found.append({tuple(paths[linear] for linear in group) for group in groups if group[0] in paths})
    return found


@torch.no_grad()
def pruned_to_24(model):
    for linear in linears_of(model):
        linear.weight.mul_(keep_largest_of_groups(linear.weight.abs(), Pattern(2, 4)))
    return model.eval().requires_grad_(False)


@pytest.fixture
def pair():
    """A family -> the dense model, and the same one compressed and merged."""

    def make(family, dtype=torch.float64):
        dense = pruned_to_24(make_model(family)).to(dtype)
        merged = copy.deepcopy(dense)
        found = compress_linears(blocks_of(merged), "2:4", run_model=runs(merged))
        assert found.merged and found.forms == {"2:4": found.total}
        return dense, merged

    return make


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("llama", LLAMA),
        ("qwen2", LLAMA),
        ("qwen3", LLAMA),
        ("gemma", LLAMA),
        ("opt", {("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}),
        ("phi", {(*(f"self_attn.{name}" for name in QKV), "mlp.fc1")}),  # attention and MLP read the same norm
        ("gptj", {("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in")}),
    ],
)
def test_groups_of_a_family(family, groups):
    assert groups_of(make_model(family).eval()) == [groups] * 3


@pytest.mark.parametrize("family", NONE_SHARE)
def test_families_without_groups(family):
    assert groups_of(make_model(family).eval()) == [set()] * 3


def test_experts_and_their_router_are_left_alone():
    assert groups_of(make_mixture("mixtral")) == [{tuple(f"self_attn.{name}" for name in QKV)}] * 2


class Block(nn.Module):
    """Linears that are called in every way, with tensors that are and are not the same."""

    def __init__(self):
        super().__init__()
        names = ("first", "second", "twice", "never", "copied", "after", "also_after", "bfloat")
        self.parts = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})
        self.parts["bfloat"].bfloat16()

    def forward(self, x):
        call = dict(self.parts)
        y = call["first"](x) + call["second"](x) + call["twice"](x) + call["twice"](x) + call["copied"](x.clone())
        y = y + call["bfloat"](x).to(y.dtype)
        x.add_(1)  # the same tensor, but with other content
        return y + call["after"](x) + call["also_after"](x)


def test_only_linears_that_are_called_once_with_one_content_are_a_group():
    block = Block()
    groups = sharing_linears([block], lambda: block(torch.zeros(1, 8)))
    assert groups == [[block.parts[name] for name in names] for names in (("first", "second"), ("after", "also_after"))]
    assert not any("forward" in part.__dict__ for part in block.modules())


def test_blocks_do_not_share():
    blocks = [nn.Sequential(nn.Linear(8, 8)) for _ in range(2)]
    x = torch.zeros(1, 8)
    assert sharing_linears(blocks, lambda: [block(x) for block in blocks]) == []


def test_groups_are_found_in_inference_mode_and_no_weight_is_read():
    model = make_model("llama").eval()
    for linear in linears_of(model):
        linear.weight.data.fill_(torch.nan)
    logits = []
    with torch.inference_mode():
        groups = sharing_linears(blocks_of(model), lambda: logits.append(runs(model)().logits))
    assert len(groups) == 2 * 3 and not logits[0].isnan().any()


@pytest.mark.parametrize("biases", [(False, False, False), (True, True, True), (True, False, True)])
def test_concatenated(biases):
    torch.manual_seed(0)
    linears = [nn.Linear(6, rows, bias=bias) for rows, bias in zip((4, 2, 3), biases, strict=True)]
    whole, x = concatenated(linears), torch.randn(5, 6)
    assert (whole.in_features, whole.out_features, whole.bias is not None) == (6, 9, any(biases))
    torch.testing.assert_close(whole(x), torch.cat([linear(x) for linear in linears], -1))


@pytest.fixture
def members():
    """Three linears, and what they were merged into."""
    torch.manual_seed(0)
    linears = [nn.Linear(8, rows).double().requires_grad_(False) for rows in (4, 2, 3)]
    merged = MergedLinears(concatenated(linears), [4, 2, 3])
    return linears, [MergedPart(merged, index) for index in range(3)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (0, 0, 1), (1,), (1, 1), (0, 1, 2, 0, 1, 2), (0, 2, 0, 1, 1)])
def test_calls_in_any_order(members, order):
    linears, parts = members
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for index in order:
        torch.testing.assert_close(parts[index](x), linears[index](x))


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 0, 0), (2, 1, 2)])
def test_every_other_tensor_is_multiplied_anew(members, order):
    linears, parts = members
    for index in order:
        x = torch.randn(3, 8, dtype=torch.float64)
        torch.testing.assert_close(parts[index](x), linears[index](x))
        y = x.clone()
        torch.testing.assert_close(parts[index - 1](y.mul_(2)), linears[index - 1](y))


def test_one_product_for_all(members):
    _, parts = members
    calls = []
    parts[0].merged.linear.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 8, dtype=torch.float64)
    for count in (1, 2):
        for part in parts:
            part(x)
        assert len(calls) == count


def test_nothing_is_kept_once_all_have_their_part(members):
    _, parts = members
    x = torch.randn(3, 8, dtype=torch.float64)
    outputs = [part(x) for part in parts]
    assert parts[0].merged.given is None and parts[0].merged.outputs == ()
    references = [weakref.ref(tensor) for tensor in (x, *outputs)]
    del x, outputs
    gc.collect()
    assert [reference() for reference in references] == [None] * 4


@pytest.mark.parametrize("family", [family for family in (*FAMILIES, *FURTHER_FAMILIES) if family not in NONE_SHARE])
def test_logits_equal_those_of_the_model(pair, family):
    dense, merged = pair(family)
    with torch.inference_mode():
        for seed, shape in enumerate([(2, 7), (1, 1), (3, 1), (1, 9)]):
            ids = tokens(seed, shape)
            found, expected = (model(input_ids=ids, use_cache=False).logits for model in (merged, dense))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    kept = [module for module in merged.modules() if isinstance(module, MergedLinears)]
    assert kept and all(module.given is None and module.outputs == () for module in kept)


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
def test_the_same_text_with_and_without_static_cache(pair, family):
    dense, merged = pair(family)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = tokens()
    options["attention_mask"] = torch.ones_like(ids)
    expected = dense.generate(ids, **options)
    assert torch.equal(merged.generate(ids, **options), expected)
    assert torch.equal(merged.generate(ids, cache_implementation="static", **options), expected)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_compiled_model_is_one_graph(pair, family):
    dense, merged = pair(family)
    torch._dynamo.reset()
    compiled = torch.compile(merged.__call__, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        for seed in range(3):
            ids = tokens(seed)
            found, expected = compiled(input_ids=ids, use_cache=False).logits, dense(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert all(module.given is None for module in merged.modules() if isinstance(module, MergedLinears))


def test_a_graph_that_breaks_between_two_of_them(members):
    linears, parts = members
    torch._dynamo.reset()

    def between(x):
        x = x + 1
        first = parts[0](x)
        torch._dynamo.graph_break()
        return first, parts[1](x), parts[2](x)

    compiled = torch.compile(between, backend="aot_eager")
    for seed in range(2):
        x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(list(compiled(x)), [linear(x + 1) for linear in linears])
        assert parts[0].merged.given is None


def test_generate_compiles_a_step_as_one_graph(pair):
    dense, merged = pair("llama")
    torch._dynamo.reset()
    config = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True  # else transformers compiles on a GPU only
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = tokens()
    options["attention_mask"] = torch.ones_like(ids)
    found = merged.generate(ids, cache_implementation="static", compile_config=config, **options)
    assert torch.equal(found, dense.generate(ids, **options)) and merged._compiled_call is not None


def test_a_copy_has_its_own_weights(members):
    _, parts = members
    block = nn.ModuleList(parts)
    other = copy.deepcopy(block)
    assert other[0].merged is other[2].merged is not block[0].merged
    assert len([module for module in other.modules() if isinstance(module, MergedLinears)]) == 1
    assert "in_features=8, out_features=2, rows=4:6 of 9" in repr(block[1])


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
    pruned_to_24(make_model("llama")).save_pretrained(path)
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


def test_continuations_equal_those_of_the_dense_model(directory, text_file, tmp_path):
    data = TextDataModule(directory, source=text_file, seq_len=16, num_calibration=1, num_heldout=3, batch_size=2)
    options = [{}, {"compressed": "2:4"}, {"compressed": "2:4", "static_cache": True}]
    dense, merged, static = (quiet(tmp_path).predict(CausalLM(directory, max_new_tokens=5, **given), data) for given in options)
    assert dense == merged == static

"""Linears that share their input are one product: which are found, and that nothing else changes."""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from torch import nn

from functional.pruning.masks import Pattern, keep_largest_of_groups
from lightning_modules.parts import compressed_linears
from lightning_modules.parts.compressed_linears import compress_linears
from lightning_modules.parts.discovery import chain_of
from lightning_modules.parts.merged_linears import MergedLinears, MergedPart, concatenated, sharing_linears
from tests.helpers.tiny import FAMILIES, FURTHER_FAMILIES, VOCABULARY, make_mixture, make_model

QKV, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
LLAMA = {tuple(f"self_attn.{name}" for name in QKV), tuple(f"mlp.{name}" for name in MLP)}
NONE_SHARE = ("bloom", "falcon", "gpt2", "gpt_neox", "mpt", "phi3")
"""Families whose q, k and v, and gate and up, are one linear to begin with."""


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


class Router(nn.Linear):
    """As PhimoeTopKRouter: a linear that returns more than its product."""

    def forward(self, x):
        scores = super().forward(x)
        return scores, scores.argmax(-1)


class Doubled(nn.Linear):
    """A linear that multiplies otherwise."""

    def forward(self, x):
        return 2 * super().forward(x)


class Transposed(nn.Linear):
    """As FalconLinear: the same product, in other words."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Routed(nn.Module):
    """Linears of four classes that read the same tensor, 2:4 all of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.router, self.doubled, self.last = (kind(8, 8) for kind in (nn.Linear, Router, Doubled, Transposed))
        for linear in self.children():
            linear.requires_grad_(False).weight.mul_(keep_largest_of_groups(linear.weight.abs(), Pattern(2, 4)))

    def forward(self, x):
        scores, chosen = self.router(x)
        return self.first(x) + scores + chosen[:, None] + self.doubled(x) + self.last(x)


def test_subclasses_that_do_something_else_are_left_alone():
    block, x = Routed(), torch.randn(3, 8)
    expected = block(x)
    assert sharing_linears([block], lambda: block(x)) == [[block.first, block.last]]
    found = compress_linears([block], "2:4", run_model=lambda: block(x))
    assert (found.total, found.merged, type(block.router), type(block.doubled)) == (2, 2, Router, Doubled)
    torch.testing.assert_close(block(x), expected)


def test_adapters_beside_linears_that_are_merged(monkeypatch):
    """peft asks for the dtype of an adapter's weight. On a GPU adapters, which stay dense, are merged as well."""
    import peft

    monkeypatch.setattr(compressed_linears, "on_gpu", lambda x: True)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    dense = peft.get_peft_model(pruned_to_24(make_model("llama")), config).base_model.model.eval().requires_grad_(False)
    merged = copy.deepcopy(dense)
    found = compress_linears(blocks_of(merged), "2:4", run_model=runs(merged))
    parts = [part for path, part in merged.named_modules() if isinstance(part, MergedPart) and "lora_A" in path]
    assert len(parts) == 3 * 2 and found.forms == {"2:4": 3 * 7}  # q and v of three blocks
    adapters = blocks_of(dense)[0].self_attn
    for part, linear in zip(parts, (adapters.q_proj, adapters.v_proj), strict=False):
        assert torch.equal(part.weight, linear.lora_A["default"].weight)
    with torch.inference_mode():
        ids = tokens()
        torch.testing.assert_close(merged(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_is_compressed_shows_no_weight(members):
    _, parts = members
    parts[0].merged.linear = nn.Identity()
    assert not hasattr(parts[0], "weight")


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

"""Which linears of a model are compressed, and how: `compressed` of CausalLM."""

import pytest
import torch
import transformers
from torch import nn

from datamodules import TextDataModule
from functional.pruning.masks import Pattern, keep_largest_of_groups
from lightning_modules import CausalLM
from lightning_modules.parts import compressed_linears, fastest_form
from lightning_modules.parts.compressed_linears import compress_linears, compress_model
from lightning_modules.parts.csr_linear import CsrLinear
from lightning_modules.parts.lane_linear import LaneLinear
from lightning_modules.parts.linear24 import Linear24
from lightning_modules.parts.sparse_linear import SparseLinear
from lightning_modules.parts.split_linear import SplitLinear
from tests.helpers.marks import needs_mkl
from tests.helpers.tiny import make_tokenizer, quiet

CPU = torch.device("cpu")
SLOW, FAST = {"dense": 10.0, "csr": 20.0}, {"dense": 10.0, "csr": 5.0}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def timed(monkeypatch):
    """Says how long forms take from now on; the list has the forms of every call."""
    calls = []

    def set_times(times):
        monkeypatch.setattr(
            fastest_form,
            "measure_forms",
            lambda modules, tokens: calls.append([*modules, tokens]) or {n: times[n] for n in modules},
        )
        return calls

    return set_times


def block_of(dtype=torch.float32):
    """A dense linear, one of 2:4 and one with 70 % zeros in no pattern."""
    torch.manual_seed(0)
    block = nn.ModuleDict({name: nn.Linear(64, 48) for name in ("dense", "pattern", "anywhere")}).requires_grad_(False)
    block["pattern"].weight.mul_(keep_largest_of_groups(block["pattern"].weight.abs(), Pattern(2, 4)))
    block["anywhere"].weight.masked_fill_(torch.rand(48, 64) < 0.7, 0)
    return block.to(dtype)


def kinds(block):
    return [type(block[name]) for name in ("dense", "pattern", "anywhere")]


def test_24():
    block = block_of()
    assert compress_linears([block], "2:4").forms == {"2:4": 1} and kinds(block) == [nn.Linear, Linear24, nn.Linear]


def test_unstructured_in_16_bit():
    block = block_of(torch.bfloat16)
    found = compress_linears([block], "unstructured")
    assert found.forms == {"unstructured": 2} and kinds(block) == [nn.Linear, SparseLinear, SparseLinear]
    biases, weight = 3 * 48 * 2, 48 * 64 * 2
    kept = sum(block[name].values.nbytes for name in ("pattern", "anywhere"))
    assert (found.total, found.before) == (3, 3 * weight + biases)
    assert found.after == weight + biases + 2 * 48 * 64 // 8 + kept


@needs_mkl
def test_unstructured_on_a_cpu_takes_sparse_rows_where_they_are_fast(timed):
    calls, block = timed(FAST), block_of()
    assert compress_linears([block], "unstructured").forms == {"csr": 2}
    assert kinds(block) == [nn.Linear, CsrLinear, CsrLinear]
    assert calls == [["dense", "csr", 1]] * 2  # 50 % and 70 %


@needs_mkl
def test_unstructured_on_a_cpu_saves_memory_where_they_are_slow(timed):
    timed(SLOW)
    block = block_of()
    compress_linears([block], "unstructured")
    assert kinds(block) == [nn.Linear, SparseLinear, SparseLinear]


@needs_mkl
@pytest.mark.parametrize(("times", "form"), [(FAST, CsrLinear), (SLOW, nn.Linear)])
def test_auto_on_a_cpu(timed, times, form):
    timed(times)
    block = block_of()
    compress_linears([block], "auto")
    assert kinds(block) == [nn.Linear, form, form]


def test_auto_in_16_bit_on_a_cpu_leaves_all_dense(timed):
    calls, block = timed({}), block_of(torch.bfloat16)
    found = compress_linears([block], "auto")
    assert not found.replaced and found.after == found.before and not calls and kinds(block) == [nn.Linear] * 3


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"dense": 10.0, "2:4": 5.0, "2:4 and rest": 7.0, "lanes": 6.0}, [nn.Linear, Linear24, LaneLinear]),
        ({"dense": 10.0, "2:4": 8.0, "2:4 and rest": 7.0, "lanes": 6.0}, [nn.Linear, LaneLinear, LaneLinear]),
        ({"dense": 10.0, "2:4": 8.0, "2:4 and rest": 7.0, "lanes": 9.0}, [nn.Linear, Linear24, SplitLinear]),
        ({"dense": 10.0, "2:4": 8.0, "2:4 and rest": 10.0, "lanes": 12.0}, [nn.Linear, Linear24, nn.Linear]),
    ],
)
def test_auto_among_the_forms_of_a_gpu(timed, times, expected):
    calls, block = timed(times), block_of(torch.bfloat16)
    compress_linears([block], "auto", timed=("2:4", "2:4 and rest", "lanes"))
    assert kinds(block) == expected
    assert calls == [["dense", "2:4", "lanes", 1], ["dense", "2:4 and rest", "lanes", 1]]


def test_unstructured_on_a_gpu_takes_lanes_for_16_bit_and_a_bitmap_for_32():
    block = block_of(torch.bfloat16)
    assert compress_linears([block], "unstructured", timed=("2:4", "lanes")).forms == {"lanes": 2}
    assert kinds(block) == [nn.Linear, LaneLinear, LaneLinear]
    block = block_of()
    assert compress_linears([block], "unstructured", timed=("2:4", "lanes")).forms == {"unstructured": 2}


def test_a_form_that_only_auto_takes_is_left_out_if_its_kernels_do_not_run(monkeypatch):
    def fails(device):
        raise ValueError("Argument `compressed` = auto needs Triton")

    monkeypatch.setattr(compressed_linears, "try_split", fails)
    with pytest.warns(UserWarning, match="`compressed` = auto leaves 2:4 and rest out. .* needs Triton"):
        assert not compressed_linears._runs("2:4 and rest", "auto", CPU)
    assert compressed_linears._runs("2:4 and rest", "unstructured", CPU)


@pytest.mark.parametrize(("form", "kind", "check"), [("2:4", "2:4", "try_kernels"), ("lanes", "unstructured", "try_lanes")])
def test_kernels_that_do_not_run_are_left_out_of_auto_only(monkeypatch, form, kind, check):
    def fails(device):
        raise ValueError(f"Argument `compressed` = {kind} needs Triton")

    monkeypatch.setattr(compressed_linears, check, fails)
    with pytest.warns(UserWarning, match=f"`compressed` = auto leaves {kind} out. Argument `compressed` = {kind} needs Triton"):
        assert not compressed_linears._runs(form, "auto", CPU)
    with pytest.raises(ValueError, match="needs Triton"):
        compressed_linears._runs(form, kind, CPU)
    assert compressed_linears._runs(form, "none", CPU)


@pytest.fixture(scope="module")
def sparse_model(tiny_model, tmp_path_factory):
    """Directory of a LLaMA whose blocks are to 70 % zero."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    torch.manual_seed(0)
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.masked_fill_(torch.rand_like(module.weight) < 0.7, 0)
    directory = str(tmp_path_factory.mktemp("sparse"))
    model.save_pretrained(directory)
    make_tokenizer("llama").save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", ["unstructured", "auto"])
def test_logits_equal_those_of_the_dense_model(sparse_model, kind, timed, capsys):
    timed(FAST)
    ids = torch.randint(2, 12, (2, 14), generator=torch.Generator().manual_seed(0))
    dense, compressed = CausalLM(sparse_model), CausalLM(sparse_model, compressed=kind)
    for module in (dense, compressed):
        module.configure_model()
        module.eval()
    with torch.inference_mode():
        torch.testing.assert_close(compressed(ids), dense(ids), rtol=1e-4, atol=1e-4)


@needs_mkl
@pytest.mark.parametrize(("stage", "tokens"), [("validate", 128), ("test", 128), ("predict", 2)])
def test_forms_are_timed_with_the_tokens_of_the_stage(stage, tokens, sparse_model, text_file, timed, tmp_path):
    calls = timed(FAST)
    data = TextDataModule(sparse_model, source=text_file, seq_len=16, num_calibration=1, num_heldout=2, batch_size=2)
    getattr(quiet(tmp_path), stage)(CausalLM(sparse_model, compressed="auto", max_new_tokens=2), data)
    assert {call[-1] for call in calls} == {tokens} and all(call[:2] == ["dense", "csr"] for call in calls)


def test_what_has_too_few_zeros_is_refused_unless_auto_decides(tiny_model):
    directory = tiny_model("llama")
    with pytest.raises(
        ValueError, match=r"`compressed` = unstructured, but none of the 21 linears .* is zero to at least 30%. Give a"
    ):
        CausalLM(directory, compressed="unstructured").configure_model()
    module = CausalLM(directory, compressed="auto")
    module.configure_model()
    assert all(isinstance(linear, nn.Linear) for linear in module.model.modules() if "Linear" in type(linear).__name__)


def test_the_products_without_a_kernel_are_warned_of():
    with pytest.warns(UserWarning, match="no kernel multiplies them: .* or `compressed` = auto"):
        compress_model([block_of(torch.bfloat16)], "unstructured", "x", torch.bfloat16, CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_24_on_a_cpu_is_warned_of_in_every_dtype(dtype):
    with pytest.warns(UserWarning, match=f"{dtype} on cpu are compressed, but no kernel multiplies them"):
        compress_model([block_of(dtype)], "2:4", "x", dtype, CPU)


def test_blocks_that_share_a_module():
    shared = block_of()
    blocks = [nn.ModuleDict({"shared": shared}) for _ in range(2)]
    found = compress_linears(blocks, "2:4")
    assert (found.total, found.forms) == (3, {"2:4": 1}) and kinds(shared) == [nn.Linear, Linear24, nn.Linear]


@pytest.mark.parametrize("kind", ["2:4", "unstructured"])
def test_blocks_without_linears_are_refused(kind):
    block = nn.ModuleDict({"conv": transformers.pytorch_utils.Conv1D(8, 8)})
    with pytest.raises(
        ValueError, match=f"`compressed` = {kind} replaces nn.Linear, but the blocks of 'x' have none: .* Leave"
    ):
        compress_model([block], kind, "x", torch.float32, CPU)
    compress_model([block], "auto", "x", torch.float32, CPU)


@pytest.mark.parametrize("kind", ["2:4", "auto", "unstructured"])
def test_fit_and_streams_are_refused(kind):
    with pytest.raises(ValueError, match=f"`compressed` = {kind} compresses blocks in memory, but `stream` = True"):
        CausalLM("x/y", compressed=kind, stream=True)


@pytest.mark.parametrize("given", [True, False, None, "24", "csr"])
def test_other_values_are_refused(given):
    with pytest.raises(ValueError, match=f"`compressed` expected to be one of none, auto, 2:4, unstructured but got {given!r}"):
        CausalLM("x/y", compressed=given)


def test_the_former_name_is_refused():
    with pytest.raises(ValueError, match=r"`sparse24` has moved: it is `compressed \(2:4 in place of true\)` now"):
        CausalLM("x/y", sparse24=False)

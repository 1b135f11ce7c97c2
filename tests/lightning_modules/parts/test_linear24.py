"""Linear24 against the dense linear; CausalLM with `compressed: 2:4`, which must give what the dense model gives."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from lightning.pytorch import Trainer
from torch import nn

from datamodules import TextDataModule
from functional.pruning.masks import Pattern, keep_largest_of_groups
from functional.sparse24 import decode, prefill
from lightning_modules import CausalLM
from lightning_modules.parts import linear24
from lightning_modules.parts.compressed_linears import compress_linears
from lightning_modules.parts.linear24 import Linear24, try_kernels
from tests.helpers.tiny import FAMILIES, make_tokenizer

ROOT = Path(__file__).parents[3]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_24(linear):
    with torch.no_grad():
        linear.weight.mul_(keep_largest_of_groups(linear.weight.abs(), Pattern(2, 4)))
    return linear


def linear_24(inputs=64, outputs=48, dtype=torch.float32, bias=True):
    torch.manual_seed(inputs + outputs)
    return make_24(nn.Linear(inputs, outputs, bias=bias).to(DEVICE, dtype))


@pytest.fixture(scope="session")
def pruned(tiny_model, tmp_path_factory):
    """family -> directory of a plain model whose blocks are 2:4."""
    made = {}

    def build(family):
        if family not in made:
            model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(family))
            for block in model.get_submodule("model.decoder.layers" if family == "opt" else "model.layers"):
                for module in block.modules():
                    if isinstance(module, nn.Linear):
                        make_24(module)
            made[family] = str(tmp_path_factory.mktemp(f"{family}_24"))
            model.save_pretrained(made[family])
            make_tokenizer(family).save_pretrained(made[family])
        return made[family]

    return build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (16, 64), (2, 9, 64), (0, 64)])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_equals_the_dense_linear(shape, dtype, bias):
    linear = linear_24(dtype=dtype, bias=bias)
    compressed = Linear24.from_linear(linear)
    x = torch.randn(shape, device=DEVICE, dtype=dtype)
    y = compressed(x)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 48)
    torch.testing.assert_close(y, linear(x))
    assert torch.equal(compressed.dense(), linear.weight)


def test_stored_like_any_module():
    linear = linear_24(dtype=torch.bfloat16, bias=False)
    compressed = Linear24.from_linear(linear)
    assert compressed.nbytes * 16 == linear.weight.nbytes * 9
    assert set(compressed.state_dict()) == {"values", "indices"} and not list(compressed.parameters())
    other = Linear24.from_linear(make_24(nn.Linear(64, 48, bias=False, device=DEVICE, dtype=torch.bfloat16)))
    other.load_state_dict(compressed.state_dict())
    assert torch.equal(other.dense(), linear.weight)
    assert torch.equal(compressed.to(torch.float32).dense(), linear.weight.float())
    assert str(compressed) == "Linear24(in_features=64, out_features=48, bias=False)"


def test_many_tokens_go_through_the_sparse_tensor_cores_in_a_graph_only(monkeypatch):
    linear = linear_24(dtype=torch.bfloat16).cpu()
    compressed = Linear24.from_linear(linear)
    with pytest.raises(ValueError, match="expected to be on a GPU"):
        compressed.prepare_prefill(2048)
    calls = []

    def multiply(x, packed, rows, algorithm):
        calls.append((len(x), rows, algorithm))
        return x @ packed.T

    monkeypatch.setattr(prefill, "multiply", multiply)
    monkeypatch.setattr(prefill, "pack", lambda weight: weight)
    monkeypatch.setattr(prefill, "fastest", lambda packed, x: [len(x), 1, -1])
    x = torch.randn(3, 10, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(linear24, "in_graph", lambda: True)
    torch.testing.assert_close(compressed(x), linear(x))
    assert not calls  # not prepared
    compressed.prepare_prefill(32)
    monkeypatch.setattr(linear24, "on_gpu", lambda x: True)  # where 30 tokens could take two passes of the kernel
    torch.testing.assert_close(compressed(x), linear(x), rtol=2e-2, atol=2e-2)  # the bias is added to what is rounded
    assert calls == [(30, 48, [32, 1, -1])]
    monkeypatch.undo()
    torch.testing.assert_close(compressed(x), linear(x))
    assert len(calls) == 1


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs are for GPUs only")
@pytest.mark.parametrize("tokens", [1, 16, 40])
@torch.inference_mode()
def test_captured_by_a_graph(tokens):
    linear = linear_24(128, 64, torch.bfloat16)
    compressed = Linear24.from_linear(linear).prepare_prefill(tokens)
    x = torch.randn(tokens, 128, device=DEVICE, dtype=torch.bfloat16)
    compressed(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = compressed(x)
    x.normal_()
    graph.replay()
    torch.testing.assert_close(y, linear(x), rtol=2e-2, atol=2e-2)


@pytest.fixture
def through_the_kernel(monkeypatch):
    """Numbers of tokens of the calls of `decode`, which without a GPU goes through Triton's interpreter."""
    calls = []

    def counted(x, *arguments):
        calls.append(len(x))
        return decode(x, *arguments)

    monkeypatch.setattr(linear24, "on_gpu", lambda x: True)
    monkeypatch.setattr(linear24, "decode", counted)
    return calls


@pytest.mark.parametrize(
    ("tokens", "dtype", "expected"),
    [
        (1, torch.bfloat16, [1]),
        (16, torch.float16, [16]),
        (17, torch.bfloat16, [17]),
        (33, torch.bfloat16, []),
        (3, torch.float32, []),
    ],
)
@torch.inference_mode()
def test_few_tokens_of_16_bits_go_through_the_kernel(tokens, dtype, expected, through_the_kernel):
    linear = linear_24(dtype=dtype)
    x = torch.randn(tokens, 64, device=DEVICE, dtype=dtype)
    torch.testing.assert_close(Linear24.from_linear(linear)(x), linear(x), rtol=2e-2, atol=2e-2)
    assert through_the_kernel == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [2, 40])
@torch.inference_mode()
def test_compiled_in_one_piece(tokens, dtype, monkeypatch):
    monkeypatch.setattr(linear24, "on_gpu", lambda x: True)
    linear = linear_24(128, 64, dtype)
    compressed = Linear24.from_linear(linear)
    x = torch.randn(tokens, 128, device=DEVICE, dtype=dtype)
    compiled = torch.compile(compressed, fullgraph=True, backend="eager" if DEVICE == "cpu" else "inductor")
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(compiled(x), linear(x), **tolerance)


def test_only_what_is_24_is_compressed():
    block = nn.ModuleDict({"a": linear_24(), "b": nn.Linear(64, 8), "c": nn.ModuleList([nn.Linear(12, 4), nn.LayerNorm(4)])})
    before = [sum(p.nbytes for p in module.parameters()) for module in (block["a"], block["b"], block["c"][0])]
    found = compress_linears([block])
    assert (found.replaced, found.total, found.before) == (1, 3, sum(before)) and found.forms == {"2:4": 1}
    assert isinstance(block["a"], Linear24) and isinstance(block["b"], nn.Linear) and isinstance(block["c"][0], nn.Linear)
    assert found.after == block["a"].nbytes + before[1] + before[2]


def quiet_trainer(tmp_path):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(default_root_dir=tmp_path, accelerator="auto", devices=1, **quiet)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_the_dense_model(family, pruned, tmp_path):
    ids = torch.randint(2, 12, (2, 14), generator=torch.Generator().manual_seed(0))
    dense, compressed = CausalLM(pruned(family)), CausalLM(pruned(family), compressed="2:4")
    for module in (dense, compressed):
        module.configure_model()
        module.eval()
    blocks = list(compressed.blocks.values())
    kinds = {type(module).__name__ for block in blocks for module in block.modules() if "Linear" in type(module).__name__}
    assert kinds == {"Linear24", "MergedLinears"} and isinstance(compressed.model.lm_head, nn.Linear)
    with torch.inference_mode():
        torch.testing.assert_close(compressed(ids), dense(ids), rtol=1e-4, atol=1e-4)


def test_a_bfloat16_model_goes_through_the_kernel(pruned, through_the_kernel):
    ids = torch.randint(2, 12, (2, 7), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    dense, compressed = (CausalLM(pruned("llama"), dtype="bfloat16", compressed=form) for form in ("none", "2:4"))
    for module in (dense, compressed):
        module.configure_model()
        module.to(DEVICE).eval()
    with torch.inference_mode():
        torch.testing.assert_close(compressed(ids), dense(ids), rtol=5e-2, atol=5e-2)
    assert through_the_kernel == 12 * [14]  # q, k and v, and gate and up, are one product


def test_float32_weights_are_warned_of(pruned):
    with pytest.warns(UserWarning, match=r"Weights of torch.float32 .* no kernel .* Give `dtype` = bfloat16 or float16"):
        CausalLM(pruned("llama"), compressed="2:4").configure_model()


def test_perplexity_and_continuations_equal_those_of_the_dense_model(pruned, text_file, tmp_path):
    directory = pruned("llama")
    data = TextDataModule(tokenizer=directory, source=text_file, seq_len=16, num_calibration=1, num_heldout=3, batch_size=2)
    found = {}
    for name, options in {
        "dense": {},
        "sparse": {"compressed": "2:4"},
        "static": {"compressed": "2:4", "static_cache": True},
    }.items():
        module = CausalLM(directory, max_new_tokens=5, **options)
        (metrics,) = quiet_trainer(tmp_path).validate(module, data, verbose=False)
        found[name] = (quiet_trainer(tmp_path).predict(module, data), pytest.approx(metrics["val/loss"], rel=1e-5))
    assert found["sparse"] == found["dense"] == found["static"]


def test_static_cache_reaches_generate(pruned, text_file, tmp_path, monkeypatch):
    directory, seen = pruned("llama"), []
    data = TextDataModule(tokenizer=directory, source=text_file, seq_len=16, num_calibration=1, num_heldout=1)
    original = transformers.LlamaForCausalLM.generate

    def generate(self, **options):
        seen.append(options.get("cache_implementation"))
        return original(self, **options)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", generate)
    for static in (False, True):
        quiet_trainer(tmp_path).predict(CausalLM(directory, max_new_tokens=2, static_cache=static), data)
    assert seen == [None, "static"]


def test_fit_and_dense_models_are_refused(tiny_model, text_file, tmp_path):
    directory = tiny_model("llama")
    data = TextDataModule(tokenizer=directory, source=text_file, seq_len=16, num_calibration=1, num_heldout=1)
    with pytest.raises(ValueError, match=rf"none of the 21 linears in the blocks of '{directory}' is 2:4 .* `pattern` = 2:4"):
        quiet_trainer(tmp_path).validate(CausalLM(directory, compressed="2:4"), data, verbose=False)
    with pytest.raises(ValueError, match="`compressed` = 2:4 is for validate, test and predict, but this is fit"):
        quiet_trainer(tmp_path).fit(CausalLM("no/such/model", compressed="2:4"), data)  # before it looks for weights


def test_a_compressed_model_is_neither_trained_nor_saved(pruned, text_file, tmp_path):
    directory = pruned("llama")
    data = TextDataModule(tokenizer=directory, source=text_file, seq_len=16, num_calibration=1, num_heldout=1)
    module = CausalLM(directory, compressed="2:4")
    quiet_trainer(tmp_path).validate(module, data, verbose=False)
    with pytest.raises(ValueError, match="`compressed` = 2:4 is for validate, test and predict, but this is fit"):
        quiet_trainer(tmp_path).fit(module, data)
    with pytest.raises(ValueError, match="linears that were compressed in memory are not saved"):
        module.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_kernels_that_do_not_run_are_told_of_before(monkeypatch):
    try_kernels(torch.device(DEVICE))

    def fails(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(linear24, "decode", fails)
    with pytest.raises(ValueError, match=r"needs Triton, a C compiler and, for a GPU, .* \(Failed to find C compiler\)"):
        try_kernels(torch.device(DEVICE))


def test_predict_by_the_command_line_is_that_of_the_dense_model(pruned, text_file, tmp_path):
    content = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    content["model"]["init_args"] |= {"model_name_or_path": pruned("llama"), "dtype": "float32", "max_new_tokens": 6}
    content["data"]["init_args"] |= {"source": text_file, "seq_len": 24, "num_calibration": 4, "num_heldout": 3}
    content["trainer"] |= {"accelerator": "cpu", "callbacks": None, "logger": False}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    shown = []
    for flag in ("none", "2:4"):
        command = [sys.executable, str(ROOT / "train.py"), "predict", "--config", "mine.yaml", "--model.compressed", flag]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800, check=False)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if " >>> " in line]
        note = re.search(r"21 of 21 linears were compressed \(21 as 2:4\): \S+ -> \S+ MiB", done.stdout + done.stderr)
        assert bool(note) == (flag == "2:4")
        shown.append(lines)
    assert len(shown[0]) == 3 and shown[0] == shown[1]

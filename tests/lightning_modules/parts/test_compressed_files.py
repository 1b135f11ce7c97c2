"""Compressed directories: the layout on disk, what CausalLM reads from it, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_modules import CausalLM
from lightning_modules.expand import expand, main
from lightning_modules.parts.compressed_files import CompressedShards, compress_directory, open_shards, remove_other_form
from lightning_modules.parts.language_models import load_model
from tests.helpers.tiny import MIXTURES, make_mixture, make_model, make_tokenizer

BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def with_zeros(model, share=0.6):
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.masked_fill_(torch.rand_like(parameter) < share, 0)
    return model


def same_bits(found, expected):
    return (
        found.shape == expected.shape
        and found.dtype == expected.dtype
        and (
            torch.equal(found.view(BITS[found.dtype]), expected.view(BITS[found.dtype]))
            if found.dtype in BITS
            else torch.equal(found, expected)
        )
    )


def saved(folder, model, **options):
    """A plain and a compressed directory of a model, with a tokenizer."""
    folders = folder / "plain", folder / "compressed"
    for directory in folders:
        model.save_pretrained(directory, **options)
        make_tokenizer("llama").save_pretrained(directory)
    compress_directory(folders[1])
    return folders


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("size", ["1GB", "12KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mixtral", "gpt_oss"])  # qwen3: tied; gpt2: Conv1D
def test_every_bit_comes_back(family, dtype, size, tmp_path):
    model = with_zeros((make_mixture if family in MIXTURES else make_model)(family)).to(dtype)
    plain, compressed = saved(tmp_path, model, max_shard_size=size)
    assert (
        not list(compressed.glob("model*"))
        and (compressed / "config.json").read_bytes() == (plain / "config.json").read_bytes()
    )
    found, expected = (load_model(str(path), "auto", None) for path in (compressed, plain))
    assert type(found) is type(expected) and found.training == expected.training is False
    weights = found.state_dict(), expected.state_dict()
    assert weights[0].keys() == weights[1].keys() and all(same_bits(weights[0][name], weights[1][name]) for name in weights[1])
    tied = [module.get_output_embeddings().weight is module.get_input_embeddings().weight for module in (found, expected)]
    assert tied[0] == tied[1] == model.config.tie_word_embeddings
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    expand(compressed, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(plain)  # byte for byte, index and all


def test_the_layout_is_the_documented_one(tmp_path):
    """Read with nothing but safetensors and arithmetic."""
    torch.manual_seed(0)
    tensors = {
        "half": torch.randn(6, 20, dtype=torch.bfloat16),
        "experts": torch.randn(2, 3, 10),
        "full": torch.randn(4, 16),
        "bias": torch.zeros(64),
        "counts": torch.zeros(8, 8, dtype=torch.int64),
    }
    for name in ("half", "experts"):
        tensors[name][..., ::2] = 0
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    compress_directory(tmp_path)
    assert json.loads((tmp_path / "compressed.json").read_text()) == {"format": "bitmap", "version": 1}
    assert {path.name for path in tmp_path.iterdir()} == {"compressed.json", "compressed.safetensors"}
    stored = load_file(tmp_path / "compressed.safetensors")
    assert stored.keys() == {"half.mask", "half.values", "experts.mask", "experts.values", "full", "bias", "counts"}
    with safe_open(tmp_path / "compressed.safetensors", "pt") as file:
        shapes = json.loads(file.metadata()["bitmap"])
    assert shapes == {"half": [6, 20], "experts": [2, 3, 10]}
    for name, shape in shapes.items():
        mask, left = stored[f"{name}.mask"], stored[f"{name}.values"].tolist()
        rows, columns = mask.shape[0], shape[-1]
        found = [[left.pop(0) if mask[row, j // 8] >> j % 8 & 1 else 0.0 for j in range(columns)] for row in range(rows)]
        assert torch.tensor(found, dtype=tensors[name].dtype).view(shape).equal(tensors[name]) and not left
    assert all(torch.equal(stored[name], tensors[name]) for name in ("full", "bias", "counts"))


@pytest.mark.parametrize(("share", "expected"), [(0.5, 0.5625), (0.7, 0.3625)])
def test_share_of_the_bytes(share, expected, tmp_path):
    weight = torch.ones(200, 400, dtype=torch.float16)
    weight[:, : round(400 * share)] = 0
    save_file({"weight": weight}, tmp_path / "model.safetensors", {"format": "pt"})
    compress_directory(tmp_path)
    assert (tmp_path / "compressed.safetensors").stat().st_size / weight.nbytes == pytest.approx(expected, abs=0.003)


def test_a_matrix_that_would_not_get_smaller_stays(tmp_path):
    """At 16 bit the mask takes a sixteenth of the bytes, so that more than a sixteenth of the weights have to be zero."""
    weights = {name: torch.ones(16, 64, dtype=torch.bfloat16) for name in ("a", "b")}
    weights["a"].view(-1)[:64], weights["b"].view(-1)[:65] = 0, 0
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    compress_directory(tmp_path)
    assert load_file(tmp_path / "compressed.safetensors").keys() == {"a", "b.mask", "b.values"}


def test_equal_weights_make_equal_files(tmp_path):
    """Which safetensors does not see to if the head of a file has several texts."""
    for number in range(8):
        directory = tmp_path / str(number)
        directory.mkdir()
        save_file({"a": torch.eye(16), "b": torch.eye(8)}, directory / "model.safetensors", {"format": "pt"})
        compress_directory(directory)
    assert len({(tmp_path / str(number) / "compressed.safetensors").read_bytes() for number in range(8)}) == 1


def test_negative_zeros_become_positive_and_all_other_numbers_stay(tmp_path):
    weight = torch.zeros(8, 8)
    weight[0] = torch.tensor([-0.0, float("nan"), float("inf"), -1e-45, 1e-45, 5, -5, 0])
    save_file({"weight": weight}, tmp_path / "model.safetensors", {"format": "pt"})
    compress_directory(tmp_path)
    (found,) = open_shards(tmp_path).read(["weight"])
    assert same_bits(found, torch.where(weight == 0, 0.0, weight)) and torch.signbit(weight[0, 0])


def test_transformers_does_not_take_it_for_a_plain_directory(tmp_path):
    for size in ("1GB", "12KB"):
        _, compressed = saved(tmp_path / size, with_zeros(make_model("llama")), max_shard_size=size)
        with pytest.raises(OSError, match=r"model\.safetensors"):
            transformers.AutoModelForCausalLM.from_pretrained(compressed)


def test_streamed(tmp_path):
    plain, compressed = saved(tmp_path, with_zeros(make_model("llama")), max_shard_size="12KB")
    found = []
    for directory in (plain, compressed):
        module = CausalLM(str(directory), stream=True)
        module.configure_model()
        found.append(dict(module.streamed.tensors()))
    assert found[0].keys() == found[1].keys() and all(same_bits(found[1][name], found[0][name]) for name in found[0])


def test_a_linear_is_compressed_in_memory_again(tmp_path):
    plain, compressed = saved(tmp_path, with_zeros(make_model("llama")).bfloat16())
    ids = torch.arange(2, 12)[None]
    dense, sparse = CausalLM(str(plain)), CausalLM(str(compressed), compressed="unstructured")
    for module in (dense, sparse):
        module.configure_model()
        module.eval()
    assert not any(isinstance(part, nn.Linear) for part in sparse.model.model.modules())
    with torch.inference_mode():
        torch.testing.assert_close(sparse(ids), dense(ids))


@pytest.fixture
def compressed(tmp_path):
    return saved(tmp_path, with_zeros(make_model("llama")), max_shard_size="12KB")[1]


def _lose_a_value(directory):
    for path in sorted(directory.glob("compressed-*")):
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118  (no dict)
        if values := [name for name in tensors if name.endswith(".values")]:
            tensors[values[0]] = tensors[values[0]][:-1].clone()
            save_file(tensors, path, metadata)
            return


DAMAGES = [
    (
        lambda path: (path / "compressed.json").write_text('{"format": "bitmap", "version": 2}'),
        "expected to hold .* but has .*2}",
    ),
    (
        lambda path: (path / "compressed.json").write_text("{"),
        r"compressed.json expected to hold .* but has None. Read it with",
    ),
    (
        lambda path: (path / "compressed.safetensors.index.json").unlink(),
        "has compressed.json but neither compressed.safetensors",
    ),
    (lambda path: (path / "compressed.safetensors.index.json").write_text("[]"), "index.json is damaged"),
    (lambda path: sorted(path.glob("compressed-*"))[1].unlink(), "compressed-00002-of-.* cannot be read"),
    (lambda path: sorted(path.glob("compressed-*"))[1].write_bytes(b"12"), "compressed-00002-of-.* cannot be read"),
    (lambda path: (path / "model.safetensors").touch(), "has compressed weights and model.safetensors, .* Remove"),
    (_lose_a_value, r"is damaged: .* has \d+ values for \d+ bits"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_directories_are_refused(damage, message, stream, compressed):
    damage(compressed)
    with pytest.raises(ValueError, match=f"`model_name_or_path`: .*{message}"):
        module = CausalLM(str(compressed), stream=stream)
        module.configure_model()
        dict(module.streamed.tensors())


def test_a_mask_of_another_shape_is_refused(tmp_path):
    parts = {"w.mask": torch.zeros(2, 1, dtype=torch.uint8), "w.values": torch.zeros(0)}
    save_file(parts, tmp_path / "compressed.safetensors", {"bitmap": json.dumps({"w": [2, 9]})})
    with pytest.raises(ValueError, match=r"cannot be read \(.*w.mask has not the shape of a matrix \[2, 9\]"):
        CompressedShards([tmp_path / "compressed.safetensors"])


def rewritten(directory, change):
    """Write the file of a small model again after a change of its tensors and shapes."""
    path = saved(directory, with_zeros(make_model("llama")))[1] / "compressed.safetensors"
    with safe_open(path, "pt") as file:
        tensors, shapes = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["bitmap"])  # noqa: SIM118  (no dict)
    metadata = change(tensors, shapes, next(iter(shapes)))
    save_file(tensors, path, {"bitmap": json.dumps(shapes)} if metadata is None else metadata)
    return path.parent


BROKEN = [
    (lambda tensors, shapes, name: {"format": "pt"}, "the head of the file lacks the shape of lm_head.weight"),
    (lambda tensors, shapes, name: tensors.update({f"{name}.mask": tensors[f"{name}.mask"].int()}), "have I32 and F32"),
    (lambda tensors, shapes, name: tensors.update({f"{name}.values": tensors[f"{name}.values"].int()}), "have U8 and I32"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_files_that_another_program_has_written_are_refused(change, message, tmp_path):
    directory = rewritten(tmp_path, change)
    for use in (lambda: load_model(str(directory), "auto", None), lambda: expand(directory, tmp_path / "out")):
        with pytest.raises(ValueError, match=f"`model_name_or_path`: .*compressed.safetensors cannot be read .*{message}"):
            use()
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_is_missing_is_not_made_up(tmp_path):
    def without_one(tensors, shapes, name):
        for lost in (f"{name}.mask", f"{name}.values"):
            del tensors[lost]
        del shapes[name]

    directory = rewritten(tmp_path, without_one)
    with pytest.raises(ValueError, match=r"lack 1 of the model's tensors \(lm_head.weight\), which would be random"):
        CausalLM(str(directory)).configure_model()


def test_a_directory_without_weights_is_not_expanded(compressed, tmp_path):
    (compressed / "compressed.safetensors.index.json").unlink()
    with pytest.raises(SystemExit, match=r"has compressed.json but neither compressed.safetensors nor .* Get the missing"):
        main([str(compressed), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_adapters_beside_compressed_weights_are_refused(compressed, monkeypatch):
    (compressed / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(
        "lightning_modules.parts.language_models.has_adapters", lambda path: True
    )  # whether peft is there or not
    with pytest.raises(ValueError, match=r"has adapters .* Write a plain directory with `python -m lightning_modules.expand"):
        CausalLM(str(compressed)).configure_model()


def test_the_other_form_of_an_earlier_run_goes(tmp_path):
    plain, compressed = saved(tmp_path, with_zeros(make_model("llama")), max_shard_size="12KB")
    for path in plain.iterdir():
        if path.name.startswith("model"):
            (compressed / path.name).write_bytes(path.read_bytes())
    (compressed / "model_ema.safetensors").touch()  # not ours
    remove_other_form(compressed, compressed=True)
    assert {path.name for path in compressed.glob("model*")} == {"model_ema.safetensors"}
    load_model(str(compressed), "auto", None)
    for path in compressed.iterdir():
        (plain / path.name).write_bytes(path.read_bytes())
    remove_other_form(plain, compressed=False)
    assert not list(plain.glob("compressed*")) and open_shards(plain).names


def test_the_command(compressed, tmp_path, capsys):
    main([str(compressed), str(tmp_path / "out")])
    assert "Plain model written to" in capsys.readouterr().out
    assert load_file(sorted((tmp_path / "out").glob("model-*"))[0])
    assert {path.name for path in tmp_path.iterdir()} >= {"out", "plain", "compressed"} and not (
        tmp_path / ".out.partial"
    ).exists()
    for arguments, message in (
        (
            (tmp_path / "plain", tmp_path / "other"),
            "DIR expected a directory with compressed weights but .* has no compressed.json",
        ),
        ((tmp_path / "nowhere", tmp_path / "other"), "DIR expected a directory"),
        ((compressed, tmp_path / "out"), "OUT expected a new or empty directory"),
        ((compressed, tmp_path / "out" / "config.json"), "OUT expected a new or empty directory"),
    ):
        with pytest.raises(SystemExit, match=f"error: Argument {message}"):
            main([str(argument) for argument in arguments])
    assert not (tmp_path / "other").exists()


def test_a_plain_directory_appears_whole_or_not_at_all(compressed, tmp_path):
    _lose_a_value(compressed)
    with pytest.raises(SystemExit, match=r"is damaged: .* values for"):
        main([str(compressed), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()

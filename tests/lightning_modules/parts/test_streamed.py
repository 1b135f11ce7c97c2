"""Blocks that stay in their files: the weights and buffers of a whole model, read one by one, and freed."""

import json

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lightning_modules.parts import shards as shards_module
from lightning_modules.parts.block_stream import BlockStream
from lightning_modules.parts.host_memory import FileMemory, free_memory
from lightning_modules.parts.load_streamed import load_streamed
from lightning_modules.parts.shards import INDEX, SINGLE, Shards, digest_of_file, find_shards, give_second_name, write_shard
from tests.helpers.tiny import FAMILIES, FURTHER_FAMILIES, MIXTURES, make_mixture, make_model


@pytest.fixture
def checkpoint(tmp_path):
    """family -> directory of a tiny model in files of 12 KB, which split blocks."""

    def make(family="llama", dtype=torch.float32):
        directory = tmp_path / family
        model = make_mixture(family) if family in MIXTURES else make_model(family)
        model.to(dtype).save_pretrained(directory, max_shard_size="12KB")
        return directory

    return make


def there(blocks):
    """Indices of the blocks that have weights."""
    return [index for index, block in enumerate(blocks) if not any(weight.is_meta for weight in block.parameters())]


def blocks_of(streamed):
    return list(streamed.blocks.values())


@pytest.mark.parametrize("family", [*FAMILIES, *FURTHER_FAMILIES, *MIXTURES])
def test_every_family_has_the_bits_of_the_whole_model(family, checkpoint):
    directory = checkpoint(family, torch.bfloat16)
    whole = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    model, streamed = load_streamed(str(directory), "auto", None)
    assert there(blocks_of(streamed)) == [] and not model.training
    for (name, tensor), expected in zip(streamed.tensors(), whole.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected) and tensor.dtype == expected.dtype, name
    streamed.hold(streamed.blocks)
    for kind in ("named_parameters", "named_buffers"):
        found, expected = (dict(getattr(each, kind)()) for each in (model, whole))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items())
    tied = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_blocks_are_held_and_freed(checkpoint):
    model, streamed = load_streamed(str(checkpoint()), "float32", None)
    blocks, (first, second, third) = blocks_of(streamed), streamed.blocks
    for names, expected in (([first], [0]), ([first, second], [0, 1]), ([second, third], [1, 2]), ([], [])):
        streamed.hold(names)
        assert there(blocks) == expected
    streamed.hold([second])
    held = next(blocks[1].parameters())
    with streamed.reading(second):
        assert next(blocks[1].parameters()) is held
    with streamed.reading(third):
        assert there(blocks) == [1, 2]
    assert there(blocks) == [1]
    with pytest.raises(KeyError), streamed.reading(first):
        raise KeyError
    assert there(blocks) == [1]
    with streamed.aside():
        assert len(model.model.layers) == 0
    assert len(model.model.layers) == 3


def test_a_block_reads_itself_when_it_runs_and_not_when_it_is_recorded(checkpoint, monkeypatch):
    directory = checkpoint("gpt2")
    model, streamed = load_streamed(str(directory), "auto", None)
    whole = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    ids, seen = torch.arange(12)[None], []
    for block in blocks_of(streamed):
        block.ln_1.register_forward_hook(lambda *_: seen.append(there(blocks_of(streamed))))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    assert seen == [[0], [1], [2]] and there(blocks_of(streamed)) == []
    seen.clear()
    stream = BlockStream(blocks_of(streamed))
    for key in range(2):
        stream.capture(key, lambda: model(ids, use_cache=False))
    assert seen == [[0]], "the first block runs once, to see what it returns"


def test_pruned_blocks_come_from_their_own_files(checkpoint, tmp_path):
    directory = checkpoint()
    model, streamed = load_streamed(str(directory), "auto", None)
    name = list(streamed.blocks)[1]
    streamed.hold([name])
    weight = model.get_submodule(name).mlp.up_proj.weight
    with torch.no_grad():
        weight[::2] = 0
    digest = write_shard(tmp_path / "1.safetensors", streamed.as_stored(name))
    assert digest == digest_of_file(tmp_path / "1.safetensors")
    streamed.replace(name, tmp_path / "1.safetensors", read=False)
    streamed.hold([])
    with streamed.reading(name):
        assert torch.equal(model.get_submodule(name).mlp.up_proj.weight, weight)
    (tmp_path / "out").mkdir()
    streamed.save(tmp_path / "out")
    assert (tmp_path / "out" / "model-00002-of-00004.safetensors").samefile(tmp_path / "1.safetensors")
    saved, source = (transformers.AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", directory))
    for (full, found), expected in zip(saved.state_dict().items(), source.state_dict().values(), strict=True):
        assert torch.equal(found, weight if full == f"{name}.mlp.up_proj.weight" else expected), full
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in source.state_dict().values())
    streamed.forget_pruned()
    with streamed.reading(name):
        assert model.get_submodule(name).mlp.up_proj.weight.count_nonzero() > weight.count_nonzero()
    streamed.move_to(tmp_path / "out")
    with streamed.reading(name):
        assert torch.equal(model.get_submodule(name).mlp.up_proj.weight, weight)


def test_names_without_that_of_the_decoder(tmp_path):
    """As the files of GPT-2 on the hub have them."""
    model = make_model("gpt2")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, tmp_path / SINGLE, {"format": "pt"})
    _, streamed = load_streamed(str(tmp_path), "auto", None)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in streamed.tensors())


def rewrite(directory, change):
    """Put other tensors into a directory, in one file."""
    tensors = {name: value for path in find_shards(directory) for name, value in load_file(path).items()}
    for path in [*directory.glob("*.safetensors"), directory / INDEX]:
        path.unlink()
    change(tensors)
    save_file(tensors, directory / SINGLE, {"format": "pt"})


LACKING = r"expected shards with the names and shapes of LlamaForCausalLM, but those in .* lack {} of its 30 weights"


@pytest.mark.parametrize(
    "change, family, message",
    [
        (lambda t: t.pop("model.layers.2.mlp.up_proj.weight"), "llama", LACKING.format(1)),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(31)}),
            "llama",
            LACKING.format(1) + ", such as model.norm.weight",
        ),
        (lambda t: [t.update({f"x.{n}": t.pop(n)}) for n in [*t] if "layers" in n], "llama", LACKING.format(27)),
        (lambda t: t.update({"lm_head.weight": torch.zeros(96, 32)}), "qwen3", "ties lm_head.weight to another weight"),
    ],
)
def test_other_names_and_shapes_are_refused(change, family, message, checkpoint, monkeypatch):
    directory = checkpoint(family)
    rewrite(directory, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_streamed(str(directory), "auto", None)
    assert "\n" not in str(caught.value)


def test_an_expert_that_is_missing_is_named_by_its_layer(checkpoint, monkeypatch):
    directory = checkpoint("mixtral")
    rewrite(directory, lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.2.w2.weight"))
    monkeypatch.setattr(Shards, "read", None)
    with pytest.raises(ValueError, match=r"lack 1 of its 21 weights, such as model.layers.1.mlp.experts.down_proj. Get the"):
        load_streamed(str(directory), "auto", None)


def test_a_weight_that_is_tied_may_be_there_twice(checkpoint):
    directory = checkpoint("qwen3")
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model, _ = load_streamed(str(directory), "auto", None)
    assert model.lm_head.weight is model.model.embed_tokens.weight and not model.lm_head.weight.is_meta


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral", "granitemoe", "deepseek_v3"])
def test_files_are_written_as_transformers_does(family, checkpoint, tmp_path):
    """Under their names there, and experts one by one where the checkpoint has them so."""
    directory, again = checkpoint(family), tmp_path / "again"
    _, streamed = load_streamed(str(directory), "auto", None)
    again.mkdir()
    streamed.save(again)
    found, expected = (
        {name: value for path in find_shards(each) for name, value in load_file(path).items()} for each in (again, directory)
    )
    assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def quantised(directory):
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | {"quantization_config": {"quant_method": "fp8"}}))


def pickled(directory):
    for path in [*directory.glob("*.safetensors"), directory / INDEX]:
        path.unlink()
    torch.save({}, directory / "pytorch_model.bin")


@pytest.mark.parametrize(
    "damage, message",
    [
        (quantised, "expected plain weights, but those of .* are quantised"),
        (pickled, "expected safetensors in `model_name_or_path`, but .* has pickled weights, pytorch_model.bin. Load it with"),
        (lambda path: [file.unlink() for file in find_shards(path)], r"model-00001-of-000\d\d.safetensors cannot be read"),
        (lambda path: (path / INDEX).write_text("[]"), f"{INDEX} is damaged"),
        (lambda path: (path / INDEX).unlink(), f"has neither {SINGLE} nor {INDEX}"),
        (lambda path: find_shards(path)[1].write_bytes(b"12"), "model-00002-of-000.. ?.*cannot be read"),
        (lambda path: (path / "adapter_config.json").write_text("{}"), "expected a model without adapters"),
    ],
)
def test_what_cannot_be_streamed_is_refused_before_a_weight_is_read(damage, message, checkpoint, monkeypatch):
    monkeypatch.setattr(Shards, "read", None)
    directory = checkpoint()
    damage(directory)
    with pytest.raises(ValueError, match=message) as caught:
        load_streamed(str(directory), "auto", None)
    assert "\n" not in str(caught.value)


def test_other_sources_are_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="GGUF file") as caught:
        load_streamed(str(tmp_path / "model.gguf"), "auto", None)
    assert "Argument `stream` = True expected" in str(caught.value) and "leave `stream` out" in str(caught.value).lower()


def test_a_hub_id_is_read_from_the_cache(checkpoint, tmp_path, monkeypatch):
    snapshot = tmp_path / "cache" / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    directory = checkpoint()
    directory.rename(snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "lightning_modules.parts.load_streamed.read_config", lambda _: transformers.AutoConfig.from_pretrained(snapshot)
    )
    model, streamed = load_streamed("owner/name", "auto", None)
    assert not model.lm_head.weight.is_meta and len(list(streamed.tensors())) == 30
    with pytest.raises(ValueError, match="no model could be loaded from 'owner/other'"):
        load_streamed("owner/other", "auto", None)


def test_a_shard_is_whole_or_absent(tmp_path, monkeypatch):
    path, tensors = tmp_path / "a.safetensors", {"x": torch.arange(6.0).reshape(2, 3).T}
    found = write_shard(path, tensors)
    assert torch.equal(load_file(path)["x"], tensors["x"]) and found == digest_of_file(path)

    def full(*_):
        (tmp_path / "a.safetensors.partial").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards_module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(path, {})
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"] and digest_of_file(path) == found


def test_a_second_name_is_a_copy_where_there_are_no_links(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("x")
    give_second_name(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").samefile(tmp_path / "a")

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(shards_module.os, "link", refuse)
    give_second_name(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_text() == "x" and not (tmp_path / "c").samefile(tmp_path / "a")


def test_file_memory_gives_copies(tmp_path):
    memory = FileMemory(tmp_path / "hidden")
    for dtype in (torch.float32, torch.bfloat16):
        value = torch.randn(2, 3, 4).to(dtype)
        memory.put(0, value)
        found = memory.get(0)
        assert torch.equal(found, value) and found.dtype == dtype
        found.zero_()
        assert torch.equal(memory.get(0), value)
    memory.put(0, torch.ones(5))
    assert torch.equal(memory.get(0), torch.ones(5))
    memory.clear()
    assert not (tmp_path / "hidden").exists() and free_memory() > 0

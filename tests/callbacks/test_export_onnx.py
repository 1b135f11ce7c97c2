"""ExportOnnx: the file gives the model's outputs for any batch and length, and its zeros are still zeros."""

import re
from importlib.util import find_spec

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import transformers
from huggingface_hub import ModelCard

from callbacks import BlockwisePruning, ExportOnnx
from callbacks.base.sparsity import linear_weights
from callbacks.export_onnx import check_logits, check_weights, export_onnx
from datamodules import ImageDataModule
from lightning_modules import CausalLM, ImageClassifier
from tests.helpers.recovery_runs import short_windows
from tests.helpers.tiny import VOCABULARY, make_mixture, quiet, tiny_vit

DEIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 10}


def initializers(path):
    """Matrices of the file."""
    return [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 2]


def has(arrays, weight):
    """Whether a weight is among them, with the same zeros."""
    weight = weight.detach().float().numpy()
    return any(np.array_equal(array, weight) or np.array_equal(array, weight.T) for array in arrays)


def run(path, inputs):
    session = onnxruntime.InferenceSession(path)
    (entry,) = session.get_inputs()
    return entry, session.run(["logits"], {entry.name: inputs.numpy()})[0]


@pytest.fixture(scope="module")
def text(text_file, pruned):
    return short_windows(pruned, text_file)


@pytest.fixture(scope="module")
def exported(pruned, text, tmp_path_factory):
    """File of the pruned language model, and the module."""
    folder, module = tmp_path_factory.mktemp("exported"), CausalLM(pruned)
    quiet(folder, ExportOnnx()).validate(module, text, verbose=False)
    return folder / "onnx/model.onnx", module


def test_language_model(exported, pruned):
    path, module = exported
    assert {file.name for file in path.parent.iterdir()} == {"README.md", "model.onnx", "model.onnx.data"}
    card = ModelCard.load(path.parent / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("onnx", "text-generation") and card.data.datasets is None
    assert card.data.tags == ["sparse", "pruned", "onnx"] and f"onnx {onnx.__version__}" in card.text
    assert re.search(r"\| val/loss \| \d+\.\d+ \|", card.text) and "prunable linears | 50.0000% |" in card.text
    expected = transformers.AutoModelForCausalLM.from_pretrained(pruned)
    for batch, sequence in ((1, 1), (2, 8), (5, 33)):
        ids = torch.randint(VOCABULARY, (batch, sequence))
        entry, logits = run(path, ids)
        assert (entry.name, entry.shape) == ("input_ids", ["batch", "sequence"])
        with torch.no_grad():
            np.testing.assert_allclose(logits, expected(ids).logits.numpy(), rtol=0, atol=1e-4)
    arrays, weights = initializers(path), linear_weights(module)
    assert all(has(arrays, weight) and (weight == 0).float().mean() == 0.5 for weight in weights.values())


@pytest.mark.parametrize(("family", "dtype"), [("opt", "float32"), ("qwen2", "bfloat16")])
def test_other_families_and_types(family, dtype, tiny_model, tmp_path):
    module = CausalLM(tiny_model(family), dtype=dtype)
    module.configure_model()
    assert export_onnx(module, tmp_path / "model.onnx") < 1e-4
    ids = torch.randint(13, (4, 9))
    expected = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=dtype).float()
    with torch.no_grad():
        np.testing.assert_allclose(run(tmp_path / "model.onnx", ids)[1], expected(ids).logits.numpy(), rtol=0, atol=1e-4)
    first = next(module.model.parameters())
    assert first.dtype == getattr(torch, dtype) and first.requires_grad


def test_vision_transformer_after_training_and_pruning(tmp_path):
    data = ImageDataModule("digits", batch_size=64, num_calibration=16, num_heldout=16, crop_pct=1.0)
    module = ImageClassifier("deit_tiny_patch16_224", model_args=DEIT)
    callbacks = BlockwisePruning(sparsity=0.5, update_rule="fixed"), ExportOnnx(str(tmp_path / "here"))
    quiet(tmp_path, *callbacks, max_epochs=None).fit(module, data)
    model = timm.create_model("local-dir:" + str(tmp_path / "pruned"), pretrained=True).eval()
    for batch in (1, 7):
        images = torch.randn(batch, 3, 8, 8)
        entry, logits = run(tmp_path / "here/model.onnx", images)
        assert (entry.name, entry.shape) == ("image", ["batch", 3, 8, 8])
        with torch.no_grad():
            np.testing.assert_allclose(logits, model(images).numpy(), rtol=0, atol=1e-4)
    arrays = initializers(tmp_path / "here/model.onnx")
    for block in model.blocks:
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            assert has(arrays, linear.weight) and (linear.weight == 0).float().mean() == pytest.approx(0.5, abs=0.02)


def test_a_file_that_is_not_the_model_is_refused(exported, pruned):
    path, module = exported
    inputs = torch.randint(VOCABULARY, (3, 13))
    assert check_logits(module, inputs, path) < 1e-4
    other = CausalLM(pruned)
    other.configure_model()
    check_weights(other, path)
    with torch.no_grad():
        other.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(RuntimeError, match=r"not hold the weights of model\.layers\.0\.mlp\.up_proj as they are; not written"):
        check_weights(other, path)
    with pytest.raises(RuntimeError, match="gives logits that differ from PyTorch's by up to"):
        check_logits(other, inputs, path)


def test_what_a_user_is_told(pruned, text, tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="ExportOnnx needs a CausalLM or an ImageClassifier but got TinyViT"):
        quiet(tmp_path, ExportOnnx()).validate(tiny_vit(), [])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`output_dir` = .*file/x' cannot be written"):
        quiet(tmp_path, ExportOnnx(str(tmp_path / "file/x"))).validate(CausalLM(pruned), text)

    def refuses(*args, **options):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", refuses)
    with pytest.raises(ValueError, match=r"cannot be exported as ONNX \(RuntimeError: no such operator\)"):
        quiet(tmp_path, ExportOnnx()).validate(CausalLM(pruned), text, verbose=False)
    monkeypatch.setattr("utilities.extras.find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    with pytest.raises(ModuleNotFoundError, match=r"onnxscript is not installed\. Run `pip install --editable '\.\[export\]'`"):
        quiet(tmp_path, ExportOnnx()).validate(CausalLM(pruned), text)


def test_experts_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot export the experts of a MixtralForCausalLM \(model.layers.0.mlp.experts\)"):
        export_onnx(CausalLM(make_mixture("mixtral")), tmp_path / "model.onnx")


def test_compressed_linears_are_refused_before_weights_are_read(text, tmp_path):
    module = CausalLM("x/y", compressed="2:4")
    with pytest.raises(ValueError, match=r"`compressed` = 2:4 replaces linears by forms that ONNX does not have. Leave it out"):
        quiet(tmp_path, ExportOnnx()).validate(module, text, verbose=False)
    assert module.model is None

"""Vision-language models: the text tower is pruned, the rest stays as it was, and transformers loads the whole again."""

import json

import pytest
import torch
import transformers

from callbacks import BlockwisePruning
from datamodules import TextDataModule
from lightning_modules import CausalLM
from lightning_modules.parts.vision_language import PROCESSOR_FILES
from tests.helpers.tiny import VOCABULARY, quiet

TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VISION |= {"image_size": 8, "patch_size": 4}
QWEN_VISION = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32, "patch_size": 4}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
FAMILIES = ("gemma3", "paligemma", "llava", "qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm", "mllama")


def config_of(family):
    image = {"image_token_id": VOCABULARY - 1}
    if family == "gemma3":
        mixed = {
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
        tokens = {"mm_tokens_per_image": 4, "image_token_index": 95, "boi_token_index": 94, "eoi_token_index": 93}
        return transformers.Gemma3Config(text_config=TEXT | mixed, vision_config=VISION, **tokens)
    if family == "llava":
        text, vision = transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**VISION)
        return transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=VOCABULARY - 1)
    if family == "paligemma":
        text = TEXT | {"model_type": "gemma2", "head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 1.0}
        vision = VISION | {"model_type": "siglip_vision_model", "projection_dim": 32}
        return transformers.PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=95, projection_dim=32)
    if family.startswith("qwen2"):
        others = {"video_token_id": 94, "vision_start_token_id": 93, "vision_end_token_id": 92}
        vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
        vision = vision if family == "qwen2_vl" else QWEN_VISION | {"fullatt_block_indexes": [1]}
        return transformers.CONFIG_MAPPING[family](text_config=TEXT | MROPE, vision_config=vision, **image, **others)
    if family == "mllama":
        heads = {"attention_heads": 2, "num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 32}
        vision = VISION | heads | {"max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}
        text = TEXT | {"cross_attention_layers": [1]}
        return transformers.MllamaConfig(text_config=text, vision_config=vision, image_token_index=VOCABULARY - 1)
    text = transformers.LlamaConfig(**TEXT)
    return transformers.CONFIG_MAPPING[family](text_config=text, vision_config=VISION, scale_factor=2, pad_token_id=0, **image)


def save_dense(family, folder):
    torch.manual_seed(FAMILIES.index(family))
    model = transformers.AutoModelForImageTextToText.from_config(config_of(family))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    model.save_pretrained(folder)
    (folder / PROCESSOR_FILES[0]).write_text('{"size": 8}', encoding="utf-8")


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mllama"])
def test_the_text_tower_is_pruned_and_the_whole_model_is_saved(family, tiny_model, text_file, tmp_path):
    save_dense(family, tmp_path / "dense")
    data = TextDataModule(tiny_model("llama"), text_file, seq_len=20, num_calibration=4, num_heldout=2, batch_size=2)
    module = CausalLM(str(tmp_path / "dense"))
    callback = BlockwisePruning(sparsity=0.5, output_dir=str(tmp_path / "pruned"))
    quiet(tmp_path, callback).fit(module, data)
    assert all(set(record.update_shares) == set("qkv") for record in callback.records)
    linears = {
        f"{name}.{path}.weight": linear.weight
        for name, block in module.blocks.items()
        for path, linear in module.linears(block).items()
    }
    assert len(linears) == 21 and not any("vision" in name for name in linears)
    assert all(2 * int((weight == 0).sum()) == weight.numel() for weight in linears.values())
    load = transformers.AutoModelForImageTextToText.from_pretrained
    dense, again = load(tmp_path / "dense").state_dict(), load(tmp_path / "pruned").eval()
    changed = {name for name, value in again.state_dict().items() if not torch.equal(value, dense[name])}
    assert changed == set(linears)
    tokens = torch.randint(2, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=tokens).logits, module.eval()(tokens))
    assert json.loads((tmp_path / "pruned" / PROCESSOR_FILES[0]).read_text(encoding="utf-8")) == {"size": 8}
    assert json.loads((tmp_path / "pruned" / "config.json").read_text(encoding="utf-8"))["model_type"] == family


def test_a_soft_cap_in_the_text_tower_is_kept(tmp_path):
    """PaliGemma 2's text tower is a Gemma 2, whose scores have a cap that sdpa leaves out."""
    save_dense("paligemma", tmp_path)
    module = CausalLM(str(tmp_path))
    module.configure_model()
    assert module.model.config.get_text_config()._attn_implementation == "eager"


def test_blocks_that_wait_for_an_image_are_refused(tmp_path):
    """Without an image Mllama passes over its cross-attention."""
    save_dense("mllama", tmp_path)
    module = CausalLM(str(tmp_path))
    module.configure_model()
    with pytest.raises(ValueError, match=r"'mllama' is not in ARCHITECTURES, and could not be discovered.*called block 2"):
        module.find_architecture()


def test_a_language_model_has_no_processor(tiny_model, tmp_path):
    module = CausalLM(tiny_model("llama"))
    module.configure_model()
    module.save(tmp_path)
    assert not any((tmp_path / file).exists() for file in PROCESSOR_FILES)

"""Tiny random models of every language model and vision family, and a quiet Trainer; nothing is downloaded."""

FAMILIES = ("opt", "llama", "mistral", "qwen2", "qwen3")
VOCABULARY = 96

_MIXED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 8}
FURTHER_FAMILIES = {
    "apertus": {},
    "arcee": {},
    "bloom": {},
    "cohere": {"use_qk_norm": True},
    "cohere2": _MIXED,
    "ernie4_5": {},
    "exaone4": _MIXED,
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma": {"head_dim": 16},
    "gemma2": _MIXED | {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8},
    "gemma3_text": _MIXED | {"query_pre_attn_scalar": 8},
    "glm": {},
    "glm4": {},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4, "n_inner": 48},
    "granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "helium": {},
    "hunyuan_v1_dense": {},
    "mpt": {"expansion_ratio": 2},
    "nemotron": {},
    "ministral3": {"rope_parameters": _YARN | {"llama_4_scaling_beta": 0.1}},
    "olmo2": {},
    "olmo3": _MIXED,
    "phi": {},
    "phi3": {},
    "seed_oss": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "starcoder2": {"use_bias": True},
    "stablelm": {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
}
"""Further families of the table, which only their own tests go through -> what sets them apart from LLaMA."""


_PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
_WINDOWS = {"img_size": 32, "window_size": 4, "embed_dim": 32, "depths": (2, 2, 1), "num_heads": (2, 4, 4)}
_CONVS = {"depths": (1, 2, 1, 1), "dims": (32, 32, 48, 48)}
_MAXVIT = {"embed_dim": (32, 48), "depths": (1, 1), "block_type": ("M", "M"), "stem_width": 32, "transformer_dim_head": 16}
DISCOVERED = {
    "beit": ("beit_base_patch16_224", _PLAIN),
    "beitv2": ("beitv2_base_patch16_224", _PLAIN),
    "eva": ("eva_giant_patch14_224", _PLAIN | {"mlp_ratio": 3.0}),
    "eva02": ("eva02_base_patch14_448", _PLAIN),
    "dinov3": ("vit_small_patch16_dinov3", _PLAIN | {"mlp_ratio": 3.0}),
    "swin": ("swin_tiny_patch4_window7_224", _WINDOWS),
    "swinv2": ("swinv2_tiny_window8_256", _WINDOWS),
    "convnext": ("convnext_tiny", _CONVS),
    "convnextv2": ("convnextv2_tiny", _CONVS | {"use_grn": True}),
    "maxvit": ("maxvit_tiny_tf_224", _MAXVIT | {"transformer_window_size": (4, 4), "transformer_grid_size": (4, 4)}),
    "davit": ("davit_tiny", {"depths": (1, 1), "embed_dims": (32, 48), "num_heads": (2, 4), "window_size": 4}),
    "relpos": ("vit_relpos_small_patch16_224", _PLAIN),
    "cait": ("cait_xxs24_224", _PLAIN | {"depth": 6}),
    "xcit": ("xcit_nano_12_p16_224", {"img_size": 32, "embed_dim": 32, "depth": 8, "num_heads": 4}),
}
"""Family of timm without an entry -> name and arguments of a tiny model."""


def tiny_config(family: str):
    """A configuration of two heads more queries than keys (GQA) where the family has it, of three blocks."""
    import transformers

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    if family == "opt":
        return transformers.OPTConfig(**common, ffn_dim=48, word_embed_proj_dim=32, dropout=0.3)
    grouped = common | {"intermediate_size": 48, "num_key_value_heads": 2}
    if family == "llama":
        return transformers.LlamaConfig(**grouped)
    if family == "mistral":
        return transformers.MistralConfig(**grouped, sliding_window=6)
    if family == "qwen2":  # the last block attends in a window, the others do not
        return transformers.Qwen2Config(**grouped, use_sliding_window=True, sliding_window=6, max_window_layers=2)
    if family in FURTHER_FAMILIES:
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1} | FURTHER_FAMILIES[family]
        special |= {"head_dim": 8} if family != "falcon" and "head_dim" not in special else {}
        return transformers.CONFIG_MAPPING[family](**grouped, **special)
    return transformers.Qwen3Config(**grouped, head_dim=16, tie_word_embeddings=True)


def make_model(family: str):
    """A random model whose weights are so large that attention and MLP matter beside the residual."""
    import torch
    import transformers

    torch.manual_seed([*FAMILIES, *FURTHER_FAMILIES].index(family))  # whichever test asks first
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


def make_unprunable():
    """A random RWKV, whose blocks hand on more than hidden states, so that they cannot be run one by one."""
    import transformers

    sizes = {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2, "context_length": 64}
    return transformers.RwkvForCausalLM(transformers.RwkvConfig(vocab_size=VOCABULARY, **sizes)).eval()


_ROUTED = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
_GROUPS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MIXTURES = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": _ROUTED | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": _ROUTED | {"head_dim": 8},
    "olmoe": {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2},
    "granitemoe": {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    "deepseek_v3": _GROUPS | _LATENT | {"moe_intermediate_size": 24, "num_key_value_heads": 4},
}
"""Mixtures of experts -> what their configuration needs."""


def make_mixture(family: str):
    """A random mixture of experts of two blocks, with weights so large that experts matter beside the residual."""
    import torch
    import transformers

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(list(MIXTURES).index(family))
    model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[family](**sizes | MIXTURES[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model.eval()


def make_tokenizer(family: str):
    """A tokenizer of whole words; of characters for Qwen2, for which transformers takes no other class than its own."""
    import tokenizers
    import transformers

    if family == "qwen2":
        return transformers.Qwen2Tokenizer({token: i for i, token in enumerate(["<|endoftext|>", "Ġ", "w", *"0123456789"])})
    words = {"<unk>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def tiny_vit():
    """A PrunableModule around timm's vision transformer of three blocks (fused q, k, v), and batches of random images."""
    import timm
    import torch

    from lightning_modules.base.prunable import PrunableModule

    class TinyViT(PrunableModule):
        family = "vision_transformer"

        def __init__(self):
            super().__init__()
            self.model = timm.models.VisionTransformer(
                img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=4, num_classes=5, qkv_bias=True
            )

        def training_loss(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.model(batch["image"]), batch["label"])

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.training_loss(batch, batch_idx), logger=False)

        def calibration_forward(self, batch):
            self.model(batch["image"])

        def sample_positions(self, batch):
            return batch["index"]

        def configure_optimizers(self):
            return None

        def save(self, directory):
            from safetensors.torch import save_file

            save_file(self.model.state_dict(), directory / "model.safetensors")

    torch.manual_seed(5)
    module = TinyViT()
    with torch.no_grad():
        for parameter in module.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return module


def vision_classifier(family: str):
    """An ImageClassifier around a random model of a family of `DISCOVERED`, in which every parameter matters."""
    import torch

    from lightning_modules import ImageClassifier

    torch.manual_seed(list(DISCOVERED).index(family))
    name, model_args = DISCOVERED[family]
    module = ImageClassifier(name, model_args={"num_classes": 7, **model_args})
    module.configure_model()
    with torch.no_grad():
        for parameter in module.model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 / max(parameter[0].numel(), 1) ** 0.5)
            else:
                parameter.add_(torch.empty_like(parameter).uniform_(0.1, 0.3))
    return module


def tiny_images(count: int, seed: int, size: int = 16):
    """Batches of {"image", "label", "index"} with correlated channels."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=size) + 0.1 * torch.randn(count, 3, size, size, generator=generator)
    labels = torch.randint(5, (count,), generator=generator)
    return [{"image": image, "label": label, "index": i} for i, (image, label) in enumerate(zip(images, labels, strict=True))]


def write_citeseer(folder):
    """Raw files of 700 nodes: 600 for training and validation, 100 from which 3 test indices are missing, as in CiteSeer."""
    import pickle

    import numpy as np
    import scipy.sparse

    rng = np.random.default_rng(0)
    tests = np.setdiff1d(np.arange(600, 700), [610, 620, 630])
    one_hot = np.eye(2)[np.arange(700) % 2]
    words = rng.integers(0, 2, (700, 8)).astype(np.float32)
    words[:, 0] = 1
    parts = {
        "x": scipy.sparse.csr_matrix(words[:40]),
        "allx": scipy.sparse.csr_matrix(words[:600]),
        "tx": scipy.sparse.csr_matrix(words[tests]),
        "y": one_hot[:40],
        "ally": one_hot[:600],
        "ty": one_hot[tests],
        "graph": {i: [i, (i + 1) % 600] for i in range(600)} | {i: [] for i in range(600, 700)},
    }
    masks = {f"{part}_mask": np.arange(700) % 3 == index for index, part in enumerate(("train", "val", "test"))}
    for raw in (folder / "CiteSeer" / "raw", folder / "CiteSeer" / "geom-gcn" / "raw"):
        raw.mkdir(parents=True)
        for name, value in parts.items():
            (raw / f"ind.citeseer.{name}").write_bytes(pickle.dumps(value))
        (raw / "ind.citeseer.test.index").write_text("".join(f"{index}\n" for index in rng.permutation(tests)))
        for fold in range(10):
            turned = {name: np.roll(mask, fold) for name, mask in masks.items()}
            np.savez(raw / f"citeseer_split_0.6_0.2_{fold}.npz", **turned)


def quiet(folder, *callbacks, **options):
    """A Trainer that writes nothing by itself."""
    from lightning.pytorch import Trainer

    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    options = {"enable_checkpointing": False, "max_epochs": 1, "accelerator": "cpu", "devices": 1} | options
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **silent, **options)

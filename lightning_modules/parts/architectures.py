"""Table of model families: the path of their blocks, and the linears that are pruned.

A new family needs one entry here and nothing else; no forward pass is copied. Keys are the ``model_type`` of a Hugging Face
config, and vision_transformer for timm.
"""

from dataclasses import dataclass, field, replace

from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """Names of one model family.

    Attributes:
        blocks: Path of the list of decoder or encoder blocks in the model.
        linears: Paths of the linears to prune, relative to a block.
        projections: Role (q, k, v, o) -> path of the attention projection among the linears.
        attention: Path of the attention module, relative to a block.
        fused: Path -> parts of a linear whose rows are several projections of equal size, one after the other. Each part is
            pruned as a linear of its own, called <path>.<part>. Only for the families of `SPLIT_BY_PROJECTION`.
    """

    blocks: str
    linears: tuple[str, ...]
    projections: dict[str, str] = field(default_factory=dict)
    attention: str = "self_attn"
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class PrunableLinear:
    """A linear that is pruned as one matrix: a whole ``nn.Linear``, or one projection's rows of a fused one."""

    module: nn.Linear
    rows: slice = field(default_factory=lambda: slice(None))

    @property
    def weight(self) -> Tensor:
        """Weight, (O, I), a view into that of the module."""
        return self.module.weight.detach()[self.rows]

    @property
    def in_features(self) -> int:
        """I, number of input channels."""
        return self.module.in_features

    @property
    def out_features(self) -> int:
        """O, number of output channels."""
        return len(range(*self.rows.indices(self.module.out_features)))


LLAMA = Architecture(
    blocks="model.layers",
    linears=(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ),
    projections={role: f"self_attn.{role}_proj" for role in "qkvo"},
)
OPT = Architecture(
    blocks="model.decoder.layers",
    linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"),
    projections={role: f"self_attn.{role}_proj" for role in "qkv"} | {"o": "self_attn.out_proj"},
)
VISION_TRANSFORMER = Architecture(  # timm's
    blocks="blocks",
    linears=("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    projections={role: f"attn.qkv.{role}" for role in "qkv"} | {"o": "attn.proj"},
    attention="attn",
    fused={"attn.qkv": ("q", "k", "v")},
)
TRANSFORMERS_VIT = Architecture(
    blocks="vit.layers",
    linears=(
        "attention.q_proj",
        "attention.k_proj",
        "attention.v_proj",
        "attention.o_proj",
        "mlp.fc1",
        "mlp.fc2",
    ),
    projections={role: f"attention.{role}_proj" for role in "qkvo"},
    attention="attention",
)

ARCHITECTURES: dict[str, Architecture] = {
    "cohere": LLAMA,
    "cohere2": LLAMA,
    "deit": replace(TRANSFORMERS_VIT, blocks="deit.layers"),
    "ernie4_5": LLAMA,
    "exaone4": LLAMA,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "granite": LLAMA,
    "hunyuan_v1_dense": LLAMA,
    "llama": LLAMA,
    "ministral3": LLAMA,
    "mistral": LLAMA,
    "olmo2": LLAMA,
    "olmo3": LLAMA,
    "opt": OPT,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "seed_oss": LLAMA,
    "smollm3": LLAMA,
    "stablelm": LLAMA,
    "vit": TRANSFORMERS_VIT,
    "vision_transformer": VISION_TRANSFORMER,
}

SPLIT_BY_PROJECTION = frozenset({"vision_transformer"})
"""Families whose `fused` linears are known to have all rows of q, then of k, then of v. Many others (GPT-NeoX, Bloom, Falcon)
keep the rows of one head together, which neither shapes nor weights show. Together with a family, add a case to the test of the
rows that attention reads (tests/lightning_modules/parts/test_architectures.py)."""


def find_architecture(model_type: str) -> Architecture:
    """Return the entry of a model family.

    Raises:
        ValueError: If there is none, or if it splits a fused linear of a family whose order of rows is not known.
    """
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"Model type {model_type!r} is not in ARCHITECTURES, which has {', '.join(sorted(ARCHITECTURES))}. Add an entry to "
            "lightning_modules/parts/architectures.py: the path of its list of blocks, the paths of the linears of a block, "
            "and which of these are the q, k, v and o projections."
        )
    architecture = ARCHITECTURES[model_type]
    if architecture.fused and model_type not in SPLIT_BY_PROJECTION:
        raise ValueError(
            f"`fused` of the entry {model_type!r} in ARCHITECTURES splits {', '.join(architecture.fused)} into rows of q, then "
            f"k, then v, which is known to be right for {', '.join(sorted(SPLIT_BY_PROJECTION))} only: GPT-NeoX, Bloom, Falcon "
            "and others interleave them by head. Leave out `fused` and the projections q, k and v, and prune the linear as a "
            "whole with FixedRule and `held: none`."
        )
    return architecture


def find_blocks(model: nn.Module, architecture: Architecture) -> dict[str, nn.Module]:
    """Return full name -> block of a model, in the order of the chain.

    Raises:
        ValueError: If the table's path leads to no list of modules.
    """
    try:
        blocks = model.get_submodule(architecture.blocks)
    except AttributeError as error:
        raise ValueError(
            f"ARCHITECTURES says that the blocks of {type(model).__name__} are at {architecture.blocks!r}, but {error}. "
            "Correct `blocks` of its entry."
        ) from error
    if not isinstance(blocks, nn.ModuleList | nn.Sequential):
        raise ValueError(
            f"ARCHITECTURES says that the blocks of {type(model).__name__} are at {architecture.blocks!r}, but that is a "
            f"{type(blocks).__name__}, not a list of blocks. Correct `blocks` of its entry."
        )
    return {f"{architecture.blocks}.{i}": block for i, block in enumerate(blocks)}


def find_linears(block: nn.Module, architecture: Architecture) -> dict[str, PrunableLinear]:
    """Return name within the block -> prunable linear; a fused linear is split into its parts.

    Raises:
        ValueError: If a name of the table does not exist or is not a plain ``nn.Linear``, or a projection is none of the
            linears.
    """
    linears = {}
    for name in architecture.linears:
        try:
            module = block.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"The block {type(block).__name__} has no {name!r}; see ARCHITECTURES.") from error
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"{name!r} of {type(block).__name__} is a {type(module).__name__}, not a plain nn.Linear. "
                "Load the model without quantisation, adapters or `sparse24`."
            )
        parts = architecture.fused.get(name)
        if parts is None:
            linears[name] = PrunableLinear(module)
            continue
        size, rest = divmod(module.out_features, len(parts))
        if rest:
            raise ValueError(f"{name!r} has {module.out_features} rows, which are not {', '.join(parts)} of one size.")
        for i, part in enumerate(parts):
            linears[f"{name}.{part}"] = PrunableLinear(module, slice(i * size, (i + 1) * size))
    if unknown := set(architecture.projections.values()) - set(linears):
        raise ValueError(
            f"`projections` of {type(block).__name__}'s entry in ARCHITECTURES names {', '.join(sorted(unknown))}, which is "
            f"none of its linears {', '.join(linears)}."
        )
    return linears

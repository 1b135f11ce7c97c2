"""Table of model families: the path of their blocks, and the linears that are pruned.

A new family needs one entry here and nothing else; no forward pass is copied. Keys are the ``model_type`` of a Hugging Face
config, and vision_transformer for timm.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.parts.experts import ExpertLinear, parts_of
from lightning_modules.parts.fused import QKV, Layout, Rows, by_head, by_projection, equal, of_falcon


@dataclass(frozen=True)
class Architecture:
    """Names of one model family.

    Attributes:
        blocks: Path of the list of decoder or encoder blocks in the model; or the paths of all blocks, in their order, if they
            are in no single list.
        linears: Paths of the linears to prune, relative to a block.
        projections: Role (q, k, v, o) -> path of the attention projection among the linears.
        attention: Path of the attention module, relative to a block.
        fused: Path -> layout of a linear whose rows are several projections (lightning_modules.parts.fused). Each part is
            pruned as a linear of its own, called <path>.<part>.
        everywhere: Whether every block has all linears; if not, those that a block lacks are passed over.
        experts: Paths of the experts of mixtures, relative to a block; blocks may lack them.
        uniform: Whether every block returns hidden states of the shape that it takes; false where stages downsample.
    """

    blocks: str | tuple[str, ...]
    linears: tuple[str, ...]
    projections: dict[str, str] = field(default_factory=dict)
    attention: str = "self_attn"
    fused: dict[str, Layout] = field(default_factory=dict)
    everywhere: bool = True
    experts: tuple[str, ...] = ()
    uniform: bool = True


@dataclass(frozen=True, eq=False)
class PrunableLinear:
    """A linear that is pruned as one matrix: a whole module, or one projection's rows of a fused one.

    Args:
        module: ``nn.Linear``; GPT-2's ``Conv1D``, whose weight is transposed; a convolution that is a matrix, see
            `is_matrix_conv`; or a matrix of one expert.
        rows: Outputs of the module that belong to it.
    """

    module: nn.Module
    rows: Rows = field(default_factory=lambda: slice(None))

    @property
    def weight(self) -> Tensor:
        """Weight, (O, I): a view into that of the module, or a copy if its rows do not lie together. Write with `assign`."""
        return self._matrix[self.rows]

    @torch.no_grad()
    def assign(self, weight: Tensor) -> None:
        """Write a weight, (O, I), into the module."""
        if isinstance(self.module, nn.Conv2d):  # not every memory format has a view as a matrix
            self.module.weight.copy_(weight.reshape(self.module.weight.shape))
        else:
            self._matrix[self.rows] = weight.to(self._matrix)

    @torch.no_grad()
    def clear(self, mask: Tensor) -> None:
        """Set weights to 0 where a mask, (O, I), is True, even where they are NaN."""
        if isinstance(self.rows, slice) and not isinstance(self.module, nn.Conv2d):
            self.weight.masked_fill_(mask, 0)
        else:
            self.assign(self.weight.masked_fill(mask, 0))

    def tokens_in(self, x: Tensor) -> Tensor:
        """Return the inputs of the module as the matrix reads them.

        Args:
            x: What the module is called with: (..., I), or (samples, channels, height, width) for a convolution.

        Returns:
            The same, or (samples, positions, I) for a convolution.
        """
        if not isinstance(self.module, nn.Conv2d):
            return x
        (rows, columns), (height, width) = self.module.kernel_size, x.shape[-2:]
        x = x[..., : height // rows * rows, : width // columns * columns]  # what a stride leaves over is not read
        patches = x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def tokens_out(self, y: Tensor) -> Tensor:
        """Return outputs of the matrix with their channels last.

        Args:
            y: (..., O), or (samples, O, height, width) for a convolution.

        Returns:
            The same, or (samples, positions, O) for a convolution.
        """
        return y.flatten(2).mT if isinstance(self.module, nn.Conv2d) else y

    @property
    def is_routed(self) -> bool:
        """Whether it is a matrix of an expert, which reads some of the tokens only."""
        return isinstance(self.module, ExpertLinear)

    @property
    def share_of_tokens(self) -> float:
        """Share of the tokens that it reads: those that are routed to an expert, if all get equally many."""
        return self.module.share_of_tokens if self.is_routed else 1.0

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weight, and perhaps others."""
        return self.module.parameter if self.is_routed else self.module.weight

    @property
    def in_features(self) -> int:
        """I, number of input channels."""
        return self._matrix.shape[1]

    @property
    def out_features(self) -> int:
        """O, number of output channels."""
        rows = self.rows
        return len(range(*rows.indices(len(self._matrix)))) if isinstance(rows, slice) else len(rows)

    @property
    def _matrix(self) -> Tensor:
        weight = self.module.weight.detach()
        if isinstance(self.module, nn.Conv2d):
            return weight.flatten(1)
        return weight.T if is_conv1d(self.module) else weight


def fused_attention(blocks: str, attention: str, qkv: str, o: str, *others: str, layout: Layout) -> Architecture:
    """Return the entry of a family whose q, k and v are one linear.

    Args:
        blocks: Path of the list of blocks.
        attention: Path of the attention module, relative to a block.
        qkv: Name of the fused linear within the attention.
        o: Name of the output projection within the attention.
        others: Paths of the other linears, relative to a block.
        layout: Rows of q, k and v.
    """
    qkv, o = f"{attention}.{qkv}", f"{attention}.{o}"
    projections = {role: f"{qkv}.{role}" for role in QKV} | {"o": o}
    return Architecture(blocks, (qkv, o, *others), projections, attention, {qkv: layout})


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
VISION_TRANSFORMER = fused_attention("blocks", "attn", "qkv", "proj", "mlp.fc1", "mlp.fc2", layout=equal(*QKV))  # timm's
GPT2 = fused_attention("transformer.h", "attn", "c_attn", "c_proj", "mlp.c_fc", "mlp.c_proj", layout=equal(*QKV))
GPT_NEOX = fused_attention(
    "gpt_neox.layers", "attention", "query_key_value", "dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", layout=by_head
)
GPTJ = Architecture(
    blocks="transformer.h",
    linears=("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"),
    projections={role: f"attn.{role}_proj" for role in "qkv"} | {"o": "attn.out_proj"},
    attention="attn",
)
BLOOM = fused_attention(
    "transformer.h", "self_attention", "query_key_value", "dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", layout=by_head
)
MPT = fused_attention("transformer.blocks", "attn", "Wqkv", "out_proj", "ffn.up_proj", "ffn.down_proj", layout=equal(*QKV))
PHI = Architecture(
    blocks="model.layers",
    linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"),
    projections={role: f"self_attn.{role}_proj" for role in "qkv"} | {"o": "self_attn.dense"},
)
PHI3 = Architecture(
    blocks="model.layers",
    linears=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    projections={role: f"self_attn.qkv_proj.{role}" for role in "qkv"} | {"o": "self_attn.o_proj"},
    fused={"self_attn.qkv_proj": by_projection, "mlp.gate_up_proj": equal("gate", "up")},
)
GLM = replace(
    LLAMA,
    linears=(*LLAMA.linears[:4], "mlp.gate_up_proj", "mlp.down_proj"),
    fused={"mlp.gate_up_proj": equal("gate", "up")},
)
STARCODER2 = replace(LLAMA, linears=(*LLAMA.linears[:4], "mlp.c_fc", "mlp.c_proj"))
UP_AND_DOWN = replace(LLAMA, linears=(*LLAMA.linears[:4], "mlp.up_proj", "mlp.down_proj"))
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
    "apertus": UP_AND_DOWN,
    "arcee": UP_AND_DOWN,
    "bloom": BLOOM,
    "cohere": LLAMA,
    "cohere2": LLAMA,
    "deit": replace(TRANSFORMERS_VIT, blocks="deit.layers"),
    "ernie4_5": LLAMA,
    "exaone4": LLAMA,
    "falcon": replace(BLOOM, fused={"self_attention.query_key_value": of_falcon}),
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "glm": GLM,
    "glm4": GLM,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "gptj": GPTJ,
    "granite": LLAMA,
    "helium": LLAMA,
    "hunyuan_v1_dense": LLAMA,
    "llama": LLAMA,
    "ministral3": LLAMA,
    "mistral": LLAMA,
    "mpt": MPT,
    "nemotron": UP_AND_DOWN,
    "olmo2": LLAMA,
    "olmo3": LLAMA,
    "opt": OPT,
    "phi": PHI,
    "phi3": PHI3,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "seed_oss": LLAMA,
    "smollm3": LLAMA,
    "stablelm": LLAMA,
    "starcoder2": STARCODER2,
    "vit": TRANSFORMERS_VIT,
    "vision_transformer": VISION_TRANSFORMER,
}


def find_architecture(model_type: str) -> Architecture:
    """Return the entry of a model family.

    Raises:
        ValueError: If there is none.
    """
    if model_type not in ARCHITECTURES:
        raise without_entry(model_type)
    return ARCHITECTURES[model_type]


def without_entry(model_type: str) -> ValueError:
    """Return the error about a model family that has no entry."""
    return ValueError(
        f"Model type {model_type!r} is not in ARCHITECTURES, which has {', '.join(sorted(ARCHITECTURES))}. Add an entry to "
        "lightning_modules/parts/architectures.py: the path of its list of blocks, the paths of the linears of a block, and "
        "which of these are the q, k, v and o projections."
    )


def find_blocks(model: nn.Module, architecture: Architecture) -> dict[str, nn.Module]:
    """Return full name -> block of a model, in the order of the chain.

    Raises:
        ValueError: If the table's path leads to no list of modules.
    """
    if isinstance(architecture.blocks, tuple):
        return {path: model.get_submodule(path) for path in architecture.blocks}
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


def find_linears(block: nn.Module, architecture: Architecture, config: Any = None) -> dict[str, PrunableLinear]:
    """Return name within the block -> prunable linear; a fused linear is split into its parts.

    Args:
        block: A block.
        architecture: Its family.
        config: Config of the model, which some layouts read.

    Raises:
        ValueError: If a name of the table does not exist or is neither a plain ``nn.Linear`` nor a ``Conv1D``, or a projection
            is none of the linears.
    """
    linears = {}
    present = dict(block.named_modules()) if not architecture.everywhere else None
    for name in architecture.linears:
        if present is not None and name not in present:
            continue
        try:
            module = block.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"The block {type(block).__name__} has no {name!r}; see ARCHITECTURES.") from error
        if not is_matrix(module):
            if isinstance(architecture.blocks, tuple):  # blocks differ: in another one a linear has this name
                continue
            raise ValueError(
                f"{name!r} of {type(block).__name__} is a {type(module).__name__}, not a plain nn.Linear. "
                "Load the model without quantisation, adapters or `compressed`."
            )
        if name not in architecture.fused:
            linears[name] = PrunableLinear(module)
            continue
        try:
            parts = architecture.fused[name](PrunableLinear(module).out_features, config)
        except ValueError as error:
            raise ValueError(f"{name!r} of {type(block).__name__}: {error}, as its entry in ARCHITECTURES says.") from error
        linears |= {f"{name}.{part}": PrunableLinear(module, rows) for part, rows in parts.items()}
    for path, experts in ((path, module) for path, module in block.named_modules() if path in architecture.experts):
        linears |= {f"{path}.{name}": PrunableLinear(module, rows) for name, module, rows in parts_of(experts)}
    unknown = set(architecture.projections.values()) - set(linears)
    if unknown and not isinstance(architecture.blocks, tuple):
        raise ValueError(
            f"`projections` of {type(block).__name__}'s entry in ARCHITECTURES names {', '.join(sorted(unknown))}, which is "
            f"none of its linears {', '.join(linears)}."
        )
    return linears


def is_matrix(module: nn.Module) -> bool:
    """Return whether a module multiplies by one matrix: ``nn.Linear``, ``Conv1D``, or a convolution that `is_matrix_conv`."""
    return isinstance(module, nn.Linear) or is_conv1d(module) or is_matrix_conv(module)


def is_matrix_conv(module: nn.Module) -> bool:
    """Return whether a module is a convolution of disjoint patches, 1x1 or as large as its stride: a matrix (O, C · k · k).

    Subclasses are not, since some change their weight or pad their input.
    """
    if type(module) is not nn.Conv2d or module.groups != 1 or module.padding not in ((0, 0), "valid"):
        return False
    return module.kernel_size == module.stride and module.dilation == (1, 1)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is GPT-2's Conv1D, a linear whose weight is (I, O)."""
    from transformers.pytorch_utils import Conv1D  # not needed for the models of other libraries

    return isinstance(module, Conv1D)

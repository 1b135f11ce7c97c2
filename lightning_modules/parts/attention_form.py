"""Run attention in the model's own form, as it was loaded, or eagerly, so that probabilities exist as a tensor.

Transformers reads the choice from the config that a model's modules share, timm from a flag of each attention module. Both are
restored afterwards, also after an error.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

AttentionForm = Literal["eager", "own"]


@contextmanager
def attention_form(module: nn.Module, form: AttentionForm, required: bool = False) -> Iterator[None]:
    """Let all attention modules within `module` compute in one form, within the context.

    Arguments of blocks that were captured in eager form hold explicit masks, so the blocks can be run in either form. Those
    captured in sdpa form have no mask if it is the causal one, so the blocks cannot be run eagerly.

    Args:
        module: A whole model or one of its parts.
        form: eager, or own for the model's own form.
        required: Whether to refuse a module without any attention whose form can be set. Blocks of BLOOM, GPT-J and MPT are
            such; they compute in the one form that they have.

    Raises:
        ValueError: If it is required and there is none.
    """
    configs = {id(m.config): m.config for m in module.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")}
    flagged = [m for m in module.modules() if isinstance(getattr(m, "fused_attn", None), bool)]
    if required and not configs and not flagged:
        raise ValueError(
            f"{type(module).__name__} has no attention whose form can be chosen: neither a transformers config nor timm's "
            "fused_attn. Use update_rule fixed, outlier or perplexity."
        )
    before = [(config, config._attn_implementation) for config in configs.values()]
    flags = [(attention, attention.fused_attn) for attention in flagged]
    try:
        for config, _ in before:
            config._attn_implementation = "eager" if form == "eager" else _own_implementation(config)
        for attention, fused in flags:
            attention.fused_attn = fused and form == "own"
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
        for attention, fused in flags:
            attention.fused_attn = fused


def _own_implementation(config: Any) -> str:
    """Return the model's own implementation, or an equal one that reads explicit masks, unlike flash and flex attention."""
    # Gemma-2 caps its scores, which sdpa refuses, or ignores in transformers 5.10.
    soft_cap = getattr(config, "attn_logit_softcapping", None)
    return "eager" if config._attn_implementation == "eager" or soft_cap else "sdpa"


class _Softmaxes(TorchDispatchMode):
    """Keeps the results of all softmaxes that are computed while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._softmax.default:
            self.results.append(result)
        return result


def run_attention(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Run an attention module in the model's own form; its output, (samples, tokens, features), is after the projection o."""
    with attention_form(attention, "own"):
        return _first(attention(*args, **kwargs))


def run_attention_eagerly(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Run an attention module eagerly; return its output and the probabilities, (samples, heads, queries, keys).

    Raises:
        RuntimeError: If the module computes no softmax, or more than one, over keys.
    """
    with attention_form(attention, "eager"), _Softmaxes() as softmaxes:
        output = _first(attention(*args, **kwargs))
    if len(softmaxes.results) != 1 or softmaxes.results[0].ndim != 4:
        shapes = [tuple(result.shape) for result in softmaxes.results]
        raise RuntimeError(
            f"{type(attention).__name__} was expected to compute one softmax over (samples, heads, queries, keys) but its "
            f"softmaxes had the shapes {shapes}. Use update_rule fixed, outlier or perplexity."
        )
    return output, softmaxes.results[0]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output

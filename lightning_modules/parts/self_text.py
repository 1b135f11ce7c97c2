"""Text that a language model writes itself: windows of tokens sampled from its distribution, to calibrate without data.

Each window starts with the model's beginning-of-text token, or end of text without one. Tokens are sampled at temperature 1
from the whole vocabulary; those that end a text are left out, so that a window is one text. Each batch of windows is seeded by
itself, so that it does not matter which process writes it, nor what that has written before.
"""

import torch
from torch import Tensor, nn
from transformers import CompileConfig

from utilities.contract import WINDOWS_OF_A_BATCH


@torch.no_grad()
def sample_batch(model: nn.Module, start: int, batch: int, number: int, seq_len: int, seed: int) -> Tensor:
    """Sample a batch of windows from a causal language model of transformers.

    Args:
        model: The model, on its device. Its mode and the random state stay as they are.
        start: Token that every window starts with.
        batch: Number of the batch, from 0.
        number: Number of windows of all batches; each has `WINDOWS_OF_A_BATCH`, the last one what is left.
        seq_len: Number of tokens of a window, the first included.
        seed: Seed of all batches.

    Returns:
        Tokens, (windows of this batch, seq_len), int64, on the CPU.

    Raises:
        ValueError: If there is no such batch, or parts of the model are on different devices.
    """
    first = batch * WINDOWS_OF_A_BATCH
    if not 0 <= first < number:
        raise ValueError(f"Argument `batch` expected to be one of those of {number} windows, from 0, but got {batch}.")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise ValueError(
            "Argument `source` = self needs the whole model on one device, but `offload` keeps blocks in host memory. Write "
            "the text without `offload` first, with `self_file`, on a machine that holds the model."
        )
    device, modes = devices.pop(), {module: module.training for module in model.modules()}
    on_gpu = device.type == "cuda"
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    options |= {"min_new_tokens": seq_len - 1, "max_new_tokens": seq_len - 1}
    if on_gpu:
        # transformers then compiles a step: here for each size of a batch alone. Else a process that has written a full batch
        # would write the last, smaller one with kernels for any size, and these round otherwise.
        options |= {"cache_implementation": "static", "compile_config": CompileConfig(dynamic=False)}
    prompt = torch.full((min(WINDOWS_OF_A_BATCH, number - first), 1), start, device=device)
    model.eval()
    try:
        with torch.random.fork_rng([device] if on_gpu else []):
            torch.manual_seed(seed * number + first)
            return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options).cpu()
    finally:
        for module, mode in modes.items():
            module.training = mode
        if on_gpu:
            torch.cuda.empty_cache()  # of keys and values; what is free decides where hidden states wait


def start_token(model: nn.Module, tokenizer: object) -> int:
    """Return the token that begins a text: beginning of text or, without one, end of text.

    Raises:
        ValueError: If model and tokenizer name neither.
    """
    for name in ("bos_token_id", "eos_token_id"):
        for holder in (tokenizer, getattr(model, "generation_config", None), model.config):
            found = getattr(holder, name, None)
            if found is not None:
                return found[0] if isinstance(found, list) else int(found)
    raise ValueError(
        "Argument `source` = self needs a token that begins a text, but neither tokenizer nor model names one (bos_token_id, "
        "eos_token_id). Set `bos_token_id` in config.json, or give a text as `source`."
    )

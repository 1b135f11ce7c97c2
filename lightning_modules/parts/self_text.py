"""Text that a language model writes itself: windows of tokens sampled from its distribution, to calibrate without data.

Each window starts with the model's beginning-of-text token, or end of text without one. Tokens are sampled at temperature 1
from the whole vocabulary; those that end a text are left out, so that a window is one text. Batches of `WRITTEN_AT_A_TIME`
windows are seeded one by one.
"""

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

WRITTEN_AT_A_TIME = 32
"""Windows of a batch. Fixed, since the batch decides which random numbers a window gets."""


@torch.no_grad()
def sample_windows(model: nn.Module, start: int, number: int, seq_len: int, seed: int) -> Tensor:
    """Sample windows from a causal language model of transformers.

    Args:
        model: The model, on its device. Its mode and the random state stay as they are.
        start: Token that every window starts with.
        number: Number of windows.
        seq_len: Number of tokens of a window, the first included.
        seed: Seed.

    Returns:
        Tokens, (number, seq_len), int64, on the CPU.

    Raises:
        ValueError: If parts of the model are on different devices.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise ValueError(
            "Argument `source` = self needs the whole model on one device, but `offload` keeps blocks in host memory. Write "
            "the text without `offload` first, with `self_file`, on a machine that holds the model."
        )
    device, modes = devices.pop(), {module: module.training for module in model.modules()}
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    options |= {"min_new_tokens": seq_len - 1, "max_new_tokens": seq_len - 1}
    if device.type == "cuda":
        options["cache_implementation"] = "static"  # transformers then compiles a step
    windows = []
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for first in range(0, number, WRITTEN_AT_A_TIME):
                torch.manual_seed(seed * number + first)
                size = min(WRITTEN_AT_A_TIME, number - first)
                prompt = torch.full((size, 1), start, device=device)
                written = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
                windows.append(written.cpu())
                rank_zero_info(f"The model has written {first + size} of {number} windows.")
    finally:
        for module, mode in modes.items():
            module.training = mode
    return torch.cat(windows)


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

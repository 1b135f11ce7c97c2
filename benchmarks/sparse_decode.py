"""Speed of linears with zeros anywhere, and of 2:4 ones, beside dense ones -> results/sparse_decode.csv.

    python -m benchmarks.sparse_decode --part linears     one linear at a time, LLaMA-2-7B's shapes
    python -m benchmarks.sparse_decode --part model       the whole model: tokens/s after a prompt, bytes, and where time goes

Weights are random; zeros are two of every four (2:4), or the smallest of a matrix, which is stored in lanes (unstructured) or
split into a 2:4 one and the rest. All is replayed from CUDA graphs. Linears take turns among enough copies that none is found
in the L2 cache, and dense is measured beside every form in the same process; times are medians. `error` is relative to float64,
`dense_error` what dense has. A model decodes greedily with keys and values in a static cache; a step is compiled as one graph
(`compiled` = whole), as transformers' generate does it, or not (none). merged: linears that share their input are one product,
as in `predict`. auto: each linear as it is fastest with a token for each sequence, as `predict` chooses it. `same_tokens` is
the share of its tokens that are those of the same weights kept dense and apart. On a CPU nothing is captured, and dense linears
are not merged: this only tries the script.
"""

import argparse
import copy
import inspect
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import StaticCache

from benchmarks.cuda_graphs import captured, cold_copies, seconds, wait
from benchmarks.quality import ENVIRONMENT, append, environment
from benchmarks.sparse24 import error, make_24, make_zeros, random_model, shapes, shown
from lightning_modules.parts.compressed_base import CompressedLinear
from lightning_modules.parts.compressed_linears import compress_linears
from lightning_modules.parts.lane_linear import LaneLinear
from lightning_modules.parts.linear24 import Linear24
from lightning_modules.parts.split_linear import SplitLinear

SETTING = ("part", "what", "inputs", "outputs", "tokens", "form", "zeros", "compiled", "layers", "prompt", "dtype", "seed")
MEASURED = ("us", "dense_us", "speedup", "bytes_share", "tokens_s", "gib", "same_tokens", "dense_error", "error")
COLUMNS = (*SETTING, *MEASURED, *ENVIRONMENT)
TOKENS, ZEROS = (1, 2, 4, 8, 16), (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
LINEARS = {"2:4": Linear24, "unstructured": LaneLinear, "2:4 and rest": SplitLinear}
"""Forms of one linear -> their modules."""
FORMS = {
    "dense": 0.0, "2:4": 0.5, "unstructured, 50 %": 0.5, "unstructured, 70 %": 0.7, "auto, 50 %": 0.5, "auto, 70 %": 0.7,
}  # fmt: skip
"""Forms of the whole model -> share of zeros."""
MERGED = ", merged"
"""End of the name of a form whose linears are merged."""
KERNELS, LONGEST_NAME = 14, 90
"""Kernels of a profile that are printed, and characters of a name."""
KEYS = 128
"""Keys of a block of flex_attention's mask."""


def linears(options: argparse.Namespace) -> Iterator[dict]:
    """Rows of every shape, number of tokens, form and share of zeros."""
    for name, (outputs, inputs) in shapes(options.hidden, options.intermediate).items():
        dense = nn.Linear(inputs, outputs, bias=False, device=options.device, dtype=getattr(torch, options.dtype))
        dense.requires_grad_(False).weight.normal_(0, 0.02)
        base = {tokens: timed(dense, tokens) for tokens in options.tokens}
        for form, zeros in [(name, share) for name in options.linears for share in ([0.5] if name == "2:4" else options.zeros)]:
            linear = copy.deepcopy(dense)
            if form == "2:4":
                make_24(linear.weight)
            else:
                make_zeros(linear.weight, zeros)
            compressed = LINEARS[form].from_linear(linear)
            for tokens in options.tokens:
                took = timed(compressed, tokens)
                x = torch.randn(tokens, inputs, device=options.device, dtype=linear.weight.dtype)
                yield {
                    "part": "linears", "what": name, "inputs": inputs, "outputs": outputs, "tokens": tokens, "form": form,
                    "zeros": zeros, "us": 1e6 * took, "dense_us": 1e6 * base[tokens], "speedup": base[tokens] / took,
                    "bytes_share": compressed.nbytes / linear.weight.nbytes, "error": error(compressed(x), x, linear.weight),
                    "dense_error": error(linear(x), x, linear.weight),
                }  # fmt: skip


def timed(module: nn.Module, tokens: int) -> float:
    """Seconds of a product with some tokens."""
    tensor = next(tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point())
    x, turns = torch.randn(tokens, module.in_features, device=tensor.device, dtype=tensor.dtype), cold_copies(module)

    def run() -> None:
        for turn in turns:
            turn(x)

    return seconds(captured(run, tensor.device), tensor.device) / len(turns)


def models(options: argparse.Namespace) -> Iterator[dict]:
    """Rows of the whole model in every form: dense as it is, the others from weights that were made sparse."""
    base = random_model(options, zeros=False)
    prompt = torch.randint(base.config.vocab_size, (options.batch, options.prompt), device=options.device)
    for name in options.forms:
        form = name.removesuffix(MERGED)
        model = copy.deepcopy(base) if name != "dense" else base
        for linear in [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]:
            if form == "2:4":
                make_24(linear.weight)
            elif form != "dense":
                make_zeros(linear.weight, FORMS[form])
        blocks, expected = list(model.model.layers), None
        if name != "dense":
            _, expected = decoded(model, prompt, options)
            run_model = partial(model, input_ids=prompt[:, :2], use_cache=False) if name.endswith(MERGED) else None
            kind = "2:4" if form == "dense" else form.split(",")[0]  # a dense one has no 2:4 linear
            timed_forms = None if kind == "auto" else ("2:4", "lanes")
            compress_linears(blocks, kind, timed=timed_forms, tokens=options.batch, run_model=run_model)
        took, tokens = decoded(model, prompt, options, options.profile)
        kept = [t for block in blocks for m in block.modules() if isinstance(m, nn.Linear | CompressedLinear)
                for t in (*m.parameters(), *m.buffers())]  # fmt: skip
        yield {
            "part": "model", "what": "decoding" + f", {options.attention}" * (options.attention != "sdpa"), "form": name,
            "zeros": FORMS[form], "compiled": "whole" if options.compile else "none", "layers": options.layers,
            "prompt": options.prompt, "tokens": options.batch, "us": 1e6 * took, "tokens_s": options.batch / took,
            "gib": sum(tensor.nbytes for tensor in kept) / 2**30,
            "same_tokens": "" if expected is None else (tokens == expected).double().mean().item(),
        }  # fmt: skip


def decoded(model: nn.Module, prompt: Tensor, options: argparse.Namespace, profiled: bool = False) -> tuple[float, Tensor]:
    """Return the seconds of a step after a prompt, each a replay of one graph, and the tokens."""
    device, (batch, length) = prompt.device, prompt.shape
    cache = StaticCache(config=model.config, max_cache_len=length + options.steps + 5)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    logits = model(input_ids=prompt, use_cache=True, logits_to_keep=1, **{name: cache}).logits
    token, position = logits[:, -1:].argmax(-1), torch.full((1, 1), length, device=device)
    tokens = torch.zeros(options.steps + 8, batch, dtype=torch.long, device=device)
    model.set_attn_implementation(options.attention)
    mask = block_mask(position, length + options.steps + 5) if options.attention == "flex_attention" else None
    torch._dynamo.reset()  # a graph of another model would be tried first, and count as one that has to be compiled anew
    # As `get_compiled_call` of transformers, which keeps it in the model; the CUDA graph is captured here.
    call = torch.compile(model.__call__, fullgraph=True) if options.compile else model

    def run() -> None:
        positions = position.expand(batch, 1)
        found = call(input_ids=token, attention_mask=mask, position_ids=positions, use_cache=True, **{name: cache}).logits
        token.copy_(found[:, -1:].argmax(-1))
        tokens.index_copy_(0, position[0] - length, token.T)
        position.add_(1)

    replay = captured(run, device)
    took = seconds(replay, device, options.steps)
    if profiled and device.type == "cuda":
        profile(replay)
    model.set_attn_implementation("sdpa")  # of the prompt
    return took, tokens[: options.steps].cpu()


def block_mask(position: Tensor, keys: int) -> BlockMask:
    """Return flex_attention's mask of one query at a position, (1, 1), for a static cache of some keys.

    transformers makes one in every step from the length of the first layer's cache. That is a tensor which has grown when
    attention reads it, so that a step would see one key too many.
    """
    blocks = torch.arange(-(-keys // KEYS), dtype=torch.int32, device=position.device)[None, None, None]
    number = torch.full((1, 1, 1), blocks.numel(), dtype=torch.int32, device=position.device)
    seen = {"mask_mod": lambda sequence, head, query, key: key <= position[0, 0], "seq_lengths": (1, keys)}
    return BlockMask.from_kv_blocks(number, blocks, BLOCK_SIZE=KEYS, **seen)


def profile(replay) -> None:
    """Print which kernels of a step take its time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        replay()
        wait()
    for entry in sorted(found.key_averages(), key=lambda entry: -entry.device_time_total)[:KERNELS]:
        print(f"{entry.device_time_total:9.0f} us {entry.count:5d} x {entry.key[:LONGEST_NAME]}", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["linears", "model"], required=True)
    parser.add_argument("--out", type=Path, default=Path("results/sparse_decode.csv"))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="of linears")
    parser.add_argument("--linears", nargs="+", default=LINEARS, choices=LINEARS, help="forms of linears")
    parser.add_argument("--zeros", type=float, nargs="+", default=ZEROS, help="of linears")
    merged = [form + MERGED for form in FORMS]
    usual = [form for form in merged if not form.startswith("auto")]
    parser.add_argument("--forms", nargs="+", default=["dense", *usual], choices=[*FORMS, *merged], help="of the model")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens before decoding")
    parser.add_argument("--batch", type=int, default=1, help="sequences that a model decodes at a time")
    parser.add_argument("--steps", type=int, default=32, help="tokens that are decoded")
    parser.add_argument("--compile", action="store_true", help="compile a step of the model")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "flex_attention"], help="of a step of the model")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    """Measure one part, and append its rows as they come."""
    options = parse()
    torch.manual_seed(0)
    fixed = {"dtype": options.dtype, "seed": 0} | environment()
    for row in linears(options) if options.part == "linears" else models(options):
        print({key: shown(value) for key, value in row.items()}, flush=True)
        append(options.out, {key: shown(value) for key, value in (fixed | row).items()}, COLUMNS)


if __name__ == "__main__":
    main()

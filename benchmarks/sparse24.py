"""Speed of compressed 2:4 linears beside dense ones -> results/sparse24.csv.

    python -m benchmarks.sparse24 --part linears            one linear at a time, LLaMA-2-7B's shapes
    python -m benchmarks.sparse24 --part model              the whole model: prefill, decoding, and generate without any graph
    python -m benchmarks.sparse24 --part tune --tokens 1 16 the fastest configurations of the decoding kernels; writes nothing

Weights are random and made 2:4 by magnitude. Everything but `generate` is replayed from CUDA graphs, so that launches do not
count; linears take turns among enough copies that none is found in the L2 cache. Times are medians. `error` is relative to
float64, `dense_error` what dense has. On a CPU (`--device cpu`) nothing is captured: this only tries the script.
"""

import argparse
import inspect
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.cuda_graphs import captured, cold_copies, seconds, wait
from benchmarks.quality import ENVIRONMENT, append, environment
from benchmarks.sparse24_tuning import tune
from functional.pruning.masks import Pattern, keep_largest_of_groups
from functional.sparse24 import OF_A_PASS
from lightning_modules.parts.compressed_linears import compress_linears
from lightning_modules.parts.linear24 import Linear24

PATTERN = Pattern(2, 4)
WITHOUT_MASK = "sdpa_without_mask"
AttentionInterface.register(WITHOUT_MASK, sdpa_attention_forward)
SETTING = ("part", "what", "inputs", "outputs", "tokens", "batch", "layers", "dtype", "seed")
MEASURED = ("unit", "dense", "compressed", "speedup", "dense_gb_s", "compressed_gb_s", "dense_error", "error")
COLUMNS = (*SETTING, *MEASURED, *ENVIRONMENT)


def make_24(weight: Tensor) -> None:
    """Keep the two largest of every four, in place."""
    for rows in weight.split(1024):  # ranks are int64: not of the whole matrix at once
        rows.mul_(keep_largest_of_groups(rows.abs(), PATTERN))


def shapes(hidden: int, intermediate: int) -> dict[str, tuple[int, int]]:
    """Return the different shapes (outputs, inputs) of the linears."""
    return {"q": (hidden, hidden), "gate": (intermediate, hidden), "down": (hidden, intermediate)}


def make_zeros(weight: Tensor, share: float) -> None:
    """Set the smallest weights of a matrix to zero, in place."""
    magnitude = weight.abs().float().flatten()
    weight[weight.abs() <= magnitude.kthvalue(max(1, int(share * magnitude.numel())))[0]] = 0


def random_linear(outputs: int, inputs: int, options: argparse.Namespace, zeros: float | None = None) -> nn.Linear:
    """Make a linear without bias that is 2:4, or has a share of zeros anywhere."""
    dtype = getattr(torch, options.dtype)
    linear = nn.Linear(inputs, outputs, bias=False, device=options.device, dtype=dtype).requires_grad_(False)
    linear.weight.normal_(0, 0.02)
    if zeros is None:
        make_24(linear.weight)
    else:
        make_zeros(linear.weight, zeros)
    return linear


def error(y: Tensor, x: Tensor, weight: Tensor) -> float:
    """‖y − x Wᵀ‖ / ‖x Wᵀ‖, the product in float64."""
    expected = x.double() @ weight.double().T
    return ((y.double() - expected).norm() / expected.norm()).item()


def measure_linear(name: str, outputs: int, inputs: int, tokens: int, options: argparse.Namespace) -> dict:
    """One shape and number of tokens."""
    device = torch.device(options.device)
    linear = random_linear(outputs, inputs, options)
    x = torch.randn(tokens, inputs, device=device, dtype=linear.weight.dtype)
    compressed = Linear24.from_linear(linear)
    dense_error = error(linear(x), x, linear.weight)
    if tokens > OF_A_PASS and device.type == "cuda":
        compressed.prepare_prefill(tokens)
        print(f"{name}: cuSPARSELt's algorithm, split, kind {compressed.algorithm}", flush=True)
    times = {}
    last: list[Tensor] = []
    for form, module in (("dense", linear), ("compressed", compressed)):
        turns = cold_copies(module)

        def run(turns=turns):
            last[:] = [turn(x) for turn in turns][-1:]

        replay = captured(run, device)
        times[form] = seconds(replay, device) / len(turns)
        del turns, replay
    # `last` is what the compressed form gave, inside the graph: prefill takes another way there than outside.
    row = {"what": name, "inputs": inputs, "outputs": outputs, "tokens": tokens, "unit": "us"}
    row |= {form: 1e6 * value for form, value in times.items()}
    row |= {"speedup": times["dense"] / times["compressed"]}
    if tokens <= OF_A_PASS:
        row["dense_gb_s"] = linear.weight.nbytes / times["dense"] / 1e9
        row["compressed_gb_s"] = compressed.nbytes / times["compressed"] / 1e9
    return row | {"dense_error": dense_error, "error": error(last[0], x, linear.weight)}


def random_model(options: argparse.Namespace, zeros: bool = True) -> nn.Module:
    """LLaMA-2-7B's shape, or a smaller one, 2:4 in its blocks unless they shall have no zeros."""
    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=options.intermediate, num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 128), vocab_size=32000 if options.hidden >= 1024 else 128,
        max_position_embeddings=4096,
    )  # fmt: skip
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype), attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    for linear in linears_of(model) if zeros else ():
        make_24(linear.weight)
    return model


def linears_of(model: nn.Module) -> list[nn.Module]:
    """Return the linears of the blocks, dense or compressed."""
    return [module for module in model.model.layers.modules() if isinstance(module, nn.Linear | Linear24)]


def prefill(model: nn.Module, prompt: Tensor) -> tuple[float, Tensor]:
    """Return the seconds of a prompt, and the logits of its last token."""
    found: list[Tensor] = []
    # While a graph is captured transformers cannot see that the mask is plainly causal, and would make one, which is slow.
    model.set_attn_implementation(WITHOUT_MASK)

    def run():
        found[:] = [model(input_ids=prompt, use_cache=False, logits_to_keep=1).logits]

    took = seconds(captured(run, prompt.device), prompt.device, 10)
    model.set_attn_implementation("sdpa")
    return took, found[0][:, -1].float()


def decoding(model: nn.Module, prompt: Tensor, steps: int) -> float:
    """Seconds of a step after a prompt, every step a replay of one graph: greedy, keys and values in a static cache."""
    device, length = prompt.device, prompt.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=length + steps + 3)  # 3: before the first that is timed
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    logits = model(input_ids=prompt, use_cache=True, logits_to_keep=1, **{name: cache}).logits
    token = logits[:, -1:].argmax(-1)
    position = torch.full((1, 1), length, device=device)

    def run():
        found = model(input_ids=token, position_ids=position, use_cache=True, **{name: cache}).logits
        token.copy_(found[:, -1:].argmax(-1))
        position.add_(1)

    return seconds(captured(run, device), device, steps)


def generating(model: nn.Module, prompt: Tensor, steps: int) -> float:
    """Seconds of a token with transformers' generate as it is: no graph, a growing cache; the prompt's time taken off."""
    times = []
    for count in (1, 1, 1 + steps):
        wait()
        start = time.perf_counter()
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
        wait()
        times.append(time.perf_counter() - start)
    return (times[2] - times[1]) / steps


def measure_model(options: argparse.Namespace) -> list[dict]:
    """Every quantity of the whole model, dense and then compressed."""
    device = torch.device(options.device)
    model = random_model(options)
    prompts = {batch: torch.randint(model.config.vocab_size, (batch, options.prompt), device=device) for batch in options.batch}
    found: dict[tuple, dict[str, float]] = {}
    logits = {}
    for form in ("dense", "compressed"):
        if form == "compressed":
            compress_linears(list(model.model.layers))
        note(found, ("memory of the linears", "GiB", 0, 0), form, memory(model))
        for batch, prompt in prompts.items():
            step = decoding(model, prompt, options.steps)
            note(found, ("decoding", "tokens/s", options.prompt, batch), form, batch / step)
            step = generating(model, prompt, options.steps)
            note(found, ("generate, no graph", "tokens/s", options.prompt, batch), form, batch / step)
        if form == "compressed" and device.type == "cuda":
            for linear in linears_of(model):
                linear.prepare_prefill(options.prompt)
            note(found, ("memory of the linears, with prefill", "GiB", 0, 0), form, memory(model))
        prompt = prompts[min(prompts)][:1]
        took, logits[form] = prefill(model, prompt)
        note(found, ("prefill", "tokens/s", options.prompt, 1), form, options.prompt / took)
    distance = ((logits["compressed"] - logits["dense"]).norm() / logits["dense"].norm()).item()
    print(f"logits of the prompt: relative difference of dense and compressed {distance:.2e}", flush=True)
    rows = []
    for (what, unit, tokens, batch), values in found.items():
        row = {"what": what, "unit": unit, "tokens": tokens or "", "batch": batch or "", "layers": options.layers} | values
        if unit != "GiB":
            row["speedup"] = values["compressed"] / values["dense"]
        rows.append(row | ({"error": distance} if what == "prefill" else {}))
    return rows


def memory(model: nn.Module) -> float:
    """GiB of the linears of the blocks."""
    return sum(t.nbytes for linear in linears_of(model) for t in (*linear.parameters(), *linear.buffers())) / 2**30


def note(found: dict, key: tuple, form: str, value: float) -> None:
    """Keep and print a number."""
    found.setdefault(key, {})[form] = value
    print(f"{key[0]}, batch {key[3]}, {form}: {value:.4g} {key[1]}", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["linears", "model", "tune"], required=True)
    parser.add_argument("--out", type=Path, default=Path("results/sparse24.csv"))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 2048], help="of linears and tune")
    parser.add_argument("--shapes", nargs="+", default=["q", "gate", "down"], choices=["q", "gate", "down"])
    parser.add_argument("--prompt", type=int, default=2048, help="tokens before decoding, and of prefill")
    parser.add_argument("--steps", type=int, default=32, help="tokens that are decoded")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--zeros", type=float, help="of tune: zeros anywhere, so that there is a rest; 2:4 if left out")
    parser.add_argument(
        "--seconds", type=float, default=20, help="of tune, for each shape and number of tokens, after compiling"
    )
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    """Measure one part, and append its rows."""
    options = parse()
    torch.manual_seed(0)
    wanted = {name: shape for name, shape in shapes(options.hidden, options.intermediate).items() if name in options.shapes}
    fixed = {"part": options.part, "dtype": options.dtype, "seed": 0} | environment()
    if options.part == "model":
        rows = measure_model(options)
    else:
        rows = []
        for tokens in options.tokens:
            for name, (outputs, inputs) in wanted.items():
                if options.part == "tune" and tokens > OF_A_PASS:
                    print(f"{name}, {tokens} tokens: more than a pass takes", flush=True)
                elif options.part == "tune":
                    tune(random_linear(outputs, inputs, options, options.zeros), name, tokens, options.seconds)
                else:
                    rows.append(measure_linear(name, outputs, inputs, tokens, options))
                    print({key: shown(value) for key, value in rows[-1].items()}, flush=True)
    for row in rows:
        append(options.out, {key: shown(value) for key, value in (fixed | row).items()}, COLUMNS)


def shown(value: object) -> object:
    """Five digits."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()

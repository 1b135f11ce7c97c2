"""Prune a model whose checkpoint is larger than the memory that the process may take -> results/streaming.csv.

    python -m benchmarks.larger_than_memory --shape llama-4gb --limit-gib 2
    python -m benchmarks.larger_than_memory --shape llama-2-13b --limit-gib 12 --method d2_sparsegpt --samples 32 \\
        --seq-len 2048 --streamed-only                                                  on a GPU

The checkpoint is random and written block by block. It is pruned with `stream` in a new process, which may allocate so much on
top of what it has once everything is imported (RLIMIT_DATA), and without `stream` and limit in another one. `peak_rss_gib` is
VmHWM of the process, pages of files that it has just read included. `same_weights`: whether both give the same bits.
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.quality import ENVIRONMENT, append, environment
from callbacks import BlockwisePruning
from datamodules.text import Windows
from lightning_modules import CausalLM
from lightning_modules.parts.shards import Shards, find_shards, write_index
from utilities.digest import digest

SHAPES = {
    "llama-4gb": LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=160, num_attention_heads=16,
                             num_key_value_heads=8, vocab_size=32000),  # deep and narrow, so that two cores are enough
    "llama-2-7b": LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                              vocab_size=32000),
    "llama-2-13b": LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
                               vocab_size=32000),
    "llama-2-70b": LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                               num_key_value_heads=8, vocab_size=32000),
}  # fmt: skip
DTYPE = torch.bfloat16
GIB = 2**30
COLUMNS = ("shape", "blocks", "parameters", "dtype", "checkpoint_gib", "method", "seq_len", "samples", "limit_gib",
           "peak_rss_gib", "imported_gib", "seconds", "peak_gpu_gib", "in_memory_peak_rss_gib", "in_memory_seconds",
           "in_memory_peak_gpu_gib", "same_weights", "threads", *ENVIRONMENT)  # fmt: skip


def write_random(config: LlamaConfig, directory: Path) -> tuple[int, int]:
    """Write a random checkpoint that is never in memory as a whole: a file for each block, and one for the rest.

    Returns:
        Number of parameters, and of their bytes.
    """
    directory.mkdir()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        block = ".".join(name.split(".")[:3]) if ".layers." in name else "rest"
        parts.setdefault(block, {})[name] = parameter
    files: dict[str, str] = {}
    for number, (block, parameters) in enumerate(parts.items()):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: random_like(parameter) for name, parameter in parameters.items()}, directory / file, {"format": "pt"})
        files |= dict.fromkeys(parameters, file)
        print(f"{file}: {block}", flush=True)
    size = sum(parameter.nbytes for parameter in model.parameters())
    write_index(directory, files, {"total_size": size})
    config.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters()), size


def random_like(parameter: torch.Tensor) -> torch.Tensor:
    """Return ones for a norm, and else small random weights; a GPU makes them sooner."""
    shape, device = parameter.shape, "cuda" if torch.cuda.is_available() else "cpu"
    if len(shape) == 1:
        return torch.ones(shape, dtype=DTYPE)
    return torch.randn(shape, dtype=DTYPE, device=device).mul_(0.02).cpu()


def prune(
    model: str, output: str, stream: bool, method: str, windows: tuple[int, int], limit: float | None
) -> dict[str, float]:
    """Prune to half of the weights.

    Args:
        model: Directory of the checkpoint.
        output: Directory of the pruned model.
        stream: Whether blocks stay in their files.
        method: Method of `BlockwisePruning`.
        windows: Number of windows, and their length in tokens; they are random.
        limit: GiB that this process may allocate on top of what it has by now; None for no limit.

    Returns:
        Seconds, and GiB of memory before and at the peak, and of a GPU's at the peak.
    """
    imported = status("VmRSS")
    if limit is not None:
        most = int(status("VmData") * GIB + limit * GIB)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    seed_everything(0, verbose=False)
    module = CausalLM(model, stream=stream)
    tokens = torch.randint(json.loads(Path(model, "config.json").read_text(encoding="utf-8"))["vocab_size"], windows)
    callback = BlockwisePruning(method, 0.5, output_dir=output)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="auto", devices=1, callbacks=[callback], limit_val_batches=0, default_root_dir=Path(output).parent, **quiet
    )
    start = time.perf_counter()
    trainer.fit(module, DataLoader(Windows(tokens), batch_size=4))
    found = {"seconds": time.perf_counter() - start, "imported_gib": imported}
    found["peak_rss_gib"] = max(status("VmHWM"), imported)  # the kernel may be a little late with the former
    return found | ({"peak_gpu_gib": torch.cuda.max_memory_allocated() / GIB} if torch.cuda.is_available() else {})


def status(name: str) -> float:
    """Return an entry of /proc/self/status in GiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")) / GIB


def in_a_process(*arguments: object) -> dict[str, float]:
    """Run `prune` in a new process."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # large tensors have no gaps between them, which RLIMIT_DATA would count
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(prune, *arguments).result()


def digest_of(directory: Path) -> str:
    """Return the digest of all tensors of a directory, read one by one."""
    shards = Shards(find_shards(directory))
    return digest((name, shards.read([name], DTYPE)[0]) for name in sorted(shards.names))


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """Measure one shape, and return a row."""
    config = SHAPES[options.shape]
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    parameters, size = write_random(config, scratch / "dense")
    given = options.method, (options.samples, options.seq_len)
    streamed = in_a_process(str(scratch / "dense"), str(scratch / "streamed"), True, *given, options.limit_gib)
    print(streamed, flush=True)
    row: dict[str, object] = {"shape": options.shape, "blocks": config.num_hidden_layers, "parameters": parameters}
    row |= {"dtype": str(DTYPE).removeprefix("torch."), "checkpoint_gib": size / GIB, "method": options.method}
    row |= {"seq_len": options.seq_len, "samples": options.samples, "limit_gib": options.limit_gib} | streamed
    if not options.streamed_only:
        whole = in_a_process(str(scratch / "dense"), str(scratch / "in memory"), False, *given, None)
        row |= {f"in_memory_{name}": whole[name] for name in whole if name != "imported_gib"}
        row["same_weights"] = digest_of(scratch / "streamed") == digest_of(scratch / "in memory")
    return row


def main() -> None:
    """Measure one shape, and append a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-4gb")
    parser.add_argument("--layers", type=int, help="fewer blocks than the shape has")
    parser.add_argument("--limit-gib", type=float, required=True, help="what the streamed run may allocate")
    parser.add_argument("--method", default="wanda", choices=["wanda", "sparsegpt", "d2_sparsegpt"])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--streamed-only", action="store_true", help="no run in memory beside it")
    parser.add_argument("--scratch", type=Path, help="where checkpoint and results lie for the time being")
    parser.add_argument("--out", type=Path, default=Path("results/streaming.csv"))
    options = parser.parse_args()
    facts = environment() | {"threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        row = measure(options, Path(folder)) | facts
    row = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
    append(options.out, row, COLUMNS)
    print(row)


if __name__ == "__main__":
    main()

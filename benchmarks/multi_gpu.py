"""The same commands on one device and on several: time, memory, and whether they give the same -> results/multi_gpu.csv.

    python -m benchmarks.multi_gpu --scratch /dev/shm/multi --parts llama csg2l deit
    python -m benchmarks.multi_gpu --scratch /dev/shm/multi --parts prune validate kill --model MODEL --source TEXT

    llama      a random model of LLaMA-2-7B's shape, 128 windows of 2048 tokens: time of each phase, memory, masks, weights
    prune      a real model: perplexity before and after
    validate   the same, of a pruned model, by `train.py validate`
    kill       SIGKILL of the last rank in the middle; then the same command again
    csg2l      loss curve of configs/csg2l/digits.yaml
    deit       loss curve and weights of a DeiT, the global batch the same

Everything but `deit` runs train.py as a user does, `--trainer.strategy ddp` on more than one device.
"""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from safetensors import safe_open

from benchmarks.quality import ENVIRONMENT, append, environment

COLUMNS = ("part", "model", "devices", "quantity", "value", "unit", "seq_len", "samples", "seed", *ENVIRONMENT)
PHASES = ("statistics", "solve", "rule")
QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")
SECONDS_TO_END = 120


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=["llama", "csg2l", "deit"])
    parser.add_argument("--devices", nargs="+", type=int, default=[1, max(torch.cuda.device_count(), 2)])
    parser.add_argument("--scratch", type=Path, required=True, help="folder for models, some 15 GB; in memory it is fastest")
    parser.add_argument("--layers", type=int, default=12, help="blocks of the random model")
    parser.add_argument("--hidden", type=int, default=4096, help="of the random model")
    parser.add_argument("--model", help="for prune, validate and kill")
    parser.add_argument("--source", help="text file for them")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("results/multi_gpu.csv"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        train_deit(options.scratch, options.devices[0])
        return
    options.scratch.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        PARTS[part](options)


class Rows:
    """Takes what is measured."""

    def __init__(self, part: str, model: str, options: argparse.Namespace, **sizes: int) -> None:
        self._out = options.out
        sizes = {"seq_len": options.seq_len, "samples": options.samples, "seed": 0} | sizes
        self._fixed = {"part": part, "model": model} | sizes | environment()

    def add(self, devices: int, unit: str = "", **quantities: float) -> None:
        """Return a row for each quantity."""
        for name, value in quantities.items():
            value = f"{value:.8g}" if isinstance(value, float) else value
            append(self._out, self._fixed | {"devices": devices, "quantity": name, "value": value, "unit": unit}, COLUMNS)
            print(self._fixed["part"], f"{devices} devices:", name, value, unit, flush=True)


def command(verb: str, config: str, devices: int, *arguments: str | Path) -> list[str]:
    """Return a command line of train.py."""
    strategy = "ddp" if devices > 1 else "auto"
    where = ("--trainer.devices", str(devices), "--trainer.strategy", strategy)
    return [sys.executable, "train.py", verb, "--config", config, *where, *QUIET, *map(str, arguments)]


def run(line: list[str], log: Path) -> None:
    """Run to the end; its output goes to a file.

    Raises:
        RuntimeError: With the end of its output, if it fails.
    """
    with log.open("w") as file:
        code = subprocess.run(line, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise RuntimeError(f"{' '.join(line)} ended with {code}:\n{log.read_text()[-3000:]}")


def pruning(options: argparse.Namespace, config: str, model: str, source: str, devices: int, *more: str | Path) -> list[str]:
    """Return a command line that prunes."""
    sizes = ("--data.seq_len", options.seq_len, "--data.num_calibration", options.samples, "--data.num_heldout", 16)
    # One size of batches whatever the number of devices: kernels are chosen by it, and round differently.
    batches = ("--data.batch_size", options.batch_size)
    data = ("--data.source", source, "--data.sampling", "joined", "--data.test_source", "null", *batches)
    return command("fit", config, devices, "--model.model_name_or_path", model, *data, *sizes, *more)


RULES = {
    "v held": ("--trainer.callbacks.update_rule", "FixedRule", "--trainer.callbacks.update_rule.held", "v"),
    "attention rule": (),
}


def llama(options: argparse.Namespace) -> None:
    """Phases, memory, masks and weights of a random model of LLaMA-2-7B's shape."""
    model, text = random_llama(options.scratch, options.layers, options.hidden, options.seq_len * (options.samples + 64))
    for rule, setting in RULES.items():
        rows, folders = Rows("llama", f"llama-2-7b shape, {options.layers} blocks, {rule}", options), {}
        for devices in options.devices:
            folders[devices] = options.scratch / f"llama_{devices}"
            placed = ("--trainer.callbacks.output_dir", folders[devices], "--trainer.callbacks.resume", "false", *setting)
            quiet = ("--trainer.logger", "false", "--trainer.limit_val_batches", 0)
            line = pruning(options, "configs/d2prune/llama-2-7b.yaml", str(model), str(text), devices, *placed, *quiet)
            run(line, options.scratch / f"llama_{devices}.log")
            report = json.loads((folders[devices] / "pruning.json").read_text())
            typical = report["blocks"][1:]
            times = {name: median(block[f"seconds_{name}"] for block in typical) for name in PHASES}
            rows.add(devices, "s, median of blocks", **times, block=sum(times.values()))
            rows.add(devices, "s", whole_run=report["seconds"])
            rows.add(devices, "GiB", peak_memory_of_a_device=max(block["peak_memory_gib"] for block in report["blocks"]))
            if devices != options.devices[0]:
                rows.add(devices, **compare(folders[options.devices[0]], folders[devices]))


def prune(options: argparse.Namespace) -> None:
    """Perplexity of a real model."""
    rows, folders = Rows("prune", Path(options.model).stem, options), {}
    for devices in options.devices:
        folders[devices] = options.scratch / f"prune_{devices}"
        placed = ("--trainer.callbacks.output_dir", folders[devices], "--trainer.logger", "false")
        config = "configs/d2prune/smollm2-135m.yaml"
        run(pruning(options, config, options.model, options.source, devices, *placed), options.scratch / f"prune_{devices}.log")
        report = json.loads((folders[devices] / "pruning.json").read_text())
        metrics = report["metrics"]
        rows.add(devices, **{f"perplexity_{state}": metrics[state]["val/perplexity"] for state in ("dense", "pruned")})
        rows.add(devices, "s", whole_run=report["seconds"])
        if devices != options.devices[0]:
            rows.add(devices, **compare(folders[options.devices[0]], folders[devices]))


def validate(options: argparse.Namespace) -> None:
    """`train.py validate` of what `prune` has left."""
    rows = Rows("validate", Path(options.model).stem, options)
    for devices in options.devices:
        logs = options.scratch / f"validate_{devices}"
        data = ("--data.source", options.source, "--data.sampling", "joined", "--data.seq_len", options.seq_len)
        data = (*data, "--data.num_heldout", 15)  # which two do not share evenly
        logger = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", logs)
        model = ("--model.model_name_or_path", options.scratch / f"prune_{options.devices[0]}")
        line = command("validate", "configs/d2prune/smollm2-135m.yaml", devices, *model, *data, *logger)
        run([*line, "--trainer.callbacks", "[]"], options.scratch / f"validate_{devices}.log")
        rows.add(devices, **{"perplexity_of_15_windows": float(curve(logs, "val/perplexity")[-1])})


def kill(options: argparse.Namespace) -> None:
    """Kill a rank when half of the blocks are done; the same command must then end with the weights of `prune`."""
    devices = options.devices[-1]
    rows, output = Rows("kill", Path(options.model).stem, options), options.scratch / "killed"
    placed = ("--trainer.callbacks.output_dir", output, "--trainer.logger", "false", "--trainer.callbacks.resume", "true")
    line = pruning(options, "configs/d2prune/smollm2-135m.yaml", options.model, options.source, devices, *placed)
    state, log = output.with_name("killed.state"), options.scratch / "killed.log"
    with log.open("w") as file:
        process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT)
        while len(list(state.glob("[0-9]*.safetensors"))) < 12 and process.poll() is None:
            time.sleep(0.02)
        for child in children(process.pid):
            os.kill(child, signal.SIGKILL)
        killed = time.monotonic()
        try:
            code = process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            code = "hangs"
    rows.add(devices, **{"exit_code_of_the_job": code, "finished_blocks": len(list(state.glob("[0-9]*.safetensors")))})
    rows.add(devices, "s", from_kill_to_end=time.monotonic() - killed)
    run(line, options.scratch / "resumed.log")
    whole = options.scratch / f"prune_{devices}" / "model.safetensors"
    same = whole.read_bytes() == (output / "model.safetensors").read_bytes()
    rows.add(devices, bits_of_the_uninterrupted_run=str(same))


def csg2l(options: argparse.Namespace) -> None:
    """Loss curve of the whole graph, which every rank computes."""
    rows, losses = Rows("csg2l", "configs/csg2l/digits.yaml", options, seq_len="", samples=""), {}
    for devices in options.devices:
        logs = options.scratch / f"csg2l_{devices}"
        logger = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", logs, "--trainer.max_epochs", 60)
        line = command("fit", "configs/csg2l/digits.yaml", devices, *logger, "--trainer.default_root_dir", logs)
        run(line, options.scratch / f"csg2l_{devices}.log")
        losses[devices] = curve(logs, "train/loss")
        rows.add(devices, epochs=len(losses[devices]), last_loss=losses[devices][-1], last_val=curve(logs, "val/accuracy")[-1])
        if devices != options.devices[0]:
            rows.add(devices, largest_relative_difference_of_losses=difference(losses[options.devices[0]], losses[devices]))


def deit(options: argparse.Namespace) -> None:
    """Training steps of a DeiT on scikit-learn's digits: each rank has its share of every batch.

    In float64: AdamW moves a weight whose gradient is nothing but rounding as far as any other, which float32 shows at once.
    """
    rows, losses, weights = Rows("deit", "deit_tiny, 6 blocks of 96", options, seq_len="", samples=""), {}, {}
    for devices in options.devices:
        logs = options.scratch / f"deit_{devices}"
        port = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
        launcher = [sys.executable, "-m", "torch.distributed.run", *port, "--nproc-per-node", str(devices)]
        worker = ["-m", "benchmarks.multi_gpu", "--worker", "--scratch", str(logs), "--devices", str(devices)]
        run([*launcher, *worker], options.scratch / f"deit_{devices}.log")
        losses[devices], weights[devices] = curve(logs, "val/loss"), torch.load(logs / "weights.pt", weights_only=True)
        rows.add(devices, epochs=len(losses[devices]), last_val_loss=losses[devices][-1])
        if devices != (first := options.devices[0]):
            rows.add(devices, largest_relative_difference_of_losses=difference(losses[first], losses[devices]))
            distance = (weights[devices] - weights[first]).norm() / weights[first].norm()
            rows.add(devices, relative_difference_of_weights=float(distance))


def train_deit(folder: Path, devices: int) -> None:
    """Do the work of one process of `deit`."""
    from lightning.pytorch import Trainer, seed_everything
    from lightning.pytorch.loggers import CSVLogger
    from sklearn.datasets import load_digits
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    from lightning_modules import ImageClassifier

    class Images(TensorDataset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return {"image": image, "label": label, "index": index}

    seed_everything(0, verbose=False)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1) / 8 - 1
    data = Images(images[:1536], torch.tensor(digits.target[:1536]))
    sizes = {"img_size": 8, "patch_size": 2, "embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 10}
    module = ImageClassifier("deit_tiny_patch16_224", model_args=sizes)
    # Lightning's own sampler would shuffle, and one device would see other batches.
    sampler = DistributedSampler(data, devices, int(os.environ.get("RANK", "0")), shuffle=False)
    loaders = [DataLoader(data, batch_size=128 // devices, sampler=sampler) for _ in range(2)]
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    strategy, logger = "ddp" if devices > 1 else "auto", CSVLogger(folder)
    options = {"precision": "64-true", "use_distributed_sampler": False, "num_sanity_val_steps": 0}
    trainer = Trainer(max_epochs=8, devices=devices, strategy=strategy, logger=logger, **options, **quiet)
    trainer.fit(module, *loaders)
    if trainer.is_global_zero:
        torch.save(torch.cat([p.detach().flatten().cpu() for p in module.parameters()]), folder / "weights.pt")


def compare(first: Path, second: Path) -> dict[str, float]:
    """Compare two pruned models: the share of equal mask entries, and the relative distance of all pruned weights."""
    equal = entries = square = norm = 0.0
    for path in sorted(first.glob("*.safetensors")):
        with safe_open(path, "pt") as one, safe_open(second / path.name, "pt") as other:
            names = one.keys()  # no dict, for which looking into it would do
            for name in (name for name in names if name.endswith("proj.weight")):
                a, b = one.get_tensor(name), other.get_tensor(name)
                equal, entries = equal + float(((a != 0) == (b != 0)).sum()), entries + a.numel()
                square, norm = square + float((a.float() - b.float()).square().sum()), norm + float(a.float().square().sum())
    return {"equal_mask_entries": equal / entries, "relative_difference_of_weights": (square / norm) ** 0.5}


def random_llama(scratch: Path, layers: int, hidden: int, words: int) -> tuple[Path, Path]:
    """Directory of a random float16 model with a tokenizer of whole words, and a text of random words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    folder, text = scratch / "random_llama", scratch / "random.txt"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers, num_attention_heads=hidden // 128
        )
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
        tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    text.write_text(" ".join(f"w{i}" for i in torch.randint(2, 32000, (words,), generator=generator).tolist()))
    return folder, text


def curve(logs: Path, name: str) -> list[float]:
    """Values of a metric in the newest metrics.csv below a folder."""
    newest = max(logs.rglob("metrics.csv"), key=lambda path: path.stat().st_mtime)
    with newest.open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def difference(first: list[float], second: list[float]) -> float:
    """Largest relative difference of two curves of one length."""
    return max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))


def children(parent: int) -> list[int]:
    """Processes that a process has started and that are Python's: the other ranks."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = stat.read_text().split("(", 1)[1].rsplit(")", 1)
        except OSError:
            continue
        if int(fields.split()[1]) == parent and name.startswith(("python", "pt_main")):
            found.append(int(stat.parent.name))
    return found


PARTS = {"llama": llama, "prune": prune, "validate": validate, "kill": kill, "csg2l": csg2l, "deit": deit}

if __name__ == "__main__":
    main()

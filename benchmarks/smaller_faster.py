"""Is a pruned model smaller, is it faster, is it still good? -> rows of results/smaller_faster.csv.

    python -m benchmarks.smaller_faster --wikitext ../shared/data/wikitext-2 --targets 0.7 2:4 --device cuda --dtype bfloat16
    python -m benchmarks.smaller_faster --wikitext ../shared/data/wikitext-2 --targets 0.7 2:4 --device cpu --dtype float32

Everything goes through train.py, as a user runs it: `fit` with configs/best.yaml prunes and saves compressed weights,
`lightning_modules.expand` makes the plain directory, `predict` continues windows of 128 tokens by 128 greedy ones, one window
at a time, and `test` gives the perplexity. Each command is a process of its own, which a callback, `Meter`, observes.

`disk_bytes` are those of the weights' files, `memory_bytes` those of all parameters and buffers while text is written,
embeddings included, and `linear_bytes` those of the pruned linears. `tokens_s` is the median over windows after the first ones;
loading does not count, the prompt does. `static_cache`: as in CausalLM, which on a GPU lets transformers compile the step.
`same_text` is the share of windows with the same continuation as the plain directory gives.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.markdown import ROOT
from benchmarks.quality import ENVIRONMENT, SMOLLM2, append, environment, finished, plain_wikitext
from lightning_modules import CausalLM
from lightning_modules.parts.compressed_base import CompressedLinear
from lightning_modules.parts.fastest_form import device_name
from lightning_modules.parts.merged_linears import MergedPart

KEYS = ("model", "dtype", "target", "form", "device", "static_cache", "threads", "seq_len", "samples", "windows", "prompt",
        "steps", "seed")  # fmt: skip
MEASURED = ("disk_bytes", "memory_bytes", "linear_bytes", "linears", "tokens_s", "least_tokens_s", "same_text", "perplexity")
COLUMNS = (*KEYS, *MEASURED, *ENVIRONMENT)
HELDOUT = 16
"""Windows of the calibration text that nothing is calibrated on, as in benchmarks/joint.py."""
WARM_UP, TIMED = 2, 3
"""Windows that `predict` continues before the clock counts, as compiled steps come with the second one, and after."""
QUIET = ["--trainer.enable_progress_bar", "false"]


class Meter(Callback):
    """Observe `predict` or `test`, and write what was found as JSON.

    Args:
        path: File that is written.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._found: dict[str, Any] = {"seconds": [], "texts": []}
        self._start = 0.0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count bytes, and let every continuation have all of its tokens."""
        pl_module.model.generation_config.eos_token_id = None
        self._found |= sizes_of(pl_module)

    def on_predict_batch_start(self, *args: object, **kwargs: object) -> None:
        """Start the clock."""
        self._start = now()

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: object) -> None:
        """Stop the clock."""
        self._found["seconds"].append(now() - self._start)
        self._found["texts"] += outputs

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was found."""
        self.path.write_text(json.dumps(self._found), encoding="utf-8")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the perplexity."""
        found = {"perplexity": trainer.callback_metrics["test/perplexity"].item()}
        self.path.write_text(json.dumps(found), encoding="utf-8")


def now() -> float:
    """Return the time in seconds, once the GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def sizes_of(module: CausalLM) -> dict[str, Any]:
    """Return the bytes of a model's tensors and of the linears of its blocks, and how many linears have which form."""
    linears = [
        linear
        for block in module.blocks.values()
        for linear in block.modules()
        if isinstance(linear, torch.nn.Linear | CompressedLinear)
    ]
    parts = [part.merged.linear for block in module.blocks.values() for part in block.modules() if isinstance(part, MergedPart)]
    alone = [linear for linear in linears if linear not in parts]
    names = [type(linear).__name__ for linear in (*alone, *parts)]
    return {
        "memory_bytes": bytes_of([module.model]),
        "linear_bytes": bytes_of(linears),
        "linears": ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)),
    }


def bytes_of(modules: list[torch.nn.Module]) -> int:
    """Return the bytes of all parameters and buffers; tied ones count once."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum({(tensor.data_ptr(), tensor.nbytes): tensor.nbytes for tensor in tensors}.values())


def run(*words: str) -> None:
    """Run a command in a new process, from the root of the project.

    Raises:
        RuntimeError: If it fails.
    """
    print("python", *words, flush=True)
    found = subprocess.run([sys.executable, *words], cwd=ROOT, check=False)
    if found.returncode:
        raise RuntimeError(f"The command above failed with exit code {found.returncode}.")


class Models:
    """The directories of a model: dense, pruned and compressed, pruned and plain. What is there already is used.

    Args:
        options: The command line.
        folder: Folder of the directories.
        texts: Name of a text -> its file.
    """

    def __init__(self, options: argparse.Namespace, folder: Path, texts: dict[str, str]) -> None:
        self.options, self.folder, self.texts = options, folder, texts
        self.prefix = f"{options.dtype}-{options.samples}x{options.seq_len}-seed{options.seed}"

    def dense(self) -> Path:
        """Return the directory of the dense model, in the dtype that is measured."""
        directory = self.folder / f"{self.prefix}-dense"
        if not (directory / "config.json").is_file():
            module = CausalLM(self.options.model, dtype=self.options.dtype)
            module.configure_model()
            directory.mkdir(parents=True, exist_ok=True)
            module.save(directory)
        return directory

    def compressed(self, target: str) -> Path:
        """Prune, and return the directory with compressed weights."""
        directory = self._of(target, "compressed")
        if (directory / "config.json").is_file():
            return directory
        options = self.options
        words = ["--trainer.callbacks.output_dir", str(directory), "--trainer.callbacks.save_compressed", "true"]
        if ":" in target:  # zeros are given by the pattern, so that none can be moved to other blocks
            words += ["--trainer.callbacks.sparsity", "null", "--trainer.callbacks.pattern", target]
            words += ["--trainer.callbacks.allocation", "uniform"]
        else:
            words += ["--trainer.callbacks.sparsity", target]
        words += ["--data.source", self.texts["wikitext2-valid"], "--data.num_calibration", str(options.samples)]
        words += ["--data.num_heldout", str(HELDOUT), "--data.seq_len", str(options.seq_len)]
        words += ["--trainer.logger.save_dir", str(self.folder / "logs"), "--trainer.accelerator", options.prune_on]
        run("train.py", "fit", *self._common(), "--model.model_name_or_path", options.model, *words)
        return directory

    def plain(self, target: str) -> Path:
        """Return the directory with the same weights as any library reads them."""
        directory = self._of(target, "plain")
        if not (directory / "config.json").is_file():
            run("-m", "lightning_modules.expand", str(self.compressed(target)), str(directory))
        return directory

    def predict(self, directory: Path, kind: str) -> dict[str, Any]:
        """Continue windows of held-out text, and return what the meter found."""
        options = self.options
        words = ["--model.max_new_tokens", str(options.steps), "--model.static_cache", str(options.static_cache).lower()]
        words += ["--data.source", self.texts["wikitext2-valid"], "--data.seq_len", str(2 * options.prompt)]
        words += ["--data.num_heldout", str(WARM_UP + TIMED)]
        return self._observed("predict", directory, kind, words)

    def test(self, directory: Path, kind: str) -> dict[str, Any]:
        """Return the perplexity of the test text."""
        options = self.options
        words = ["--data.test_source", self.texts["test"], "--data.seq_len", str(options.seq_len)]
        words += ["--trainer.limit_test_batches", str(options.windows)]
        return self._observed("test", directory, kind, words)

    def _observed(self, command: str, directory: Path, kind: str, words: list[str]) -> dict[str, Any]:
        accelerator = "gpu" if self.options.device == "cuda" else "cpu"
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "found.json")
            meter = [{"class_path": f"benchmarks.smaller_faster.{Meter.__name__}", "init_args": {"path": str(path)}}]
            words = [*words, "--model.model_name_or_path", str(directory), "--model.compressed", kind, "--data.batch_size", "1"]
            words += ["--trainer.logger.save_dir", scratch, "--trainer.accelerator", accelerator]
            run("train.py", command, *self._common(), *words, "--trainer.callbacks", json.dumps(meter))
            return json.loads(path.read_text(encoding="utf-8"))

    def _common(self) -> list[str]:
        options = self.options
        return ["--config", "configs/best.yaml", "--seed_everything", str(options.seed), "--model.dtype", options.dtype, *QUIET]

    def _of(self, target: str, form: str) -> Path:
        return self.folder / f"{self.prefix}-{target.replace(':', 'of')}-{form}"


def forms_of(target: str) -> dict[str, str]:
    """Return form of a row -> value of `compressed`: plain, the fastest of each linear, and the one that was asked for."""
    if target == "dense":
        return {"plain": "none"}
    asked = "2:4" if target == "2:4" else "unstructured"
    return {"plain": "none", "compressed, auto": "auto", f"compressed, {asked}": asked}


def disk_bytes(directory: Path) -> int:
    """Return the bytes of a directory's weights."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def rows(options: argparse.Namespace, models: Models) -> Iterator[dict[str, Any]]:
    """Measure what a file lacks, form by form; a form's text is compared with that of the plain directory."""
    done = finished(options.out, KEYS)
    fixed = {"model": Path(options.model).stem, "dtype": options.dtype, "device": options.device}
    fixed |= {name: getattr(options, name) for name in ("static_cache", "threads", "seq_len", "samples", "windows", "prompt")}
    fixed |= {"steps": options.steps, "seed": options.seed}
    for target in ("dense", *options.targets):
        expected: list[str] = []
        for form, kind in forms_of(target).items():
            row = fixed | {"target": target, "form": form}
            if tuple(str(row[key]) for key in KEYS) in done:
                continue
            if kind == "none":
                directory = models.dense() if target == "dense" else models.plain(target)
            else:
                directory = models.compressed(target)
            found = models.predict(directory, kind)
            expected = expected or (found if kind == "none" else models.predict(models.plain(target), "none"))["texts"]
            speeds = [options.steps / seconds for seconds in found["seconds"][WARM_UP:]]
            same = [text == other for text, other in zip(found["texts"], expected, strict=True)]
            row |= {name: found[name] for name in ("memory_bytes", "linear_bytes", "linears")}
            row |= {"disk_bytes": disk_bytes(directory), "same_text": sum(same) / len(same)}
            row |= {"tokens_s": round(median(speeds), 3), "least_tokens_s": round(min(speeds), 3)}
            yield row | {"perplexity": round(models.test(directory, kind)["perplexity"], 4)}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikitext", type=Path, required=True, help="folder with wiki.test.raw and wiki.valid.tokens")
    parser.add_argument("--out", type=Path, default=Path("results/smaller_faster.csv"))
    parser.add_argument("--folder", type=Path, help="where directories are kept, and found again; default a temporary one")
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where every form is measured")
    parser.add_argument("--prune-on", choices=["auto", "cpu", "gpu"], default="auto", help="accelerator that prunes")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--targets", nargs="+", default=["0.7"], help="shares of zeros, or 2:4")
    parser.add_argument("--samples", type=int, default=128, help="windows of calibration")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a window of calibration and of the test text")
    parser.add_argument("--windows", type=int, default=147, help="windows of the test text; it has 147 of 2048 tokens")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=128, help="tokens that follow a prompt")
    parser.add_argument("--static-cache", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.static_cache is None:
        options.static_cache = options.device == "cuda"
    options.threads = torch.get_num_threads() if options.device == "cpu" else ""
    return options


def main() -> None:
    """Append the rows that a file lacks as they come."""
    options = parse()
    facts = environment()
    if options.device == "cpu":  # of a machine that has a GPU, too
        facts["hardware"] = device_name(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        models = Models(options, (options.folder or Path(scratch)).resolve(), plain_wikitext(options.wikitext, Path(scratch)))
        for row in rows(options, models):
            append(options.out, row | facts, COLUMNS)
            print({key: row[key] for key in ("target", "form", *MEASURED)}, flush=True)


if __name__ == "__main__":
    main()

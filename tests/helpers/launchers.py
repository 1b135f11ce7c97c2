"""Pruning runs in real processes, to which something happens at a place: a signal, or a full disk (faults.py, the tests)."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

PRELOADED = (
    "tests.helpers.launchers",
    "torch",
    "lightning.pytorch",
    "transformers",
    "callbacks.blockwise_pruning",
    "datamodules.text",
)
"""Imported once in a server, from which every run is forked: importing takes longer than a tiny run."""
LIMIT = 600.0
"""Seconds after which a run counts as hanging."""
GRACE = 20.0
"""Seconds that a process has to notice that another one has failed."""


@dataclass(frozen=True)
class Fault:
    """A fault in a process of a run: a signal when a place is reached for the n-th time, or a full disk.

    Attributes:
        place: A name of `PLACES`, `BETWEEN_RENAMES`, or disk.
        count: The n-th time; with disk the number of bytes that a file may have.
        signal: That the process sends itself.
    """

    place: str
    count: int = 1
    signal: int = signal.SIGKILL


@dataclass(frozen=True)
class PruningRun:
    """A pruning run of a model directory on a text file.

    Attributes:
        model: Directory of a causal language model.
        text: File.
        output: Where the pruned model goes.
        processes: Number of them, on gloo.
        nodes: The processes are said to be on so many machines.
        settings: Arguments of BlockwisePruning.
        data: Arguments of TextDataModule.
        changed_source: Path of a source below the project's root that has another content for this run; empty for none.
        stream: Whether blocks stay in their files.
    """

    model: str
    text: str
    output: str
    processes: int = 1
    nodes: int = 1
    settings: Mapping[str, Any] = field(default_factory=lambda: {"sparsity": 0.5})
    data: Mapping[str, Any] = field(default_factory=dict)
    changed_source: str = ""
    stream: bool = False

    def work(self) -> None:
        """Prune, in each of the processes."""
        from callbacks.blockwise_pruning import BlockwisePruning
        from datamodules.text import TextDataModule
        from lightning_modules.causal_lm import CausalLM

        if self.changed_source:
            _change_source(self.changed_source, Path(self.output).parent)
        settings = {"resume": True, "output_dir": self.output} | dict(self.settings)
        trainer = quiet_trainer(self, Path(self.output).parent, callbacks=[BlockwisePruning(**settings)])
        trainer.fit(
            CausalLM(self.model, stream=self.stream), datamodule=TextDataModule(self.model, source=self.text, **self.sizes)
        )

    @property
    def sizes(self) -> dict[str, Any]:
        """Arguments of the data module."""
        return {"seq_len": 16, "num_calibration": 13, "num_heldout": 5, "batch_size": 2} | dict(self.data)

    @property
    def weights(self) -> bytes | None:
        """Bytes of the pruned model; None if there is none."""
        path = Path(self.output) / "model.safetensors"
        return path.read_bytes() if path.exists() else None

    @property
    def state(self) -> Path:
        """Where finished blocks are kept."""
        return Path(f"{self.output}.state")


@dataclass(frozen=True)
class VisionRun(PruningRun):
    """The same of a random DeiT of two blocks on scikit-learn's digits; model and text mean nothing."""

    def work(self) -> None:
        """What each of the processes does."""
        from callbacks.blockwise_pruning import BlockwisePruning
        from datamodules.images import ImageDataModule
        from lightning_modules.image_classifier import ImageClassifier

        sizes = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
        settings = {"resume": True, "output_dir": self.output} | dict(self.settings)
        data = {"num_calibration": 33, "num_heldout": 7, "batch_size": 8, "crop_pct": 1.0} | dict(self.data)
        trainer = quiet_trainer(self, Path(self.output).parent, callbacks=[BlockwisePruning(**settings)])
        trainer.fit(ImageClassifier("deit_tiny_patch16_224", model_args=sizes), datamodule=ImageDataModule("digits", **data))


class Run(Protocol):
    """Anything that several processes do."""

    processes: int
    nodes: int

    def work(self) -> None:
        """What each of them does."""


def quiet_trainer(run: Run, folder: Path, **options: Any):
    """A Trainer of one of the processes of a run, on the CPU."""
    from lightning.pytorch import Trainer

    return Trainer(
        accelerator="cpu",
        devices=run.processes // run.nodes,
        num_nodes=run.nodes,
        strategy="ddp" if run.processes > 1 else "auto",
        logger=False,
        default_root_dir=str(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def start(run: Run, faults: Mapping[int, Fault] | None = None, log: Path | None = None) -> list:
    """Start the processes of a run.

    Args:
        run: The run.
        faults: Rank -> what happens to that process.
        log: File that takes what they print.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    port = _free_port()
    processes = [
        context.Process(target=_main, args=(run, rank, port, (faults or {}).get(rank), log)) for rank in range(run.processes)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list, limit: float = LIMIT) -> list[int | None]:
    """Exit codes (negative: a signal), None of one that had to be killed for hanging.

    As torchrun and Lightning's launcher do: where a process has failed, the others are killed after a while. Once they are
    connected they end by themselves; before, they would wait for it for half an hour.
    """
    end = time.monotonic() + limit
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(process.exitcode not in (0, None) for process in processes):
            end = min(end, time.monotonic() + GRACE)
            for process in processes:
                process.join(max(end - time.monotonic(), 0.0))
            for process in processes:
                process.kill()
                process.join()
        time.sleep(0.01)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def go(run: Run, faults: Mapping[int, Fault] | None = None, log: Path | None = None) -> list[int | None]:
    """Exit codes of a run."""
    return finish(start(run, faults, log))


def _main(run: Run, rank: int, port: int, fault: Fault | None, log: Path | None) -> None:
    """A process of a run, from its first line to its exit code."""
    output = os.open(os.devnull if log is None else log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if run.processes > 1:  # as torchrun does
        local = run.processes // run.nodes
        places = {"RANK": rank, "LOCAL_RANK": rank % local, "GROUP_RANK": rank // local, "LOCAL_WORLD_SIZE": local}
        places |= {
            "WORLD_SIZE": run.processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": "faults",
        }
        os.environ.update({name: str(value) for name, value in places.items()})
    import torch
    from lightning.pytorch import seed_everything

    from train import exit_codes

    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    if fault is not None:
        _arm(fault)
    with exit_codes():
        run.work()


def _change_source(path: str, folder: Path) -> None:
    """Let this process find the project's sources in a copy in which one file has another line."""
    import shutil

    from utilities import digest

    copy = folder / "changed"
    shutil.rmtree(copy, ignore_errors=True)
    for package in digest.SOURCES:
        shutil.copytree(digest.ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / path).open("a", encoding="utf-8") as file:
        file.write("# another line\n")
    digest.ROOT = copy


def _places() -> dict[str, tuple[Any, str]]:
    """Name of a place -> object and attribute that is called there."""
    import callbacks.base.saving
    import callbacks.blockwise.resume.state
    import callbacks.blockwise.run
    import functional.pruning.solver
    import lightning_modules.parts.compressed_files
    import lightning_modules.parts.shards
    import lightning_modules.parts.streamed
    import utilities.files
    from functional.pruning import InputStatistics
    from lightning_modules.parts.block_stream import BlockStream
    from utilities.distributed import Processes

    return {
        "statistics": (InputStatistics, "update"),
        "hidden states": (BlockStream, "run"),
        "solve": (functional.pruning.solver, "_sweep"),
        "weights sent": (Processes, "send"),
        "before a file is written": (callbacks.blockwise.resume.state, "_write"),
        "half a file written": (callbacks.blockwise.resume.state, "_write"),
        "before a file is renamed": (callbacks.blockwise.resume.state.os, "replace"),
        BETWEEN_RENAMES: (utilities.files, "put_in_place"),
        "model saved": (callbacks.blockwise.run, "publish"),
        "before the card is completed": (callbacks.blockwise.run, "write_card"),
        "after the model was saved": (callbacks.blockwise.run, "write_json"),
        "before a shard is written": (lightning_modules.parts.shards, "save_file"),
        "before a shard gets its name": (lightning_modules.parts.streamed, "give_second_name"),
        "before the index is written": (lightning_modules.parts.streamed, "write_index"),
        "before weights are compressed": (callbacks.base.saving, "compress_directory"),
        "before the mark is written": (lightning_modules.parts.compressed_files, "write_text"),
        "state removed": (callbacks.blockwise.resume.state.PruningState, "remove"),
    }


PLACES = {
    "statistics": 60,
    "hidden states": 60,
    "solve": 12,
    "before a file is written": 4,
    "half a file written": 4,
    "before a file is renamed": 4,
    "model saved": 1,
    "before the card is completed": 1,
    "after the model was saved": 1,
    "state removed": 1,
}
"""Places of a run of the tiny model, and how often it comes by, at most."""


BETWEEN_RENAMES = "between the two renames"
"""Place of a run that replaces an earlier model: that is aside, and the new one not yet in its place."""


def _arm(fault: Fault) -> None:
    """Let the fault happen in this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
    if fault.place == "disk":
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing more fails with EFBIG, as on a full disk with ENOSPC
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.count, resource.RLIM_INFINITY))
        return
    owner, name = _places()[fault.place]
    original: Callable = getattr(owner, name)
    seen = 0

    def reached(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == fault.count:
            if fault.place == "half a file written":
                path, data = args
                path.with_name(f"{path.name}.partial").write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), fault.signal)
        return original(*args, **kwargs)

    setattr(owner, name, reached)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def tiny(folder: Path, family: str = "llama", blocks: int = 3) -> tuple[str, str]:
    """A random model of some blocks and a text, written to a folder."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    words = {"<unk>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 96)}
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": blocks, "num_attention_heads": 4}
    config = {
        "llama": lambda: transformers.LlamaConfig(**sizes, intermediate_size=48, num_key_value_heads=2),
        "opt": lambda: transformers.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    }[family]()
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # large enough that attention and MLP matter beside the residual
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    model.save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(
        folder / "model"
    )
    text = folder / "words.txt"
    numbers = torch.randint(1, 5, (4000,)).cumsum(0) % 94 + 2
    text.write_text(" ".join(f"w{i}" for i in numbers.tolist()))
    return str(folder / "model"), str(text)

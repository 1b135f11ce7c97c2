"""Where the result of a pruning run goes: the model and its report, moved to their place as a whole, and the closing table."""

import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.blockwise.records import BlockRecord, environment, print_table, python_command, sparsity_of, write_json
from lightning_modules.base.prunable import PrunableModule

REPORT = "pruning.json"


def check_output(output: Path) -> None:
    """Make the parent of `output`, and see that files can be written there.

    Raises:
        ValueError: If the result cannot go there: nothing that is not ours is ever replaced.
    """
    output = output.resolve()
    if output.exists() and not (output / REPORT).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"Argument `output_dir` = {str(output)!r} exists and holds no {REPORT}, so it is not a pruned model of ours to "
            "replace. Choose another directory."
        )
    check_writable(output)


def check_writable(output: Path) -> None:
    """Make the parent of `output`.

    Raises:
        ValueError: If files cannot be written there.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"Argument `output_dir` = {str(output)!r} cannot be written ({error.strerror}). Choose another directory, or make "
            f"{str(output.parent)!r} writable."
        ) from error


def save_result(module: PrunableModule, output: Path, report: dict[str, Any]) -> None:
    """The model and its report, written beside their place and moved there as a whole."""
    target = output.resolve()  # a link stays a link
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    new, old = scratch / "new", scratch / "old"
    new.mkdir()
    module.save(new)
    write_json(new / REPORT, report)
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(scratch)


def report_of(trainer: Trainer, module: PrunableModule, run: dict[str, Any], records: list[BlockRecord]) -> dict[str, Any]:
    """Content of pruning.json: model, data, hardware and versions beside what the run says of itself and of its blocks."""
    data = trainer.datamodule.hparams if trainer.datamodule is not None else {}
    return {
        "model": dict(module.hparams),
        "data": dict(data),
        "seed": int(data.get("seed") or os.environ.get("PL_GLOBAL_SEED", 0)),
        **environment(module.device),
        **run,
        "sparsity": sparsity_of(records),
        "blocks": [record.as_json() for record in records],
    }


def print_summary(
    trainer: Trainer,
    title: str,
    metrics: dict[str, dict[str, float]],
    records: list[BlockRecord],
    output: Path,
    seconds: float,
    log_dir: str | None,
) -> None:
    """One table: dense and pruned metrics, sparsity, what q, k and v were given, time, memory, and what to do next."""
    dense, pruned = metrics.get("dense", {}), metrics.get("pruned", {})
    rows = [(name, f"{value:.4g} dense -> {pruned[name]:.4g} pruned") for name, value in dense.items()]
    rows.append(("sparsity", f"{sparsity_of(records):.4%} of the pruned linears of {len(records)} blocks"))
    targets = [record.allocation["sparsity"] for record in records if record.allocation]
    if targets:
        rows.append(("allocation", f"{min(targets):.2%} to {max(targets):.2%} of a block"))
    shares = [record.update_shares for record in records if record.update_shares]
    if shares:
        means = {role: sum(share.get(role, 0.0) for share in shares) / len(shares) for role in shares[0]}
        rows.append(("update taken", f"{', '.join(f'{role} {mean:.0%}' for role, mean in means.items())}, mean over blocks"))
    rows += [
        ("time", f"{seconds:.1f} s with dense validation"),
        ("peak memory", f"{max(record.peak_memory_gib for record in records):.2f} GiB"),
        ("pruned model", str(output)),
    ]
    if isinstance(trainer.logger, TensorBoardLogger):
        rows.append(("logs", f"{python_command()} -m tensorboard.main --logdir {shlex.quote(log_dir)}"))
        config = Path(log_dir) / "config.yaml"
        if config.is_file():
            arguments = trainer.lightning_module.load_arguments(output)
            options = [
                "--config",
                str(config),
                *(word for key, value in arguments.items() for word in (f"--model.{key}", value)),
            ]
            rows.append(("validate again", f"{python_command()} train.py validate {shlex.join(options)}"))
    print_table(title, rows)

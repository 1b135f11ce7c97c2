"""The result of a pruning run: report, model card and closing table."""

import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.base.model_card import CardContent, card_of, facts_of, write_card
from callbacks.base.saving import how_stored, save_model
from callbacks.blockwise.records import BlockRecord, sparsity_of
from lightning_modules.base.prunable import PrunableModule
from utilities.files import OutputDirectory, write_json
from utilities.reporting import print_table, python_command, shown_path

REPORT = "pruning.json"


def check_output(path: Path) -> None:
    """Check that `path` is new, empty, or the result of an earlier run, since nothing else is ever replaced.

    Raises:
        ValueError: If it is not.
    """
    path = path.expanduser().resolve()
    if path.exists() and not (path / REPORT).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"Argument `output_dir` = {str(path)!r} exists and holds no {REPORT}, so it is not a pruned model of ours to "
            "replace. Choose another directory."
        )


def publish(module: PrunableModule, output: OutputDirectory, report: dict[str, Any], card: ModelCard, compressed: bool) -> None:
    """Write the model, its report and its card into the output directory, all at once.

    Args:
        module: Module whose model was pruned.
        output: The directory, open.
        report: Content of pruning.json.
        card: Model card.
        compressed: Whether weights are stored as masks and values.
    """

    def write(directory: Path) -> None:
        save_model(module, directory, compressed)
        write_json(directory / REPORT, report)
        write_card(directory, card)

    output.publish(write)


def report_of(trainer: Trainer, module: PrunableModule, run: dict[str, Any], records: list[BlockRecord]) -> dict[str, Any]:
    """Return the content of pruning.json: model, data, hardware, versions and sources, and the entries of the run.

    Args:
        trainer: Trainer of the run.
        module: Module whose model was pruned.
        run: Entries of the run itself.
        records: Records of its blocks.
    """
    blocks = [record.as_json() for record in records]
    return {**facts_of(trainer, module), **run, "sparsity": sparsity_of(records), "blocks": blocks}


def pruning_card(trainer: Trainer, module: PrunableModule, report: dict[str, Any], compressed: bool) -> ModelCard:
    """Return the model card of a pruned model.

    Args:
        trainer: Trainer of the run.
        module: Module whose model was pruned.
        report: Content of pruning.json; metrics of the pruned model may still be missing.
        compressed: Whether weights are stored as masks and values.
    """
    settings = report["settings"]
    rule_source = settings.get("update_rule", {}).get("init_args", {}).get("source") or ()
    content = CardContent(
        title=f"{settings['method']} at {settings['pattern'] or settings['sparsity']}",
        summary=(
            f"Pruned block by block after training: {report['sparsity']:.2%} of the weights of the pruned linears are zero. "
            f"{how_stored(compressed)} `{REPORT}` has every block and linear."
        ),
        settings={"pruning": settings} | {name: report[name] for name in ("calibration", "processes")},
        metrics=report["metrics"],
        sparsity={"pruned": report["sparsity"]},
        counted="pruned linears",
        tags=("sparse", "pruned", settings["method"], *([settings["pattern"]] if settings["pattern"] else [])),
        sources=(rule_source,) if isinstance(rule_source, str) else tuple(rule_source),
    )
    return card_of(trainer, module, content, report)


def print_summary(
    trainer: Trainer,
    title: str,
    metrics: dict[str, dict[str, float]],
    records: list[BlockRecord],
    output: Path,
    seconds: float,
    log_dir: str | None,
) -> None:
    """Print one table: metrics before and after pruning, sparsity, updates taken, time, memory, and commands to go on with.

    Args:
        trainer: Trainer of the run.
        title: Title of the table.
        metrics: dense and pruned -> metric -> value.
        records: Records of the blocks.
        output: Directory of the pruned model.
        seconds: Time of the run.
        log_dir: Log directory of the run.
    """
    dense, pruned = metrics.get("dense", {}), metrics.get("pruned", {})
    rows = [(name, f"{value:.4g} dense -> {pruned[name]:.4g} pruned") for name, value in dense.items()]
    rows.append(("sparsity", f"{sparsity_of(records):.4%} of the pruned linears of {len(records)} blocks"))
    shares = [record.allocation["sparsity"] for record in records if record.allocation]
    if shares:
        rows.append(("allocation", f"{min(shares):.2%} to {max(shares):.2%} of a block"))
    shares = [record.update_shares for record in records if record.update_shares]
    if shares:
        means = {role: sum(share.get(role, 0.0) for share in shares) / len(shares) for role in shares[0]}
        rows.append(("update taken", f"{', '.join(f'{role} {mean:.0%}' for role, mean in means.items())}, mean over blocks"))
    rows += [
        ("time", f"{seconds:.1f} s with dense validation"),
        ("peak memory", f"{max(record.peak_memory_gib for record in records):.2f} GiB"),
        ("pruned model", shown_path(output)),
    ]
    if isinstance(trainer.logger, TensorBoardLogger):
        rows.append(("logs", f"{python_command()} -m tensorboard.main --logdir {shlex.quote(log_dir)}"))
        config = Path(log_dir) / "config.yaml"
        if config.is_file():
            arguments = trainer.lightning_module.load_arguments(Path(shown_path(output)))
            words = [word for key, value in arguments.items() for word in (f"--model.{key}", value)]
            command = f"{python_command()} train.py validate {shlex.join(['--config', str(config), *words])}"
            rows.append(("validate again", command))
    print_table(title, rows)

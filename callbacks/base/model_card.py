"""The model card of a directory that a run writes: README.md, as the Hugging Face hub reads it.

Its front matter names base model, datasets, library and task for the hub's search. Its text has results, settings, versions and
the command, for everyone who finds the directory.
"""

import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id, yaml_dump
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.base.sparsity import LEAST_SPARSITY, linear_weights, share_of, zeros_of
from lightning_modules.base.prunable import PrunableModule
from utilities.contract import data_of
from utilities.hub import PACKAGE_SCHEME
from utilities.reporting import environment, shown_path

CARD = "README.md"
MARK = "<!-- Written by the run that wrote this directory; the next run that writes here replaces it. -->"
"""Line in every card. A run replaces only a README.md that has it."""
HUB_FILE = "hf://datasets/"
LIBRARIES = ("transformers", "timm")


@dataclass(frozen=True)
class CardContent:
    """Part of a card that a callback writes about its result.

    Attributes:
        title: Heading, in words what was done.
        summary: A few sentences about the content of the directory.
        settings: Settings by name, in addition to those of model and data.
        metrics: State of the model, such as dense -> metric -> value.
        sparsity: State of the model -> share of zeros in `counted`.
        counted: Name of the linears whose zeros `sparsity` counts.
        tags: Tags for the hub's search.
        library: Library that loads the directory; None for the model's own.
        sources: Texts or images that were used in addition to the data module's, in the forms of its settings.
    """

    title: str
    summary: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    sparsity: Mapping[str, float] = field(default_factory=dict)
    counted: str = "prunable linears"
    tags: tuple[str, ...] = ()
    library: str | None = None
    sources: tuple[str, ...] = ()


def check_place(directory: Path, pushed: bool = False) -> None:
    """Raise a ValueError if a card would replace a README.md that no run has written.

    Args:
        directory: Directory of a result; need not exist yet.
        pushed: Whether the whole directory will be uploaded; it must then hold no other files.
    """
    card = directory / CARD
    is_ours = card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace")
    if is_ours or not directory.is_dir():
        return
    if card.exists():
        raise ValueError(
            f"Argument `output_dir` = {str(directory)!r} holds a {CARD} that is no model card of ours to replace. Choose "
            "another directory."
        )
    if pushed and any(directory.iterdir()):
        raise ValueError(
            f"Argument `push_to_hub` uploads all of `output_dir` = {str(directory)!r}, which already holds other files. Choose "
            "an empty or a new directory."
        )


def facts_of(trainer: Trainer, module: PrunableModule) -> dict[str, Any]:
    """Collect settings of model and data, seed, versions, sources and hardware of a run, by name."""
    facts = data_of(trainer).facts()
    return {
        "model": module.described(),
        "data": facts.settings,
        "seed": int(os.environ.get("PL_GLOBAL_SEED", 0) if facts.seed is None else facts.seed),
        **environment(trainer.strategy.root_device),  # after `fit` the module is on the CPU
    }


def card_of(
    trainer: Trainer, module: PrunableModule, content: CardContent, facts: Mapping[str, Any] | None = None
) -> ModelCard:
    """Make the card of a result, without communication between processes.

    Args:
        trainer: Trainer of the run.
        module: Module whose model was written.
        content: Part that the callback writes.
        facts: Result of `facts_of`; collected here when None.
    """
    facts = facts_of(trainer, module) if facts is None else facts
    library, base = library_of(module), base_model_of(module)
    datasets = hub_datasets([*_sources(facts["data"]), *content.sources]) if trainer.state.fn == TrainerFn.FITTING else []
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "finetune",
        datasets=datasets or None,
        library_name=content.library or library,
        pipeline_tag=_task_of(module),
        tags=list(dict.fromkeys(content.tags)) or None,
    )
    settings = {name: facts[name] for name in ("model", "data", "seed")} | dict(content.settings)
    versions = facts["versions"] | {name: version(name) for name in (library, content.library) if name}
    sections = [
        f"# {model_name(module)}: {content.title}",
        content.summary,
        _results(content),
        f"## Settings\n\n```yaml\n{yaml_dump(_plain(settings), sort_keys=False)}```",
        f"## Hardware and versions\n\n- {facts['hardware']}\n- {', '.join(f'{name} {x}' for name, x in versions.items())}\n"
        f"- sources of the project: SHA-256 {facts['sources']}",
        _command(),
        MARK,
    ]
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def last_metrics(trainer: Trainer) -> dict[str, float]:
    """Return the metrics that a run logged last, without those of training batches. Call it in every process."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("train/")}


def write_card(directory: Path, card: ModelCard) -> None:
    """Write README.md under another name and rename it. Call it in one process."""
    partial = directory / f"{CARD}.partial"
    partial.write_text(str(card), encoding="utf-8")
    os.replace(partial, directory / CARD)


def model_name(module: PrunableModule) -> str:
    """Return the model's name without owner and folder, or its class if it has no name."""
    return Path(module.described().get("model_name_or_path") or type(module.model).__name__).name


def library_of(module: PrunableModule) -> str | None:
    """Return the library that the model's class comes from: transformers, timm, or None for any other."""
    packages = {cls.__module__.partition(".")[0] for cls in type(module.model).__mro__}
    return next((name for name in LIBRARIES if name in packages), None)


def base_model_of(module: PrunableModule) -> str | None:
    """Return the hub id that the weights came from. None if they came from a local path or memory, or are random."""
    path = module.hparams.get("model_name_or_path")
    if path is not None and library_of(module) == "timm":
        path = module.model.pretrained_cfg.get("hf_hub_id") if module.hparams.get("pretrained") else None
    if path is None or path.startswith(PACKAGE_SCHEME) or path.endswith(".gguf") or Path(path).expanduser().exists():
        return None
    return path if is_repository(path) else None


def hub_datasets(sources: Iterable[str]) -> list[str]:
    """Return the hub ids among sources of text or images. Files, folders and the data of packages are left out."""
    found = []
    for source in sources:
        if source.startswith(HUB_FILE):
            name = "/".join(source.removeprefix(HUB_FILE).split("/")[:2]).partition("@")[0]
        elif Path(source).expanduser().exists() or not {":", "/"} & set(source):  # pydoc and digits have neither
            continue
        else:
            name = source.partition(":")[0]
        if is_repository(name):
            found.append(name)
    return list(dict.fromkeys(found))


def is_repository(name: str) -> bool:
    """Tell whether a name has the form of a repository on the hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def share_of_zeros(module: PrunableModule) -> float | None:
    """Return the share of zeros in the prunable linears, or None for a model that can be trained but not pruned."""
    try:
        weights = linear_weights(module)
    except ValueError:
        return None
    return share_of(zeros_of(weights))


def sparse_tags(sparsity: float | None) -> tuple[str, ...]:
    """Return the tags of a model with this share of zeros."""
    return ("sparse", "pruned") if (sparsity or 0.0) >= LEAST_SPARSITY else ()


def _sources(data: Mapping[str, Any]) -> list[str]:
    """Find calibration or training sources among the settings of a data module."""
    given = [data.get("source"), data.get("root")]
    return [source for item in given if item for source in ([item] if isinstance(item, str) else item)]


def _task_of(module: PrunableModule) -> str | None:
    """Return the hub's name for the model's task."""
    if module.model_facts().num_classes is not None:
        return "image-classification"
    return "text-generation" if hasattr(module.model, "generate") else None


def _results(content: CardContent) -> str:
    """Make a table with a row for each metric and a column for each state of the model."""
    metrics, sparsity = content.metrics, content.sparsity
    states = [state for state in dict.fromkeys([*metrics, *sparsity]) if metrics.get(state) or state in sparsity]
    if not states:
        return ""
    rows = {
        name: [f"{metrics[state][name]:.6g}" if name in metrics.get(state, ()) else "" for state in states]
        for name in dict.fromkeys(name for values in metrics.values() for name in values)
    }
    if sparsity:
        shares = [f"{sparsity[state]:.4%}" if state in sparsity else "" for state in states]
        rows[f"sparsity of the {content.counted}"] = shares
    lines = [["", *states], ["---"] * (len(states) + 1), *([name, *values] for name, values in rows.items())]
    return "## Results\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _command() -> str:
    """Return the command that started this process; empty if there is none, as in a notebook."""
    if hasattr(sys, "ps1") or not sys.argv or not Path(sys.argv[0]).is_file():
        return ""
    return f"## Command\n\n```sh\n{shlex.join(['python', shown_path(Path(sys.argv[0])), *sys.argv[1:]])}\n```"


def _plain(settings: Mapping[str, Any]) -> Any:
    """Turn settings into plain values."""
    return json.loads(json.dumps(settings, default=str))

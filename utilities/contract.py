"""Contract between data modules and modules that prune, train or evaluate a model: the facts that each tells the other.

Both sides go through `data_of`, `graph_data_of` and `model_of`, so neither probes the other's attributes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DataFacts:
    """Facts about the samples of a data module, known before the model.

    Attributes:
        tokens: Number of tokens of a sample, if all samples have one length (text).
        image_size: Height and width of images, if set by the user.
        class_names: Names of the classes in the order of the model's outputs; empty without classes.
        num_calibration: Number of calibration samples.
        batch_size: Number of samples of a batch; None leaves that of calibration batches to the run.
        settings: Settings by name, for reports.
        seed: Seed of the random draws; None if the data module has no seed of its own.
        tokenizer: Tokenizer that was loaded; None before, or without text.
    """

    tokens: int | None = None
    image_size: int | None = None
    class_names: tuple[str, ...] = ()
    num_calibration: int | None = None
    batch_size: int | None = 1
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    tokenizer: Any = None


@dataclass(frozen=True)
class ModelFacts:
    """Facts about the model of a module.

    Attributes:
        num_classes: Number of outputs of a classifier; None before it is made.
        image_config: Images that it expects: input_size (C, H, W), mean, std, interpolation, crop_pct, crop_mode.
        tokenizer: A tokenizer, or the path of one; None for models without text.
    """

    num_classes: int | None = None
    image_config: dict[str, Any] | None = None
    tokenizer: Any = None


class CalibrationData(ABC):
    """A data module that can give a pruning run its calibration samples."""

    @abstractmethod
    def facts(self) -> DataFacts:
        """Return facts about the samples."""

    @abstractmethod
    def begin_calibration(self, batch_size: int | None) -> None:
        """Let the train dataloader give calibration samples in a fixed order from now on.

        Args:
            batch_size: Number of samples of a batch if the settings leave that open, else None.
        """

    @abstractmethod
    def end_calibration(self) -> None:
        """Let the train dataloader give training samples again."""

    @abstractmethod
    def rule_dataloader(self, source: str | list[str], number: int) -> Any:
        """Return batches of another source, on which an update rule measures attention.

        Args:
            source: Source, in the forms of the data module's own.
            number: Number of samples.

        Raises:
            ValueError: If the source cannot be read or is too small.
        """


class PlainData(CalibrationData):
    """Stands for dataloaders that were given to the Trainer without a data module."""

    def facts(self) -> DataFacts:
        """Return empty facts, since nothing is known."""
        return DataFacts()

    def begin_calibration(self, batch_size: int | None) -> None:
        """Do nothing: the given dataloader is the calibration set."""

    def end_calibration(self) -> None:
        """Do nothing."""

    def rule_dataloader(self, source: str | list[str], number: int) -> Any:
        """Refuse, since dataloaders cannot read another source.

        Args:
            source: Source.
            number: Number of samples.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "Argument `update_rule.source` needs a data module that reads it, such as TextDataModule, but the Trainer has "
            "plain dataloaders. Leave it out: the rule then looks at calibration data."
        )


@dataclass(frozen=True)
class GraphFacts:
    """Facts about the graph of a data module.

    Attributes:
        graph: The whole graph on the CPU, a torch-geometric Data.
        num_classes: Number of classes of its nodes.
        class_names: Names of the classes; empty if the source has none.
        sampled: Whether batches are subgraphs around some nodes; else each is the whole graph.
    """

    graph: Any
    num_classes: int
    class_names: tuple[str, ...] = ()
    sampled: bool = False


class GraphData(ABC):
    """A data module of one graph, for modules that learn on nodes."""

    @abstractmethod
    def graph_facts(self) -> GraphFacts:
        """Return facts about the graph, after `setup` has read it."""

    @abstractmethod
    def all_nodes_dataloader(self) -> Any:
        """Return batches of all nodes in order, for use in a single process."""


class AveragesParametersOnly:
    """A callback that averages weights and leaves buffers, such as the factors of a graph, as the module has them."""


class TellsModelFacts(ABC):
    """A module that tells data modules about its model."""

    @abstractmethod
    def model_facts(self) -> ModelFacts:
        """Return facts about the model, as far as they are known by now."""


WINDOWS_OF_A_BATCH = 32
"""Windows that a model writes at a time. Fixed, since the batch decides which random numbers a window gets."""


class WritesText(ABC):
    """A module whose model can write its own calibration text, batch by batch, each of which depends on its number only."""

    @abstractmethod
    def write_batch(self, batch: int, number: int, seq_len: int, seed: int) -> Any:
        """Sample a batch of `number` windows in all: tokens, (at most `WINDOWS_OF_A_BATCH`, seq_len)."""


def writer_of(trainer: Any) -> WritesText:
    """Return the module of a Lightning trainer, whose model has to write text.

    Raises:
        ValueError: If it cannot.
    """
    module = getattr(trainer, "lightning_module", None)
    if not isinstance(module, WritesText):
        raise ValueError(
            f"Argument `source` = self needs a module that writes text, such as CausalLM, but got {type(module).__name__}. "
            "Give a text as `source`."
        )
    return module


def data_of(trainer: Any) -> CalibrationData:
    """Return the data module of a Lightning trainer, or a `PlainData` for plain dataloaders."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, CalibrationData) else PlainData()


def graph_data_of(trainer: Any, asking: object) -> GraphData:
    """Return the data module of a Lightning trainer, which has to hold a graph.

    Args:
        trainer: A Lightning trainer.
        asking: Object that needs it, for the error.

    Raises:
        ValueError: If the trainer has another data module, or none.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, GraphData):
        raise ValueError(
            f"{type(asking).__name__} needs a data module that is a GraphData, such as GraphDataModule, but got "
            f"{type(data).__name__}. Give it as `trainer.fit(module, datamodule=…)` or in the config's `data`."
        )
    return data


def model_of(trainer: Any) -> ModelFacts:
    """Return facts about the model of a Lightning trainer; empty without a trainer, or if its module tells none."""
    module = getattr(trainer, "lightning_module", None)
    return module.model_facts() if isinstance(module, TellsModelFacts) else ModelFacts()

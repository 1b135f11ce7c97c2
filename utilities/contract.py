"""The contract between data modules and modules that prune, train or evaluate a model: what each side tells the other.

Both sides go through `data_of`, `graph_data_of` and `model_of`, so neither probes the other's attributes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DataFacts:
    """What a data module says of its samples; known before the model is.

    Attributes:
        tokens: Tokens of a sample, where all samples have one length (text).
        image_size: Height and width of images, where set by the user.
        class_names: Names of the classes in the order of the model's outputs, where there are classes.
        num_calibration: Number of calibration samples.
        batch_size: Samples of a batch; None leaves that of calibration to the run.
        settings: Settings by name, for reports.
        seed: Seed of its draws; None where it has none of its own.
        tokenizer: Tokenizer that it has loaded; None before, or without text.
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
    """What a module says of its model.

    Attributes:
        num_classes: Number of outputs of a classifier; None before it is made.
        image_config: How it wants its images: input_size (C, H, W), mean, std, interpolation, crop_pct, crop_mode.
        tokenizer: A tokenizer, or what one is loaded from; None for models without text.
    """

    num_classes: int | None = None
    image_config: dict[str, Any] | None = None
    tokenizer: Any = None


class CalibrationData(ABC):
    """A data module that can give a pruning run its calibration samples."""

    @abstractmethod
    def facts(self) -> DataFacts:
        """Facts about the samples."""

    @abstractmethod
    def begin_calibration(self, batch_size: int | None) -> None:
        """From now on the train dataloader gives calibration samples in a fixed order.

        Args:
            batch_size: Samples of a batch where the settings leave that open; else None.
        """

    @abstractmethod
    def end_calibration(self) -> None:
        """The train dataloader gives training samples again."""

    @abstractmethod
    def rule_dataloader(self, source: str | list[str], number: int) -> Any:
        """Samples of another source for an update rule to look at.

        Args:
            source: In the forms of the data module's own source.
            number: Number of samples.

        Raises:
            ValueError: If the source cannot be had or is too small.
        """


class PlainData(CalibrationData):
    """Stands for dataloaders that were given to the Trainer without a data module."""

    def facts(self) -> DataFacts:
        """Nothing is known."""
        return DataFacts()

    def begin_calibration(self, batch_size: int | None) -> None:
        """The given dataloader is the calibration set."""

    def end_calibration(self) -> None:
        """Nothing to undo."""

    def rule_dataloader(self, source: str | list[str], number: int) -> Any:
        """Refuse: dataloaders cannot read another source."""
        raise ValueError(
            "Argument `update_rule.source` needs a data module that reads it, such as TextDataModule, but the Trainer has "
            "plain dataloaders. Leave it out: the rule then looks at calibration data."
        )


@dataclass(frozen=True)
class GraphFacts:
    """What a data module says of its graph.

    Attributes:
        graph: The whole graph on the CPU, a torch-geometric Data.
        num_classes: Number of classes of its nodes.
        class_names: Names of the classes; empty where the source has none.
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
        """Facts about the graph, once `setup` has read it."""

    @abstractmethod
    def all_nodes_dataloader(self) -> Any:
        """Batches of all nodes in order, for one process that asks alone."""


class AveragesParametersOnly:
    """A callback that averages weights and leaves buffers, such as the factors of a graph, as the module has them."""


class TellsModelFacts(ABC):
    """A module that tells data modules about its model."""

    @abstractmethod
    def model_facts(self) -> ModelFacts:
        """Facts about the model, as far as they are known by now."""


def data_of(trainer: Any) -> CalibrationData:
    """The data module of a Lightning trainer, or what stands for plain dataloaders."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, CalibrationData) else PlainData()


def graph_data_of(trainer: Any, asking: object) -> GraphData:
    """The data module of a Lightning trainer, which has to hold a graph.

    Args:
        trainer: A Lightning trainer.
        asking: Who needs it, for the error.

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
    """Facts about the model of a Lightning trainer; none without a trainer, or with a module that tells none."""
    module = getattr(trainer, "lightning_module", None)
    return module.model_facts() if isinstance(module, TellsModelFacts) else ModelFacts()

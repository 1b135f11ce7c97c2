"""Base of the graph modules: how the embeddings and predictions of nodes are measured, written and optimised.

A batch is a torch-geometric Data: x (N, F), edge_index (2, E), y (N,), train_mask, val_mask, test_mask (N,) bool, node_ids
(N,). In a sampled batch the masks are False on nodes that only help others.
"""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch_geometric.data import Data
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassF1Score

from lightning_modules.graph_encoders import GlobalOperator, GraphEncoder, sparse_features
from lightning_modules.node_probes import clustering_scores, linear_probe


class NodeModule(LightningModule):
    """Node classification or representation learning on one graph; subclasses say how to encode and what to minimise.

    Args:
        learning_rate: Of Adam.
        weight_decay: L2 of Adam, on all parameters.
        supervised: Whether there are logits, learned from the labels of training nodes. Without, accuracy is that of a logistic
            regression on the embeddings.
        probe_seed: Of the regression and the k-means at `test`.
    """

    supervised = True
    needs_labels = False
    """Whether a batch without labelled nodes teaches nothing."""
    encoder: GraphEncoder

    def __init__(self, learning_rate: float, weight_decay: float) -> None:
        super().__init__()
        for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"Argument `{name}` expected to be at least 0 but got {value}.")
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.metrics = nn.ModuleDict()
        self._ready = False
        self._sparse: tuple[Tensor, Tensor] | None = None
        self._local: tuple[Tensor, GlobalOperator] | None = None

    @abstractmethod
    def build(self, data: Data, num_classes: int) -> None:
        """Make what depends on the graph: encoder, buffers."""

    @abstractmethod
    def encode(self, batch: Data) -> tuple[Tensor, Tensor | None]:
        """Embeddings (N, H) and, where supervised, logits (N, C)."""

    @abstractmethod
    def losses(self, batch: Data, epoch: int) -> dict[str, Tensor]:
        """What is minimised, under `loss`, and what else is worth a curve."""

    def training_step(self, batch: Data, batch_idx: int) -> Tensor | None:
        """Minimise the losses of a batch and log each."""
        if self.needs_labels and not batch.train_mask.any():  # a sampled batch
            return None
        found = self.losses(batch, self.current_epoch)
        self.log_dict({f"train/{name}": value for name, value in found.items() if name != "loss"}, batch_size=1)
        self.log("train/loss", found["loss"], prog_bar=True, batch_size=1)
        return found["loss"]

    @property
    def graph(self) -> Data:
        """The whole graph of the trainer's data module."""
        module = getattr(self.trainer, "datamodule", None)
        if not hasattr(module, "num_classes"):
            raise ValueError(
                f"{type(self).__name__} needs a data module with `data` and `num_classes`, such as GraphDataModule, "
                f"but got {type(module).__name__}. Give it as `trainer.fit(module, datamodule=…)` or in the config's `data`."
            )
        return module.data

    def features(self, batch: Data) -> Tensor:
        """Features of the nodes of a batch; those of the whole graph sparse where that is faster, converted once."""
        if not self.encoder.takes_sparse or "num_seeds" in batch:
            return batch.x
        if self._sparse is None or self._sparse[0] is not batch.x:
            with torch.inference_mode(False):  # training uses what validation may have made
                self._sparse = batch.x, sparse_features(batch.x)
        return self._sparse[1]

    def local_operator(self, batch: Data) -> GlobalOperator | None:
        """Products with Ã in the place of the layers' own, slower ones, where both are the same; made once a graph."""
        if not self.encoder.symmetric or "num_seeds" in batch:
            return None
        if self._local is None or self._local[0] is not batch.edge_index:
            with torch.inference_mode(False):
                self._local = batch.edge_index, GlobalOperator(batch.edge_index, batch.num_nodes)
        return self._local[1]

    def configure_model(self) -> None:
        """Build once, when the graph is known."""
        if self._ready:
            return
        data, self.num_classes = self.graph, self.trainer.datamodule.num_classes
        self.build(data, self.num_classes)
        scores = {
            "accuracy": MulticlassAccuracy(self.num_classes, average="micro"),
            "macro_f1": MulticlassF1Score(self.num_classes, average="macro"),
            "calibration_error": MulticlassCalibrationError(self.num_classes),
        }
        metrics = MetricCollection({"loss": MeanMetric(), **scores}, compute_groups=False)
        self.metrics.update({split: metrics.clone() for split in ("val", "test")})
        self._ready = True

    def forward(self, batch: Data) -> tuple[Tensor, Tensor | None]:
        """Embeddings and logits."""
        return self.encode(batch)

    def validation_step(self, batch: Data, batch_idx: int) -> None:
        """Measure the validation nodes of a batch."""
        self._measure(batch, "val")

    def test_step(self, batch: Data, batch_idx: int) -> None:
        """Measure the test nodes of a batch."""
        self._measure(batch, "test")

    def _measure(self, batch: Data, split: str) -> None:
        embeddings, logits = self.encode(batch)
        mask = batch[f"{split}_mask"]
        if logits is None:
            self._embedded.append((batch.node_ids.cpu(), embeddings.float().cpu()))
            return
        if not mask.any():
            return
        predicted, labels = logits[mask].float(), batch.y[mask]
        for name, metric in self.metrics[split].items():
            if name == "loss":
                metric.update(nn.functional.cross_entropy(predicted, labels, reduction="none"))
            else:
                metric.update(predicted, labels)

    def on_validation_epoch_start(self) -> None:
        self._restart("val")

    def on_test_epoch_start(self) -> None:
        self._restart("test")

    def _restart(self, split: str) -> None:
        self.metrics[split].reset()
        self._embedded: list[tuple[Tensor, Tensor]] = []

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the validation nodes; without logits those of a linear probe."""
        if self.supervised:
            self._log_scores("val")
        else:
            self.log("val/accuracy", self._probe("val"), prog_bar=True)

    def on_test_epoch_end(self) -> None:
        """Log the scores of the test nodes, a linear probe on all embeddings, and how well k-means finds the classes."""
        if self.supervised:
            self._log_scores("test")
        embeddings, data = self.embed_all()[0], self.graph
        accuracy = linear_probe(embeddings, data.y.cpu(), data.train_mask.cpu(), data.val_mask.cpu(), data.test_mask.cpu())
        self.log("test/probe_accuracy", accuracy)
        if not self.supervised:
            self.log("test/accuracy", accuracy)
        for name, value in clustering_scores(embeddings, data.y.cpu(), self.num_classes).items():
            self.log(f"test/{name}", value)

    def _log_scores(self, split: str) -> None:
        if self.metrics[split]["loss"].update_called:
            values = self.metrics[split].compute()
            for name, value in values.items():
                self.log(f"{split}/{name}", value, prog_bar=name == "accuracy")

    def _probe(self, split: str) -> float:
        data = self.graph
        if sum(len(ids) for ids, _ in self._embedded) < len(data.y):  # a sampled batch holds validation nodes only
            embeddings = self.embed_all()[0]
        else:
            ids, values = (torch.cat(parts) for parts in zip(*self._embedded, strict=True))
            embeddings = torch.empty_like(values).index_copy_(0, ids, values)
        train, val = data.train_mask.cpu(), data.val_mask.cpu()
        return linear_probe(embeddings, data.y.cpu(), train, val, data[f"{split}_mask"].cpu())

    @torch.no_grad()
    def embed_all(self) -> tuple[Tensor, Tensor | None]:
        """Embeddings (N, H) and logits (N, C) of all nodes in their order, on the CPU, in evaluation mode."""
        training, parts = self.training, []
        self.eval()
        for batch in self.trainer.datamodule.predict_dataloader():
            batch = self.trainer.datamodule.transfer_batch_to_device(batch, self.device, 0)
            seeds = slice(0, int(batch.get("num_seeds", batch.num_nodes)))
            parts.append([None if values is None else values[seeds].float().cpu() for values in self.encode(batch)])
        self.train(training)
        embeddings, logits = zip(*parts, strict=True)
        return torch.cat(embeddings), None if logits[0] is None else torch.cat(logits)

    def predict_step(self, batch: Data, batch_idx: int) -> dict[str, Tensor]:
        """Embeddings and, where supervised, class probabilities of the nodes of a batch."""
        embeddings, logits = self.encode(batch)
        seeds = slice(0, int(batch.get("num_seeds", batch.num_nodes)))
        found = {"node_ids": batch.node_ids[seeds], "embeddings": embeddings[seeds].float()}
        if logits is not None:
            found["probabilities"] = logits[seeds].float().softmax(-1)
        self._predicted.append({name: value.cpu().contiguous() for name, value in found.items()})
        return found

    def on_predict_epoch_start(self) -> None:
        self._predicted: list[dict[str, Tensor]] = []

    def on_predict_epoch_end(self) -> None:
        """Write predictions.safetensors, nodes in their order, to the run's folder."""
        from safetensors.torch import save_file

        folder = Path(getattr(self.logger, "log_dir", None) or self.trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        found = {name: torch.cat([part[name] for part in self._predicted]) for name in self._predicted[0]}
        save_file(found, folder / "predictions.safetensors")
        rank_zero_info(f"{', '.join(found)} of {len(found['node_ids'])} nodes written to {folder / 'predictions.safetensors'}.")

    def configure_optimizers(self) -> Any:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)

"""Base of the graph modules: how the embeddings and predictions of nodes are measured, written and optimised.

A batch is a torch-geometric Data: x (N, F), edge_index (2, E), y (N,), train_mask, val_mask, test_mask (N,) bool, node_ids
(N,). In a sampled batch the masks are False on nodes that only help others.
"""

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.data import Data
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassF1Score

from functional.graph import masked_cross_entropy
from lightning_modules.base.resumable import ResumableModule
from lightning_modules.parts.graph_encoders import GraphEncoder, sparse_features
from lightning_modules.parts.graph_operators import GlobalOperator
from lightning_modules.parts.node_predictions import NodePredictions
from lightning_modules.parts.node_probes import clustering_scores, linear_probe
from utilities.checks import check_at_least_zero
from utilities.contract import AveragesParametersOnly, GraphFacts, graph_data_of
from utilities.distributed import gathered, world_size


class NodeModule(ResumableModule):
    """Node classification or representation learning on one graph; subclasses say how to encode and what to minimise.

    With several processes that see the whole graph, all draw the same random numbers, and the first one measures. Of
    sampled graphs each draws its own, losses are means over the labelled nodes of all, and metrics are of all.

    Args:
        learning_rate: Learning rate of Adam.
        weight_decay: L2 penalty of Adam, on all parameters.

    Raises:
        ValueError: If an argument is out of range.
    """

    supervised = True
    """Whether there are logits, learned from the labels of training nodes; else a regression on the embeddings is scored."""
    needs_labels = False
    """Whether a batch without labelled nodes teaches nothing."""
    draws_edges = False
    """Whether each step has other edges, so that no GPU graph can be captured of it."""
    warmup_epochs = 0
    """Epochs after which the loss has further terms."""
    encoder: GraphEncoder

    def __init__(self, learning_rate: float, weight_decay: float) -> None:
        super().__init__()
        check_at_least_zero("learning_rate", learning_rate)
        check_at_least_zero("weight_decay", weight_decay)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.metrics = nn.ModuleDict()
        self.num_classes = 0
        self._ready = False
        self._learned = False
        self._embedded: Tensor | None = None
        self._predicted = NodePredictions()
        self._sparse: tuple[Tensor, Tensor] | None = None
        self._local: tuple[Tensor, GlobalOperator] | None = None

    @abstractmethod
    def build(self, data: Data, num_classes: int) -> None:
        """Make what depends on the graph: encoder, buffers."""

    @abstractmethod
    def encode(self, batch: Data) -> tuple[Tensor, Tensor | None]:
        """Compute embeddings (N, H) and, where supervised, logits (N, C)."""

    @abstractmethod
    def losses(self, batch: Data, epoch: int) -> dict[str, Tensor]:
        """Compute the loss to minimise, under `loss`, and its terms, each worth a curve."""

    def training_step(self, batch: Data, batch_idx: int) -> Tensor | None:
        """Minimise the losses of a batch and log each."""
        teaches = not self.needs_labels or bool(self.count(batch, batch.train_mask))  # a sampled batch may have no labels
        if not teaches and world_size() == 1:
            return None
        self._learned |= teaches
        found = self.losses(batch, self.current_epoch)
        if teaches:
            options = {"batch_size": 1, "sync_dist": self.shared(batch)}
            self.log_dict({f"train/{name}": value for name, value in found.items() if name != "loss"}, **options)
            self.log("train/loss", found["loss"], prog_bar=True, **options)
        return found["loss"]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Move nothing where no process has labels, as one process does, which then has no loss."""
        if not self._learned:
            optimizer.zero_grad()
        self._learned = False

    @staticmethod
    def shared(batch: Data) -> bool:
        """Tell whether other processes have other nodes of the same step."""
        return "num_seeds" in batch and world_size() > 1

    def count(self, batch: Data, mask: Tensor) -> Tensor:
        """Count the nodes in a mask, of all processes by their number: gradients are means over processes."""
        total = mask.sum()
        if self.shared(batch):
            total = total.float()
            distributed.all_reduce(total)
            total /= world_size()
        return total

    def cross_entropy(self, batch: Data, logits: Tensor, labels: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
        """Average over the nodes in a mask; in a shared step so that the mean over processes is that over all their nodes."""
        return masked_cross_entropy(logits, labels, mask, self.count(batch, mask), weights)

    @property
    def graph_facts(self) -> GraphFacts:
        """Facts about the graph of the trainer's data module.

        Raises:
            ValueError: If the trainer has no data module with a graph.
        """
        return graph_data_of(self.trainer, self).graph_facts()

    def spectrum(self) -> Tensor | None:
        """Return the singular values (q,) in falling order; None for modules without a low-rank view."""
        return None

    def pairs(self, batch: Data, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return similarities, weights and positives of all pairs of some nodes, (n, n) each; None where they have none."""
        return None

    def features(self, batch: Data) -> Tensor:
        """Return the features of a batch; those of the whole graph sparse where that is faster, converted once."""
        if self.encoder.decoupled:
            return self.prepared(batch, 0)
        mixed = torch.is_autocast_enabled(batch.x.device.type)  # a CPU has no sparse product in bfloat16
        if not self.encoder.takes_sparse or "num_seeds" in batch or mixed:
            return batch.x
        if self._sparse is None or self._sparse[0] is not batch.x:
            with torch.inference_mode(False):  # training uses what validation may have made
                self._sparse = batch.x, sparse_features(batch.x)
        return self._sparse[1]

    def prepare(self, views: Sequence[tuple[Tensor, GlobalOperator]]) -> None:
        """Propagate each view's features once, as buffers: moved, saved and resumed with the module."""
        for number, values in enumerate(self.encoder.body.prepare(views)):
            self.register_buffer(f"prepared_{number}", values)

    def prepared(self, batch: Data, number: int) -> Tensor:
        """Return a view's prepared features (N, d) of the nodes of a batch."""
        values = getattr(self, f"prepared_{number}")
        return values[batch.node_ids] if "num_seeds" in batch else values

    def local_operator(self, batch: Data) -> GlobalOperator | None:
        """Make products with Ã that replace the layers' own, slower ones, where both are the same; once a graph."""
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
        facts = self.graph_facts
        self.num_classes = facts.num_classes
        self.build(facts.graph, self.num_classes)
        scores = {
            "accuracy": MulticlassAccuracy(self.num_classes, average="micro"),
            "macro_f1": MulticlassF1Score(self.num_classes, average="macro"),
            "calibration_error": MulticlassCalibrationError(self.num_classes),
        }
        metrics = MetricCollection({"loss": MeanMetric(), **scores}, compute_groups=False)
        self.metrics.update({split: metrics.clone() for split in ("val", "test")})
        if self.trainer.world_size > 1 and facts.sampled:
            torch.manual_seed(torch.initial_seed() + self.trainer.global_rank)  # weights of all become those of the first
        self._ready = True

    def setup(self, stage: str) -> None:
        """Refuse a precision that features do not have, and a callback that could average what is not learned.

        Raises:
            ValueError: If the weights would not be float32, or if a callback averages weights and does not promise to leave
                buffers, such as the factors, alone.
        """
        if str(self.trainer.precision).endswith("-true") and self.trainer.precision != "32-true":
            raise ValueError(
                "Argument `trainer.precision` expected 32-true or a mixed one for a graph module, whose features are float32, "
                f"but got {self.trainer.precision}. Leave it out, or use bf16-mixed."
            )
        for callback in self.trainer.callbacks:
            if stage == "fit" and isinstance(callback, WeightAveraging) and not isinstance(callback, AveragesParametersOnly):
                raise ValueError(
                    f"Argument `trainer.callbacks` expected AverageWeights for a graph module but got "
                    f"{type(callback).__name__}, which can average buffers too, such as the factors. Give "
                    "callbacks.AverageWeights."
                )

    def on_fit_start(self) -> None:
        """Find parameters for which DistributedDataParallel would wait forever."""
        model = self.trainer.model
        if not isinstance(model, DistributedDataParallel):
            return
        if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.modules()):
            model.broadcast_buffers = False  # all are equal since the start; the factors are large
        if model.find_unused_parameters:
            return
        plugin, was_training = self.trainer.precision_plugin, self.training
        self.eval()  # norms keep their statistics
        with isolate_rng(), torch.enable_grad(), plugin.train_step_context():
            batch = next(iter(self.trainer.datamodule.train_dataloader()))
            batch = plugin.convert_input(self.trainer.datamodule.transfer_batch_to_device(batch, self.device, 0))
            learned = {name: value for name, value in self.named_parameters() if value.requires_grad}
            loss = self.losses(batch, 0)["loss"]
            gradients = torch.autograd.grad(loss, list(learned.values()), allow_unused=True)
        self.train(was_training)
        unused = [name for name, gradient in zip(learned, gradients, strict=True) if gradient is None]
        if unused:
            raise ValueError(
                f"The loss of {type(self).__name__} does not depend on {', '.join(unused)}, for whose gradients several "
                "processes would wait. Use trainer.strategy = ddp_find_unused_parameters_true, or one process."
            )

    def forward(self, batch: Data) -> tuple[Tensor, Tensor | None]:
        """Compute embeddings and logits."""
        return self.encode(batch)

    def validation_step(self, batch: Data, batch_idx: int) -> None:
        """Measure the validation nodes of a batch."""
        self._measure(batch, "val")

    def test_step(self, batch: Data, batch_idx: int) -> None:
        """Measure the test nodes of a batch."""
        self._measure(batch, "test")

    def _measure(self, batch: Data, split: str) -> None:
        mask, whole = batch[f"{split}_mask"], "num_seeds" not in batch
        if not self.supervised:
            if split == "val" and self.trainer.is_global_zero and self._embedded is None:
                self._embedded = self.encode(batch)[0].float().cpu() if whole else self.embed_all()[0]
            return
        if not mask.any() or (whole and not self.trainer.is_global_zero):  # else each process would count the same nodes
            return
        logits = self.encode(batch)[1]
        predicted, labels = logits[mask].float(), batch.y[mask]
        for name, metric in self.metrics[split].items():
            if name == "loss":
                metric.update(nn.functional.cross_entropy(predicted, labels, reduction="none"))
            else:
                metric.update(predicted, labels)

    def on_validation_epoch_start(self) -> None:
        """Start with no measured node."""
        self._restart("val")

    def on_test_epoch_start(self) -> None:
        """Start with no measured node."""
        self._restart("test")

    def _restart(self, split: str) -> None:
        self.metrics[split].reset()
        # In float32 a sum would depend on which process adds what; MPS has nothing wider.
        self.metrics[split]["loss"].set_dtype(torch.float32 if self.device.type == "mps" else torch.float64)
        self._embedded = None

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the validation nodes; without logits those of a linear probe."""
        if self.supervised:
            self._log_scores("val")
        else:
            self._log_selected(self.trainer.strategy.broadcast(self._probe()))

    def on_test_epoch_end(self) -> None:
        """Log the scores of the test nodes, a linear probe on all embeddings, and how well k-means finds the classes."""
        if self.supervised:
            self._log_scores("test")
        scores: dict[str, float] = {}
        if self.trainer.is_global_zero:
            embeddings, data = self.embed_all()[0], self.graph_facts.graph
            masks = (data.train_mask.cpu(), data.val_mask.cpu(), data.test_mask.cpu())
            scores["probe_accuracy"] = linear_probe(embeddings, data.y.cpu(), *masks)
            if not self.supervised:
                scores["accuracy"] = scores["probe_accuracy"]
            scores |= clustering_scores(embeddings, data.y.cpu(), self.num_classes)
        for name, value in self.trainer.strategy.broadcast(scores).items():
            self._log_equal(f"test/{name}", value)

    def _log_equal(self, name: str, value: float | Tensor) -> None:
        """Log what all processes have alike."""
        self.log(name, value, prog_bar=name.endswith("/accuracy"), sync_dist=True, reduce_fx="max")

    def _log_selected(self, accuracy: float | Tensor) -> None:
        """Log what chooses the epoch: the accuracy, less 1 while warming up, so that any later epoch is better."""
        self._log_equal("val/accuracy", accuracy)
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._log_equal("val/selection", accuracy - float(self.current_epoch < self.warmup_epochs))

    def _log_scores(self, split: str) -> None:
        if not any(gathered(self.metrics[split]["loss"].update_called)):
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*was called before the ``update`` method")  # in processes without nodes
            values = self.metrics[split].compute()
        for name, value in values.items():
            if (split, name) == ("val", "accuracy"):
                self._log_selected(value)
            else:
                self._log_equal(f"{split}/{name}", value)

    def _probe(self) -> float:
        if not self.trainer.is_global_zero:
            return 0.0
        data = self.graph_facts.graph
        train, val = data.train_mask.cpu(), data.val_mask.cpu()
        return linear_probe(self._embedded, data.y.cpu(), train, val, val)

    @torch.no_grad()
    def embed_all(self) -> tuple[Tensor, Tensor | None]:
        """Compute embeddings (N, H) and logits (N, C) of all nodes in their order, on the CPU, in evaluation mode.

        A process can ask alone: it takes no other's help.
        """
        training, parts = self.training, []
        self.eval()
        for batch in graph_data_of(self.trainer, self).all_nodes_dataloader():
            batch = self.trainer.datamodule.transfer_batch_to_device(batch, self.device, 0)
            seeds = slice(0, int(batch.get("num_seeds", batch.num_nodes)))
            parts.append([None if values is None else values[seeds].float().cpu() for values in self.encode(batch)])
        self.train(training)
        embeddings, logits = zip(*parts, strict=True)
        return torch.cat(embeddings), None if logits[0] is None else torch.cat(logits)

    def predict_step(self, batch: Data, batch_idx: int) -> dict[str, Tensor]:
        """Return embeddings and, where supervised, class probabilities of the nodes of a batch."""
        embeddings, logits = self.encode(batch)
        seeds = slice(0, int(batch.get("num_seeds", batch.num_nodes)))
        found = {"node_ids": batch.node_ids[seeds], "embeddings": embeddings[seeds].float()}
        if logits is not None:
            found["probabilities"] = logits[seeds].float().softmax(-1)
        if "num_seeds" in batch or self.trainer.is_global_zero:  # each process has the whole graph
            self._predicted.add(found)
        return found

    def on_predict_epoch_end(self) -> None:
        """Write predictions.safetensors, nodes in their order, to the run's folder."""
        self._predicted.write(self.trainer)

    def configure_optimizers(self) -> Any:
        """Make Adam over all parameters; on a CPU in one kernel, where a loop takes as long as a small model's gradients."""
        parameters = list(self.parameters())
        # In mixed precision Lightning clips no gradients of a fused optimizer.
        mixed = self._trainer is not None and isinstance(self._trainer.precision_plugin, MixedPrecision)
        fused = True if not mixed and all(parameter.device.type == "cpu" for parameter in parameters) else None
        return torch.optim.Adam(parameters, lr=self.learning_rate, weight_decay=self.weight_decay, fused=fused)

"""Train a method of the graph studies once and measure it; several runs take turns, so that small ones can share a GPU."""

import contextlib
import copy
import functools
import json
import time
from typing import Any

import torch

from benchmarks.graph_settings import class_of, module_arguments

MAX_EPOCHS, PATIENCE = 400, 80
PROBED_EPOCHS, PROBE_EVERY = 300, 50


class Run:
    """One training in progress. Each method takes epochs in its turn, so that small ones can share a GPU.

    The loop is the Trainer's for one whole-graph batch an epoch (tests/benchmarks/test_graph_training.py holds them together),
    without its hooks. It ends PATIENCE epochs after the best validation accuracy, but not before pseudo-labels had as many.
    Only epochs after the warm-up are chosen, since before it there are no pseudo-labels to judge. Among equal validation
    accuracies the lower loss wins; without logits a linear probe measures every PROBE_EVERY epochs, and the chosen embeddings
    are clustered too.
    """

    def __init__(self, method: str, arguments: dict[str, Any], data: dict[str, Any], seed: int, data_seed: int = 0) -> None:
        import lightning_modules

        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        self.batch, num_classes = graph_on(device, json.dumps({**data, "seed": data_seed}))
        self.start, self.epoch = time.perf_counter(), 0
        torch.manual_seed(seed)
        name = class_of(method)
        self.module = getattr(lightning_modules, name)(**module_arguments(name, arguments))
        self.module.num_classes = num_classes
        self.module.build(self.batch, num_classes)
        self.module.to(device).train()
        self.history = torch.zeros(MAX_EPOCHS, 3, device=device)
        """Validation accuracy, negative validation loss and test accuracy of each epoch, or of each probe."""
        self.probed: list[torch.Tensor] = []
        """Embeddings (N, H) of each probe."""
        self.steps = Steps(self.module, self.batch)
        self.random = torch.get_rng_state()
        """Of the CPU: each run has its own stream, whatever trains beside it. On a GPU all draw from one."""

    def advance(self) -> bool:
        """Train for one more epoch, and tell whether there is another."""
        torch.set_rng_state(self.random)
        try:
            return self._advance()
        finally:
            self.random = torch.get_rng_state()

    def _advance(self) -> bool:
        if not self.module.supervised:
            return self._advance_probed()
        with self.steps.on_stream():
            self.steps.train(self.epoch)
            self.history[self.epoch] = self.steps.evaluate()
            self.epoch += 1
            if self.epoch % 20 == 0:  # looked at seldom, since looking waits for the GPU
                first = min(self.steps.phases[-1], self.epoch - 1)
                best = first + int(self.history[first : self.epoch, 0].argmax())
                return self.epoch < min(max(best, self.steps.phases[-1]) + PATIENCE, MAX_EPOCHS)
        return self.epoch < MAX_EPOCHS

    def _advance_probed(self) -> bool:
        from lightning_modules import CSG2L
        from lightning_modules.parts.node_probes import probe_predictions

        if isinstance(self.module, CSG2L) and self.module.clusters_due(self.epoch):
            self.module.take_clusters(*self.module.clustered(self._embeddings()))
        self.steps.train(self.epoch)
        self.epoch += 1
        if self.epoch % PROBE_EVERY == 0:
            whole, embeddings = copy.copy(self.batch).cpu(), self._embeddings()
            self.probed.append(embeddings)
            right = probe_predictions(embeddings, whole.y, whole.train_mask, whole.val_mask) == whole.y
            val, test = (right[mask].double().mean().item() for mask in (whole.val_mask, whole.test_mask))
            self.history[self.epoch // PROBE_EVERY - 1] = torch.tensor([val, 0.0, test])
        return self.epoch < PROBED_EPOCHS

    @torch.no_grad()
    def _embeddings(self) -> torch.Tensor:
        self.module.eval()
        found = self.module.encode(self.batch)[0].float().cpu()
        self.module.train()
        return found

    def result(self) -> dict[str, float]:
        """Accuracies at the best validation epoch after the warm-up, at the end, and at the best of all (`any`)."""
        every = 1 if self.module.supervised else PROBE_EVERY
        with self.steps.on_stream():
            history = self.history[: self.epoch // every].tolist()
        first = min(self.module.warmup_epochs // every, len(history) - 1)
        best = max(range(first, len(history)), key=lambda epoch: history[epoch][:2])
        found = {"val": history[best][0], "test": history[best][2], "last_test": history[-1][2]}
        earliest = max(history, key=lambda epoch: epoch[:2])
        found |= {"any_val": earliest[0], "any_test": earliest[2]}
        if self.probed:
            from lightning_modules.parts.node_probes import clustering_scores

            found |= clustering_scores(self.probed[best], self.batch.y.cpu(), self.module.num_classes)
        return found | {"epochs": self.epoch, "best_epoch": (best + 1) * every, "seconds": time.perf_counter() - self.start}


def train_together(runs: list[tuple]) -> list[dict[str, float] | Exception]:
    """Results of several runs, given as arguments of Run, an epoch of each in turn; of one that fails its error."""
    found: list[Any] = [None] * len(runs)
    active = {}
    for number, arguments in enumerate(runs):
        try:
            active[number] = Run(*arguments)
        except Exception as error:
            found[number] = error
    while active:
        for number, run in list(active.items()):
            try:
                if run.advance():
                    continue
                found[number] = run.result()
            except Exception as error:
                found[number] = error
            del active[number]
    return found


class Steps:
    """Training steps and evaluations of one module on one graph; on a GPU captured once and replayed where that can be done."""

    def __init__(self, module, batch) -> None:
        self.module, self.batch = module, batch
        self.optimizer = module.configure_optimizers()
        fixed_shapes = module.encoder.symmetric and not module.draws_edges
        self.captures = batch.x.is_cuda and module.supervised and fixed_shapes
        for group in self.optimizer.param_groups:
            group["capturable"] = self.captures
        self.phases = sorted({0, module.warmup_epochs})
        self.graph = self.eval_graph = None
        self.stream = torch.cuda.Stream() if self.captures else None
        if self.captures:
            self.stream.wait_stream(torch.cuda.current_stream())

    def on_stream(self):
        """Put what follows on this run's stream."""
        return torch.cuda.stream(self.stream) if self.captures else contextlib.nullcontext()

    def train(self, epoch: int) -> None:
        """Train for one epoch. A phase begins with three steps run for real, then its step is captured."""
        if not self.captures:
            return self._step(epoch)
        since = epoch - max(phase for phase in self.phases if phase <= epoch)
        if since < 3:
            return self._step(epoch)
        if since == 3:
            self.stream.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self._step(epoch)
        self.graph.replay()
        return None

    def _step(self, epoch: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.module.losses(self.batch, epoch)["loss"].backward()
        self.optimizer.step()

    def evaluate(self) -> torch.Tensor:
        """Validation accuracy, negative validation loss and test accuracy, (3,)."""
        if not self.captures:
            return self._evaluate()
        if self.eval_graph is None:
            self._evaluate()
            self.stream.synchronize()
            self.eval_graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.eval_graph, stream=self.stream):
                self.measured = self._evaluate()
        self.eval_graph.replay()
        return self.measured

    @torch.no_grad()
    def _evaluate(self) -> torch.Tensor:
        from functional.graph import masked_cross_entropy

        self.module.eval()
        logits, batch = self.module.encode(self.batch)[1].float(), self.batch
        self.module.train()
        right = (logits.argmax(1) == batch.y).float()
        val, test = ((right * mask).sum() / mask.sum() for mask in (batch.val_mask, batch.test_mask))
        return torch.stack([val, -masked_cross_entropy(logits, batch.y, batch.val_mask), test])


@functools.lru_cache(maxsize=8)
def graph_on(device: torch.device, arguments: str):
    """The graph of a GraphDataModule on a device, and its number of classes."""
    from datamodules import GraphDataModule

    module = GraphDataModule(**json.loads(arguments))
    module.setup()
    return module.data.to(device), module.num_classes

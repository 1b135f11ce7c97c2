"""The benchmark's loop is the Trainer's; which epoch is chosen; runs that take turns."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from benchmarks import graph_settings, graph_training
from datamodules import GraphDataModule
from lightning_modules import CSG2L, NodeClassifier

WINE = {"source": "wine", "labels_per_class": 5, "num_val": 40, "num_test": -1}
SMALL = {"hidden_channels": 16, "warmup_epochs": 4, "head_channels": 8, "anchors": 64, "rank": 20, "pseudo_weight": 0.3}


@pytest.mark.parametrize(
    ("method", "arguments"), [("csg2l, gcn", SMALL), ("gat", {"encoder": "gat", "hidden_channels": 16})], ids=["csg2l", "gat"]
)
def test_the_loop_is_the_trainers(method, arguments, tmp_path):
    seen = []

    class Watch(Callback):
        def on_validation_end(self, trainer, module):
            seen.append((float(trainer.callback_metrics["val/accuracy"]), -float(trainer.callback_metrics["val/loss"])))

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=15, accelerator="cpu", num_sanity_val_steps=0, callbacks=[Watch()], **quiet)
    torch.manual_seed(3)
    cls = CSG2L if "csg2l" in method else NodeClassifier
    module = cls(**graph_settings.module_arguments(cls.__name__, arguments))
    trainer.fit(module, datamodule=GraphDataModule(**WINE, seed=1))
    run = graph_training.Run(method, arguments, WINE, seed=3, data_seed=1)
    for _ in range(15):
        run.advance()
    torch.testing.assert_close(run.history[:15, :2], torch.tensor(seen), rtol=1e-5, atol=1e-6)
    best = max(range(run.module.warmup_epochs, 15), key=lambda epoch: seen[epoch])
    assert run.result()["val"] == pytest.approx(seen[best][0]) and run.result()["best_epoch"] == best + 1


@pytest.mark.parametrize("view", [{"rank": 20}, {"view": "drop", "drop_edges": 0.4, "drop_features": 0.4}], ids=["svd", "drop"])
def test_clusters_are_those_of_the_trainer(view):
    """Without labels: the weights after clusters have weighed pairs, and the clusters themselves."""
    arguments = {"supervised": False, "hidden_channels": 16, "warmup_epochs": 3, "cluster_every": 4, "head_channels": 8} | view
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=9, accelerator="cpu", num_sanity_val_steps=0, **quiet)
    torch.manual_seed(3)
    module = CSG2L(**graph_settings.module_arguments("CSG2L", arguments))
    trainer.fit(module, datamodule=GraphDataModule(**WINE, seed=1))
    run = graph_training.Run("csg2l, default", arguments, WINE, seed=3, data_seed=1)
    for _ in range(9):
        run.advance()
    assert len(module.clusters.unique()) == 3 and torch.equal(run.module.clusters, module.clusters)
    torch.testing.assert_close(run.module.state_dict(), module.state_dict(), rtol=1e-5, atol=1e-6, check_device=False)


def test_epochs_of_the_warm_up_are_not_chosen():
    """What any epoch gives stands beside it."""
    run = graph_training.Run("csg2l, default", SMALL, WINE, 0)
    run.epoch, run.history[:6] = (
        6,
        torch.tensor([[0.9, 0, 1.0], [0.1, 0, 0], [0, 0, 0], [0, 0, 0], [0.6, -1, 0.3], [0.6, -0.5, 0.4]]),
    )
    found = run.result()
    assert (found["val"], found["test"], found["best_epoch"]) == (pytest.approx(0.6), pytest.approx(0.4), 6)
    assert (found["any_val"], found["any_test"]) == (pytest.approx(0.9), pytest.approx(1.0))


def test_unsupervised_runs_are_probed(monkeypatch):
    monkeypatch.setattr(graph_training, "PROBED_EPOCHS", 20)
    monkeypatch.setattr(graph_training, "PROBE_EVERY", 10)
    (found,) = graph_training.train_together([("dgi", {"hidden_channels": 32}, WINE, 0)])
    assert found["test"] > 0.7 and found["epochs"] == 20 and found["best_epoch"] in (10, 20)
    assert 0.3 < found["nmi"] < 1 and 0.3 < found["ari"] < 1


def test_a_run_is_the_same_beside_others(monkeypatch):
    monkeypatch.setattr(graph_training, "MAX_EPOCHS", 12)
    one, other = ("csg2l, default", SMALL, WINE, 0), ("csg2l, default", SMALL | {"view": "drop"}, WINE, 1)

    def found(runs):
        return [{name: value for name, value in result.items() if name != "seconds"} for result in
                graph_training.train_together(runs)]  # fmt: skip

    assert found([one, other, one])[::2] == found([one]) * 2


def test_a_run_that_fails_leaves_the_others():
    short = {"encoder": "gcn", "hidden_channels": 4}
    good, bad = graph_training.train_together([("gcn", short, WINE, 0), ("gcn", {"encoder": "gnc"}, WINE, 0)])
    assert good["test"] > 0.5 and isinstance(bad, ValueError)

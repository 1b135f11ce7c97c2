"""CSG2L and its baselines on real small graphs: learning, resuming, measuring, writing."""

import itertools
from dataclasses import replace

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from callbacks import AverageWeights, GraphMonitor
from datamodules import GraphDataModule
from functional.graph import node_weights, reweighted_info_nce
from lightning_modules import (
    CSG2L,
    DGI,
    GRACE,
    ClusteredLabels,
    Contrast,
    DropView,
    NodeClassifier,
    PredictedLabels,
    PurifiedView,
    SvdView,
)
from lightning_modules.csg2l import DRAWS
from lightning_modules.parts.node_probes import STRENGTHS, clustering_scores, linear_probe

CONTRAST = Contrast(head_channels=16, anchors=64)
LABELS = PredictedLabels(warmup_epochs=3)
SMALL = {"hidden_channels": 32, "view": SvdView(rank=20), "contrast": CONTRAST, "pseudo_labels": LABELS}
UNLABELLED = SMALL | {"supervised": False, "pseudo_labels": ClusteredLabels(warmup_epochs=3, every=7)}


def graph(**options):
    return GraphDataModule("wine", labels_per_class=5, num_val=40, num_test=-1, **options)


def quiet(path, epochs=30, **options):
    defaults = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=path, max_epochs=epochs, accelerator="cpu", **{**defaults, **options})


def trained(module, path, epochs=30, data=None, **options):
    seed_everything(0, verbose=False)
    trainer, data = quiet(path, epochs, **options), data or graph()
    trainer.fit(module, datamodule=data)
    return trainer, data


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"view": "drop"},
        {"fusion": "local"},
        {"fusion": "concat"},
        {"fusion": "attention"},
        {"contrast": replace(CONTRAST, form="hsan")},
        {"contrast": replace(CONTRAST, form="negatives")},
        {"view": SvdView("normalized", rank=20, mix=1.0)},
        {"view": SvdView("joint", rank=20, mix=1.0)},
        {"view": SvdView("purified", rank=20), "local_view": "purified"},
        {"view": "knn", "local_view": "mlp"},
        {"view": "knn", "local_view": "purified", "encoder": "gat"},
        {"view": SvdView("diffused", rank=20), "contrast": replace(CONTRAST, intra_view=True)},
        {"contrast": Contrast(head_channels=0, anchors=0), "encoder": "gat"},
        {"contrast": Contrast(weight=0.0), "encoder": "graphsage"},
        {"encoder": "gin", "pseudo_labels": "predicted"},  # sums learn slowly
        {"encoder": "appnp"},
        {"encoder": "sgc"},
        {"encoder": "decoupled"},
        {"encoder": "decoupled", "view": "knn", "local_view": "mlp", "fusion": "attention"},
        {"encoder": "decoupled", "view": "drop"},
        {"encoder": "decoupled", "encoder_args": {"dimensions": None, "length": 2.0}},
        {"pseudo_labels": PredictedLabels(alignment=0.0, confident="mean", warmup_epochs=3, balanced=True, clean=True)},
        {"pseudo_labels": PredictedLabels(warmup_epochs=3, beta=1.0)},
    ],
    ids=str,
)
def test_learns_wines(options, tmp_path):
    module = CSG2L(**{**SMALL, **options})
    trainer, data = trained(module, tmp_path, epochs=100 if module.hparams.encoder == "gin" else 30)
    scores = trainer.test(module, datamodule=data, verbose=False)[0]
    assert scores["test/accuracy"] > 0.8 and scores["test/probe_accuracy"] > 0.8  # chance is 0.4
    assert {"test/macro_f1", "test/calibration_error", "test/nmi", "test/ari", "test/loss"} <= scores.keys()


@pytest.mark.parametrize(
    "module",
    [
        NodeClassifier(hidden_channels=32),
        NodeClassifier(hidden_channels=32, pseudo_weight=0.5, warmup_epochs=10),
        NodeClassifier("decoupled", hidden_channels=32),
        NodeClassifier(hidden_channels=32, local_view="purified"),
        NodeClassifier("decoupled", hidden_channels=32, local_view=PurifiedView(rank=10)),
        NodeClassifier("gat", hidden_channels=32, local_view="mlp"),
        DGI(hidden_channels=32),
        GRACE(hidden_channels=32, head_channels=16, learning_rate=5e-3),
        CSG2L(**UNLABELLED),
    ],
    ids=["gcn", "pseudo", "decoupled", "gcn-svd", "decoupled-svd", "mlp", "dgi", "grace", "csg2l-self"],
)
def test_baselines_learn_wines(module, tmp_path):
    trainer, data = trained(module, tmp_path)
    assert trainer.callback_metrics["val/accuracy"] > 0.8
    assert trainer.test(module, datamodule=data, verbose=False)[0]["test/accuracy"] > 0.8


def test_gcn_svd_against_dense_matrices(tmp_path):
    """P relu(P X W + b) W' + b', P = D^-½ (A_q + I) D^-½ of the raw adjacency's best approximation of rank q, in float64."""
    module = NodeClassifier(hidden_channels=8, dropout=0.0, local_view=PurifiedView(rank=7))
    trainer, data = trained(module, tmp_path, 3, GraphDataModule("karate", labels_per_class=1, num_val=9, num_test=-1))
    x, (source, target) = data.data.x.double(), data.data.edge_index
    u, s, vt = torch.linalg.svd(torch.zeros(34, 34, dtype=torch.float64).index_put((target, source), x.new_ones(())))
    low = (u[:, :7] * s[:7]) @ vt[:7]
    degree = (low.sum(1) + 1).clamp_min(1)
    matrix = (low + torch.eye(34)) / (degree[:, None] * degree).sqrt()
    first, second = module.encoder.body.convs[0], module.encoder.head.convs[0]
    with torch.no_grad():
        hidden = (matrix @ (x @ first.lin.weight.T.double()) + first.bias).relu()
        wanted = matrix @ (hidden @ second.lin.weight.T.double()) + second.bias
        torch.testing.assert_close(module.encode(data.data)[1].double(), wanted, rtol=1e-3, atol=1e-4)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"]
    assert stored["local_view"] == {"class_path": "PurifiedView", "init_args": {"rank": 7, "seed": 0}}
    again = NodeClassifier(hidden_channels=8, dropout=0.0, local_view=PurifiedView(rank=7, seed=4))
    found = quiet(tmp_path).test(again, data, ckpt_path=tmp_path / "x.ckpt", weights_only=True, verbose=False)[0]
    assert torch.equal(again.local_factor_u, module.local_factor_u)
    assert found == trainer.test(module, data, verbose=False)[0]


def test_loss_is_the_weighted_sum_of_its_terms():
    """Cross-entropy of the fused logits + λ · contrast + cross-entropy of each view on the confident nodes' pseudo-labels."""
    data = graph()
    data.setup()
    contrast = Contrast(weight=0.7, head_channels=16, anchors=0)
    labels = PredictedLabels(weight=0.4, confident=0.5, warmup_epochs=3)
    batch, module = data.data, CSG2L(**SMALL | {"dropout": 0.0, "contrast": contrast, "pseudo_labels": labels})
    module.build(batch, 3)
    found = module.losses(batch, module.warmup_epochs)
    with torch.no_grad():
        local, other = module.views(batch)
        logits = (local[1] + other[1]) / 2
        labels, confident = module.trusted(batch, logits, module.warmup_epochs)
        train, taught = batch.train_mask, confident & ~batch.train_mask

        def entropy(values, labels, mask):
            return -values.double().log_softmax(1)[mask, labels[mask]].mean()

        assert torch.equal(labels[train], batch.y[train]) and (confident[train]).all() and taught.any()
        supervised = entropy(logits, batch.y, train)
        pseudo = (entropy(local[1], labels, taught) + entropy(other[1], labels, taught)) / 2
        z_a, z_b = (torch.nn.functional.normalize(module.head(hidden)) for hidden in (local[0], other[0]))
        contrast = reweighted_info_nce(z_a, z_b, labels, confident)  # tested by itself
    assert float(found["cross_entropy"]) == pytest.approx(float(supervised), rel=1e-5)
    assert float(found["pseudo_cross_entropy"]) == pytest.approx(float(pseudo), rel=1e-5)
    assert float(found["loss"]) == pytest.approx(float(supervised + 0.7 * contrast + 0.4 * pseudo), rel=1e-5)
    early = module.losses(batch, module.warmup_epochs - 1)
    assert early.keys() == {"cross_entropy", "contrast", "loss"}


def test_balanced_softmax_on_the_labels_of_a_pass_without_dropout():
    """The teacher is the pass without dropout; each view's logits get the logarithm of the shares among the taught."""
    data = graph()
    data.setup()
    labels = PredictedLabels(alignment=0.0, confident="mean", warmup_epochs=0, balanced=True, clean=True)
    batch, module = data.data, CSG2L(**SMALL | {"contrast": Contrast(weight=0.0), "pseudo_labels": labels})
    module.build(batch, 3)
    module.eval()
    with torch.no_grad():
        logits = module.encode(batch)[1].double()
    confidence, predicted = logits.softmax(1).max(1)
    taught = ~batch.train_mask & (confidence >= confidence[~batch.train_mask].mean())
    counts = torch.stack([(predicted[taught] == c).sum() for c in range(3)]).clamp_min(1).double()
    module.train()
    for seen in (True, False):  # whether the pass of a validation is at hand
        torch.manual_seed(0)
        found = module.losses(batch, 0)
        torch.manual_seed(0)
        views = module.views(batch)
        wanted = 0
        for _, values in views:
            values = (values.double() + (counts / counts.sum()).log()).log_softmax(1)
            wanted = wanted - values[taught, predicted[taught]].mean() / 2
        assert float(found["pseudo_cross_entropy"]) == pytest.approx(float(wanted), rel=1e-4), seen
        module._clean = None


def test_nodes_are_weighed_by_their_disagreement():
    """Each taught node's cross-entropy times its weight, of both views, over the number of taught nodes."""
    data = graph()
    data.setup()
    labels = PredictedLabels(confident=0.5, warmup_epochs=0, beta=-2.0)
    batch, module = data.data, CSG2L(**SMALL | {"dropout": 0.0, "contrast": Contrast(weight=0.0), "pseudo_labels": labels})
    module.build(batch, 3)
    found = module.losses(batch, 0)["pseudo_cross_entropy"]
    with torch.no_grad():
        local, other = module.views(batch)
        labels, confident = module.trusted(batch, (local[1] + other[1]) / 2, 0)
        taught = confident & ~batch.train_mask
        z_a, z_b = (torch.nn.functional.normalize(hidden) for hidden in (local[0], other[0]))
        weights = node_weights(z_a, z_b, labels, confident, taught, 3, -2.0).double()  # tested by itself
        terms = [-logits.double().log_softmax(1)[taught, labels[taught]] for logits in (local[1], other[1])]
    assert float(found) == pytest.approx(float((weights[taught] * sum(terms) / 2).mean()), rel=1e-5)
    assert weights.max() > 1.05


def test_a_teacher_without_dropout_follows_the_weights():
    data = graph()
    data.setup()
    labels = PredictedLabels(warmup_epochs=0, clean=True)
    batch, module = data.data, CSG2L(**SMALL | {"contrast": Contrast(weight=0.0), "pseudo_labels": labels})
    module.build(batch, 3)
    module.eval()
    before = module.encode(batch)[1]
    module.train()
    assert torch.equal(module.taught_by(batch, before, 0), before)
    with torch.no_grad():
        module.encoder.head.convs[0].bias.add_(torch.tensor([1.0, 0.0, 0.0]))
    after = module.taught_by(batch, before, 0)
    torch.testing.assert_close(after, before + torch.tensor([1.0, 0.0, 0.0]))
    assert module.training


@pytest.mark.parametrize("options", [{}, {"fusion": "attention"}, {"view": "drop"}], ids=str)
@pytest.mark.parametrize("epoch", [0, 5])
def test_a_decoupled_step_encodes_only_the_nodes_that_teach(epoch, options, monkeypatch):
    """Losses and gradients are those of all nodes, by a reference in float64, before and after the warm-up."""
    data = graph()
    data.setup()
    labels = PredictedLabels(warmup_epochs=3, clean=True, balanced=True, confident="mean")
    settings = {"encoder": "decoupled", "dropout": 0.0, "contrast": Contrast(weight=0.0), "pseudo_labels": labels}
    torch.manual_seed(0)
    module, batch = CSG2L(**SMALL | settings | options), data.data
    module.build(batch, 3)
    module.double().train()
    rows, forward = [], module.encoder.forward

    def watched(x, *rest):
        rows.append(len(x))
        return forward(x, *rest)

    monkeypatch.setattr(module.encoder, "forward", watched)
    torch.manual_seed(1)
    found = module.losses(batch, epoch)
    found["loss"].backward()
    gradients = [parameter.grad.clone() for parameter in module.parameters() if parameter.requires_grad]
    module.eval()
    with torch.no_grad():
        given, confidence = _taught(module.encode(batch)[1], batch)
    module.train()
    torch.manual_seed(1)
    local, other = module.views(batch)
    known = batch.train_mask
    wanted = -module.fused(local, other).log_softmax(1)[known, batch.y[known]].mean()
    chosen = known if epoch == 0 else known | (confidence >= confidence[~known].mean())
    if epoch:
        taught = chosen & ~known
        shares = torch.bincount(given[taught], minlength=3).clamp_min(1).double()
        shift = (shares / shares.sum()).log()
        terms = [-(view[1] + shift).log_softmax(1)[taught, given[taught]].mean() for view in (local, other)]
        wanted = wanted + sum(terms) / 2
        assert float(found["confident_share"]) == pytest.approx(chosen.double().mean().item())
    assert rows[-3] == 2 * int(chosen.sum()) < 2 * len(chosen)
    torch.testing.assert_close(found["loss"], wanted.detach(), rtol=1e-5, atol=1e-7)
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for one, two in zip(gradients, torch.autograd.grad(wanted, trainable), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def _taught(logits, batch):
    """Pseudo-labels and confidence with two labels a class as prior, where five are known."""
    shifted = logits - 2 / 7 * logits.softmax(1).mean(0).log()
    confidence, labels = shifted.softmax(1).max(1)
    return labels.where(~batch.train_mask, batch.y), confidence


def test_a_teacher_of_a_sampled_batch_is_its_own(tmp_path, monkeypatch):
    """Batches come and go, and one may lie where validation's last one lay: its labels are from its own nodes all the same."""
    right, clean_logits = [], CSG2L.clean_logits

    def watched(self, batch):
        found = clean_logits(self, batch)
        self._clean = None
        right.append(torch.equal(found, clean_logits(self, batch)))
        return found

    monkeypatch.setattr(CSG2L, "clean_logits", watched)
    labels = PredictedLabels(warmup_epochs=0, clean=True)
    module = CSG2L(**SMALL | {"encoder": "decoupled", "contrast": Contrast(weight=0.0), "pseudo_labels": labels})
    trained(module, tmp_path, epochs=30, data=graph(batch_size=8, fanout=[3, 3]))
    assert len(right) > 30 and all(right)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_can_be_clipped(precision, tmp_path):
    """With the fused Adam of a CPU, and in mixed precision, for which Lightning accepts none."""
    module, norms = NodeClassifier("graphsage", hidden_channels=8), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            norms.append(float(torch.nn.utils.get_total_norm([parameter.grad for parameter in pl_module.parameters()])))

    trained(module, tmp_path, epochs=3, precision=precision, gradient_clip_val=1e-3, callbacks=[Watch()])
    assert norms == pytest.approx([1e-3] * 3, rel=1e-2)


@pytest.mark.parametrize(
    "module",
    [
        NodeClassifier("gcn", hidden_channels=8),
        NodeClassifier("gat", hidden_channels=8),
        NodeClassifier("appnp", hidden_channels=8, local_view=PurifiedView(rank=5)),
        CSG2L(**SMALL),
        CSG2L(**SMALL | {"view": DropView()}),
        CSG2L(**SMALL | {"encoder": "decoupled"}),
        DGI(hidden_channels=8),
    ],
    ids=["gcn", "gat", "appnp", "csg2l", "csg2l-drop", "csg2l-decoupled", "dgi"],
)
def test_mixed_precision_on_a_cpu(module, tmp_path):
    """Whose sparse products know no bfloat16: the embeddings are those of float32 up to rounding."""
    data = GraphDataModule("karate", labels_per_class=1, num_val=9, num_test=-1)  # the identity, which is sparse
    trained(module, tmp_path, epochs=5, data=data, precision="bf16-mixed")
    module.eval()
    with torch.no_grad():
        exact = module.encode(data.data)[0]
        with torch.autocast("cpu", torch.bfloat16):
            mixed = module.encode(data.data)[0].float()
    assert torch.isfinite(exact).all() and exact.abs().max() > 0
    torch.testing.assert_close(mixed, exact, rtol=0.05, atol=0.02 * float(exact.abs().max()))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_weights_that_are_not_float32_are_refused(precision, tmp_path):
    with pytest.raises(ValueError, match=f"`trainer.precision` expected 32-true or a mixed one .* but got {precision}"):
        trained(NodeClassifier("gcn", hidden_channels=8), tmp_path, epochs=1, precision=precision)


def test_a_pass_with_averaged_weights_is_no_teacher(tmp_path):
    """Validation has the average, training has its own weights: the teacher is that of training."""
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            module.eval()
            with torch.no_grad():
                fresh = module.fused(*module.views(batch))
            module.train()
            seen.append(torch.equal(module.taught_by(batch, fresh + 1, module.current_epoch), fresh))

    labels = PredictedLabels(warmup_epochs=0, clean=True)
    options = SMALL | {"contrast": Contrast(weight=0.0), "pseudo_labels": labels}
    for averaged in ([], [AverageWeights(decay=0.5)]):
        trained(CSG2L(**options), tmp_path, 4, callbacks=[*averaged, Watch()])
    assert seen == [True] * 8


def test_epochs_of_the_warm_up_are_not_chosen(tmp_path):
    """The best of the accuracies after it is kept, and early stopping sees the same."""
    seen = []

    class Watch(Callback):
        def on_validation_end(self, trainer, module):
            seen.append({name: float(trainer.callback_metrics[f"val/{name}"]) for name in ("accuracy", "selection")})

    checkpoint = ModelCheckpoint(tmp_path, monitor="val/selection", mode="max")
    trained(
        CSG2L(**SMALL | {"pseudo_labels": PredictedLabels(warmup_epochs=6)}),
        tmp_path,
        9,
        callbacks=[Watch(), checkpoint],
        enable_checkpointing=True,
        num_sanity_val_steps=0,
    )
    assert len(seen) == 9
    for epoch, found in enumerate(seen):
        assert found["selection"] == pytest.approx(found["accuracy"] - (epoch < 6), abs=1e-6)
    assert float(checkpoint.best_model_score) == pytest.approx(max(found["accuracy"] for found in seen[6:]))


@pytest.mark.parametrize("arguments", [{}, {"dimensions": None, "length": 2.0}])
def test_an_encoder_on_propagated_features_sees_no_edges_and_comes_back_from_a_checkpoint(arguments, tmp_path):
    module = CSG2L(**SMALL | {"encoder": "decoupled", "encoder_args": arguments})
    trainer, data = trained(module, tmp_path, 3)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = CSG2L(**SMALL | {"encoder": "decoupled", "encoder_args": arguments, "view": SvdView(rank=20, seed=5)})
    quiet(tmp_path).validate(again, datamodule=data, ckpt_path=tmp_path / "x.ckpt", weights_only=True, verbose=False)
    assert torch.equal(again.prepared_1, module.prepared_1)
    batch = data.data.clone()
    module.eval()
    before = module.encode(batch)
    batch.edge_index = batch.edge_index[:, :10]
    assert all(torch.equal(one, other) for one, other in zip(before, module.encode(batch), strict=True))


def test_an_encoder_on_propagated_features_takes_one_of_some_drawn_graphs_in_each_step(tmp_path):
    module = CSG2L(**SMALL | {"encoder": "decoupled", "view": "drop", "dropout": 0.0})
    _, data = trained(module, tmp_path, 2)
    prepared = [getattr(module, f"prepared_{number}") for number in range(1 + DRAWS)]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(prepared, 2))
    module.train()
    with torch.no_grad():
        known = [module.encoder(values, data.data.edge_index)[1] for values in prepared]
        seen = [module.views(data.data)[1][1] for _ in range(40)]
    met = {number for logits in seen for number, values in enumerate(known) if torch.allclose(values, logits)}
    assert met <= set(range(1, 1 + DRAWS)) and len(met) > 2
    module.eval()
    local, other = module.views(data.data)
    assert torch.equal(local[1], other[1])


def test_propagated_features_of_a_sampled_batch_are_those_of_its_nodes(tmp_path):
    module = CSG2L(**SMALL | {"encoder": "decoupled"})
    trained(module, tmp_path, 3, graph(batch_size=48, fanout=[5, 5]))
    sampled = module.embed_all()
    module.eval()
    with torch.no_grad():
        whole = module.encode(module.graph_facts.graph)
    for one, other in zip(sampled, whole, strict=True):
        torch.testing.assert_close(one, other)


def test_metrics_equal_counting_by_hand(tmp_path):
    module = NodeClassifier(hidden_channels=8)
    trainer, data = trained(module, tmp_path, 5)
    found = trainer.validate(module, datamodule=data, verbose=False)[0]
    module.eval()
    with torch.no_grad():
        logits = module(data.data)[1][data.data.val_mask].double()
    labels, predicted = data.data.y[data.data.val_mask], logits.argmax(1)
    assert found["val/accuracy"] == pytest.approx((predicted == labels).double().mean().item())
    assert found["val/macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"), rel=1e-5)
    assert found["val/loss"] == pytest.approx(-(logits.log_softmax(1)[range(len(labels)), labels]).mean().item(), rel=1e-4)


def test_factors_and_weights_come_back_from_a_checkpoint(tmp_path):
    """Ten epochs, or five, stopped, and five more from the checkpoint: one result."""
    one = CSG2L(**SMALL)
    trained(one, tmp_path, 10)
    half, checkpoint = CSG2L(**SMALL), ModelCheckpoint(tmp_path / "c", save_last=True)
    trained(half, tmp_path, 5, enable_checkpointing=True, callbacks=[checkpoint])
    stored = torch.load(tmp_path / "c/last.ckpt", weights_only=True)
    assert {"factor_u", "factor_s", "factor_v", "clusters"} <= stored["state_dict"].keys()
    again = CSG2L(**SMALL | {"view": SvdView(rank=20, seed=5)})  # other factors, until those of the checkpoint are loaded
    trainer = quiet(tmp_path, 10)
    trainer.fit(again, datamodule=graph(), ckpt_path=tmp_path / "c/last.ckpt", weights_only=True)
    assert torch.equal(again.factor_u, one.factor_u) and trainer.current_epoch == 10


def test_sampled_batches(tmp_path):
    module = CSG2L(**SMALL)
    trainer, data = trained(module, tmp_path, 10, graph(batch_size=48, fanout=[5, 5]))
    scores = trainer.test(module, datamodule=data, verbose=False)[0]
    assert scores["test/accuracy"] > 0.8
    embeddings, logits = module.embed_all()
    assert embeddings.shape == (178, 32) and logits.shape == (178, 3)


def test_predictions_are_written(tmp_path):
    module = CSG2L(**SMALL)
    trainer, data = trained(module, tmp_path, 5, logger=TensorBoardLogger(tmp_path, "run"))
    trainer.predict(module, datamodule=data)
    found = load_file(next(tmp_path.glob("run/*/predictions.safetensors")))
    assert found["node_ids"].tolist() == list(range(178)) and found["embeddings"].shape == (178, 32)
    torch.testing.assert_close(found["probabilities"].sum(1), torch.ones(178))


def test_monitor_writes_distributions_spectrum_and_embeddings(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module = CSG2L(**SMALL)
    logger = TensorBoardLogger(tmp_path, "run")
    trained(module, tmp_path, 12, logger=logger, callbacks=[GraphMonitor(5)], log_every_n_steps=1)
    folder = next(tmp_path.glob("run/*"))
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"spectrum", "embeddings"} <= set(events.Tags()["images"])
    names = {f"{kind}/{pairs}" for kind in ("similarity", "R") for pairs in ("positives", "negatives", "own")}
    assert names <= set(events.Tags()["histograms"])
    assert {"train/contrast", "train/cross_entropy", "train/confident_share", "val/accuracy"} <= set(events.Tags()["scalars"])
    assert next(folder.glob("*/nodes/metadata.tsv")).read_text().splitlines()


def test_watching_changes_nothing(tmp_path):
    weights = []
    for callbacks in ([], [GraphMonitor(2)]):
        module = CSG2L(**SMALL)
        trained(module, tmp_path, 8, logger=TensorBoardLogger(tmp_path, "run"), callbacks=callbacks)
        weights.append(module.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_linear_probe_and_clusters():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 4, generator=generator), torch.arange(60) % 3
    x[torch.arange(60), y] += 1
    train, val, test = (torch.arange(60) // 20 == part for part in range(3))
    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    models = [LogisticRegression(C=c, max_iter=500).fit(unit[train], y[train]) for c in STRENGTHS]
    best = max(models, key=lambda model: model.score(unit[val], y[val]))
    assert linear_probe(x, y, train, val, test) == pytest.approx(best.score(unit[test], y[test]))
    separate = torch.eye(4)[y] * 10 + x
    assert clustering_scores(separate, y, 3) == {"nmi": pytest.approx(1.0), "ari": pytest.approx(1.0)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: CSG2L(view="svg"),
            r"`view` expected to be one of svd \(SvdView\), knn \(KnnView\), drop \(DropView\) but got 'svg'",
        ),
        (
            lambda: CSG2L(local_view="gcn"),
            r"`local_view` expected to be one of edges \(EdgesView\), purified.* but got 'gcn'",
        ),
        (
            lambda: NodeClassifier(local_view="svd"),
            r"`local_view` expected to be one of edges \(EdgesView\), purified.* but got 'svd'",
        ),
        (
            lambda: SvdView("a"),
            "`view.base` expected to be one of normalized, regularized, diffused, joint, purified but got 'a'",
        ),
        (lambda: SvdView(mix=1.5), "`view.mix`"),
        (lambda: SvdView(rank=0), "`view.rank`"),
        (
            lambda: SvdView(diffusion_steps=2),
            "`view.diffusion_steps` belongs to base diffused, but `view.base` is 'regular",
        ),
        (lambda: DropView(edges=-0.1), "`view.edges`"),
        (lambda: Contrast(form="a"), "`contrast.form`"),
        (lambda: Contrast(temperature=0.0), "`contrast.temperature` expected to be above 0 but got 0"),
        (lambda: Contrast(weight=float("nan")), "`contrast.weight`"),
        (lambda: Contrast(weight=0.0, anchors=5), "`contrast.anchors` expected a `contrast.weight` above 0"),
        (
            lambda: Contrast(beta=0.0, reweight="positives"),
            "`contrast.reweight` = 'positives' expected a `contrast.beta`",
        ),
        (lambda: PredictedLabels(confident=2.0), "`pseudo_labels.confident`"),
        (
            lambda: PredictedLabels(weight=0.0, balanced=True),
            "`pseudo_labels.balanced` expected a `pseudo_labels.weight` above",
        ),
        (lambda: PredictedLabels(weight=0.0, beta=1.0), "`pseudo_labels.beta` expected a `pseudo_labels.weight` above 0"),
        (lambda: PredictedLabels(beta=float("nan")), "`pseudo_labels.beta` expected to be finite but got nan; 0 weighs all"),
        (
            lambda: PredictedLabels(confident="most"),
            r"`pseudo_labels.confident` expected to be in \[0, 1\], or mean, but got 'most'",
        ),
        (lambda: ClusteredLabels(every=0), "`pseudo_labels.every`"),
        (lambda: CSG2L(fusion="a"), "`fusion`"),
        (lambda: CSG2L(learning_rate=-1.0), "`learning_rate`"),
        (lambda: CSG2L(supervised=False, contrast=Contrast(weight=0.0)), "nothing is left to learn from. Raise it"),
        (
            lambda: CSG2L(supervised=False, fusion="concat"),
            "`fusion` = 'concat' joins the logits.*there are none. Leave it",
        ),
        (
            lambda: CSG2L(pseudo_labels="clustered"),
            "`pseudo_labels` expected predicted with `supervised` = True but got clustered. Leave it out, or set",
        ),
        (lambda: CSG2L(pseudo_labels="predicted", supervised=False), "expected clustered with `supervised` = False"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_hyperparameters_are_plain_values_of_all_groups(tmp_path):
    """A checkpoint of a module that was made in Python reads as a config, without unpickling an object."""
    module = CSG2L(**SMALL | {"view": DropView(edges=0.1)})
    trainer, _ = trained(module, tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"]
    assert stored["view"] == {"class_path": "DropView", "init_args": {"edges": 0.1, "features": 0.3}}
    assert stored["contrast"]["anchors"] == 64 and stored["pseudo_labels"]["init_args"]["warmup_epochs"] == 3
    again = ArgumentParser(exit_on_error=False)
    again.add_class_arguments(CSG2L, "model")
    made = again.instantiate_classes(again.parse_object({"model": stored})).model
    assert (made.view, made.contrast, made.pseudo_labels) == (module.view, module.contrast, module.pseudo_labels)
    assert made.hparams == module.hparams


def test_without_a_graph_data_module(tmp_path):
    with pytest.raises(ValueError, match="needs a data module"):
        quiet(tmp_path).fit(CSG2L(), [0])


def test_callbacks_that_may_average_factors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected AverageWeights for a graph module but got EMAWeightAveraging, which can"):
        trained(CSG2L(**SMALL), tmp_path, 1, callbacks=[EMAWeightAveraging(decay=0.9)])
    with pytest.raises(ValueError, match=r"`decay` expected to be in \[0, 1\), or null for the mean, but got 1.5"):
        AverageWeights(decay=1.5)


def test_averaged_weights_are_the_mean_over_steps_and_factors_stay(tmp_path):
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append(module.encoder.head.convs[0].lin.weight.detach().clone())

    module, plain = CSG2L(**SMALL), CSG2L(**SMALL)
    trained(module, tmp_path, 5, callbacks=[AverageWeights(decay=None), Watch()])
    trained(plain, tmp_path, 5)
    torch.testing.assert_close(module.encoder.head.convs[0].lin.weight, torch.stack(seen).mean(0))
    assert torch.equal(module.factor_u, plain.factor_u) and torch.equal(seen[-1], plain.encoder.head.convs[0].lin.weight)

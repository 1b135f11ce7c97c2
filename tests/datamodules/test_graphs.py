"""GraphDataModule: noise is exact, batches are the whole graph or subgraphs around seeds."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

from datamodules import GraphDataModule
from datamodules.graph_edges import add_edges
from tests.helpers.small_graphs import SMALL, check_form, masks, pairs, ready, sizes
from tests.helpers.tiny import quiet

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")


# Noise


@pytest.mark.parametrize("share", [0.01, 0.5, 3.0])
def test_noise_is_exact_new_and_leaves_the_split(share):
    clean, noisy = ready(), ready(edge_noise=share)
    check_form(noisy)
    old, new = pairs(clean.data.edge_index), pairs(noisy.data.edge_index)
    assert old < new and len(new) - len(old) == 2 * round(share * len(old) / 2)
    assert torch.equal(masks(clean), masks(noisy)) and torch.equal(clean.data.x, noisy.data.x)
    assert torch.equal(noisy.data.edge_index, ready(edge_noise=share).data.edge_index)
    assert not torch.equal(noisy.data.edge_index, ready(edge_noise=share, seed=1).data.edge_index)


def test_noise_can_fill_the_graph_and_no_more():
    path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    full = add_edges(path, 5, 4.0, seed=0)
    assert pairs(full) == {(i, j) for i in range(5) for j in range(5) if i != j}
    with pytest.raises(ValueError, match=r"`edge_noise` expected to add at most 8 edges, .* is 9; use at most 4"):
        add_edges(path, 5, 4.5, seed=0)


def test_noise_is_even():
    path, counts = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), torch.zeros(6, 6)
    for seed in range(1300):
        edges = add_edges(path, 6, 0.5, seed)
        counts[edges[0], edges[1]] += 1
    free = counts.triu(1)[(counts.triu(1) > 0) & (counts < 1300)]
    assert len(free) == 13 and (free - 100).abs().max() < 5 * 10


def test_noise_on_a_graph_with_more_pairs_than_32_bits():
    num_nodes = 3_000_000
    ring = torch.stack([torch.arange(1000), torch.arange(1, 1001)])
    edges = add_edges(torch.cat([ring, ring.flip(0)], dim=1).T.unique(dim=0).T, num_nodes, 2.0, seed=0)
    assert edges.shape[1] == 2 * 3000 and edges.min() >= 0 and edges.max() < num_nodes and (edges[0] != edges[1]).all()


def test_validation_nodes_of_each_class():
    module, plain = ready(labels_per_class=4, val_per_class=6, num_test=-1), ready(labels_per_class=4)
    check_form(module)
    for part, count in (("train_mask", 4), ("val_mask", 6)):
        assert torch.bincount(module.data.y[module.data[part]]).tolist() == [count] * 3
    assert sizes(module) == [12, 18, 178 - 30] and masks(module).any(0).all()
    assert torch.equal(module.data.train_mask, plain.data.train_mask)
    assert module.split_name == "random, 4 labels a class, 6 for validation, seed 0"
    assert sizes(ready(labels_per_class=4, val_per_class=6, num_test=20)) == [12, 18, 20]
    with pytest.raises(ValueError, match=r"`val_per_class` expected to be at most 44, .* of class 2.*, but got 45; lower it"):
        ready(labels_per_class=4, val_per_class=45)


def test_uniform_split_has_all_nodes_whatever_their_classes_are():
    rest = {"split": "uniform", "num_val": 500, "num_test": -1}
    module = ready(**rest)
    check_form(module)
    assert sizes(module) == [85, 57, 36] and module.split_name == "uniform, seed 0"  # 48, 32 and 20 % of 178
    assert masks(module).sum(0).tolist() == [1] * 178
    others = torch.stack([masks(ready(**rest, seed=seed)) for seed in range(1, 201)])
    shares = others.double().mean(0)  # of 200 draws; 5.5 standard deviations of the widest are 0.195
    for part, share in enumerate((85 / 178, 57 / 178, 36 / 178)):
        assert (shares[part] - share).abs().max() < 0.195
    counts = torch.stack([torch.bincount(module.data.y[mask], minlength=3) for mask in others[:, 0]]).double()
    of_class = torch.bincount(module.data.y).double()
    assert (counts.mean(0) - 85 / 178 * of_class).abs().max() < 1 and counts.std(0).min() > 1  # not balanced, not stratified


# Dataloaders


@pytest.mark.parametrize("name", LOADERS)
def test_whole_graph_is_the_batch(name):
    module = ready()
    loader = getattr(module, name)()
    assert len(loader) == 1 and [batch is module.data for batch in loader] == [True]


def test_setup_happens_once():
    module = ready()
    data = module.data
    module.setup("test")
    assert module.data is data


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("train_dataloader", None),
        ("val_dataloader", "val_mask"),
        ("test_dataloader", "test_mask"),
        ("predict_dataloader", None),
    ],
)
def test_seeds_of_each_dataloader(name, mask):
    module = ready(batch_size=32, fanout=[3, 2])
    loader = getattr(module, name)()
    seeds = torch.cat([batch.node_ids[: batch.num_seeds] for batch in loader])
    expected = module.data.node_ids if mask is None else module.data[mask].nonzero().flatten()
    assert torch.equal(seeds.sort().values, expected) and len(loader) == -(-len(expected) // 32)
    assert torch.equal(seeds, expected) == (name != "train_dataloader")
    assert mask is None or all(batch[mask].sum() == batch.num_seeds for batch in loader)


def test_seed_changes_batches_but_noise_does_not_change_the_order():
    def order(**options):
        return [batch.node_ids[: batch.num_seeds].tolist() for batch in ready(batch_size=50, **options).train_dataloader()]

    assert order() == order() == order(edge_noise=0.2) != order(seed=1)


def test_whole_graph_is_copied_to_a_device_once():
    module, meta, cpu = ready(), torch.device("meta"), torch.device("cpu")
    moved = module.transfer_batch_to_device(module.data, meta, 0)
    assert moved is module.transfer_batch_to_device(module.data, meta, 0) and moved.x.device == moved.edge_index.device == meta
    assert module.data.x.device == cpu and module.transfer_batch_to_device(module.data, cpu, 0) is module.data
    part = next(iter(ready(batch_size=4).val_dataloader()))
    assert module.transfer_batch_to_device(part, meta, 0).x.device == meta


def test_dataloaders_say_what_they_need():
    with pytest.raises(RuntimeError, match="expected `setup` to be called before"):
        GraphDataModule().train_dataloader()
    module = ready(batch_size=2)
    module.trainer = SimpleNamespace(world_size=3, global_rank=1)
    for name in LOADERS:
        with pytest.raises(ValueError, match=r"`batch_size` expected to be at least the number of processes, 3, but got 2"):
            getattr(module, name)()
    assert len(module.all_nodes_dataloader()) == 89


def test_every_process_sees_the_whole_graph(caplog):
    module = ready()
    module.trainer = SimpleNamespace(world_size=2, global_rank=1)
    assert all(next(iter(getattr(module, name)())) is module.data for name in LOADERS)
    assert caplog.text.count("the result is that of one process") == 1


class Probe(LightningModule):
    """Records the seeds of every step."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(13, 3)
        self.seen = {part: [] for part in ("train", "val", "test", "predict")}

    def note(self, part, batch):
        self.seen[part].append(batch.node_ids[: batch.get("num_seeds", batch.num_nodes)].tolist())
        return torch.nn.functional.cross_entropy(self.layer(batch.x), batch.y)

    def training_step(self, batch, index):
        return self.note("train", batch)

    def validation_step(self, batch, index):
        self.note("val", batch)

    def test_step(self, batch, index):
        self.note("test", batch)

    def predict_step(self, batch, index):
        self.note("predict", batch)
        return self.layer(batch.x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(tmp_path, **options):
    module, probe = GraphDataModule("wine", **SMALL, **options), Probe()
    trainer = quiet(tmp_path, max_epochs=2)
    trainer.fit(probe, datamodule=module)
    trainer.test(probe, datamodule=module, verbose=False)
    outputs = trainer.predict(probe, datamodule=module)
    return module, probe.seen, outputs


def test_with_a_trainer_full_batch(tmp_path):
    _, seen, outputs = run(tmp_path)
    assert {part: len(steps) for part, steps in seen.items()} == {"train": 2, "val": 2, "test": 1, "predict": 1}
    assert outputs[0].shape == (178, 3)


@pytest.mark.filterwarnings("ignore:Lightning couldn't infer the indices")
def test_with_a_trainer_in_batches(tmp_path):
    module, seen, outputs = run(tmp_path, batch_size=60)
    first, second = ([node for step in steps for node in step] for steps in (seen["train"][:3], seen["train"][3:]))
    assert len(seen["train"]) == 6 and sorted(first) == sorted(second) == list(range(178)) and first != second
    loader = module.train_dataloader()
    loader.set_epoch(1)
    assert second == [node for batch in loader for node in batch.node_ids[: batch.num_seeds].tolist()]
    assert seen["val"][0] == seen["val"][1] and len(seen["test"]) == 1 and len(outputs) == 3


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": ""}, "`source` expected to be a name but got ''; digits"),
        ({"source": 3}, "`source` expected to be a name but got 3"),
        ({"root": ""}, "`root` expected to be a name but got ''; null takes data"),
        ({"split": "full"}, "`split` expected to be one of public, random, geom-gcn, uniform but got 'full'; random"),
        (
            {"labels_per_class": 3, "split": "uniform"},
            "`labels_per_class` expected to be null with split = uniform, which takes shares of all nodes, but got 3; leave it",
        ),
        ({"num_val": 30, "split": "uniform"}, "`num_val` expected to be 500, its default, with split = uniform, which takes"),
        ({"num_test": 50, "split": "uniform"}, "`num_test` expected to be 1000, its default, or -1, with split = uniform"),
        ({"fold": 1, "split": "uniform"}, "`fold` expected to be 0 with split = uniform but got 1; vary `seed`"),
        ({"labels_per_class": 0}, "`labels_per_class` expected to be an integer of at least 1 but got 0; null"),
        ({"num_val": 0}, "`num_val` expected to be an integer of at least 1 but got 0"),
        ({"num_test": 0}, "`num_test` expected to be an integer of at least 1 but got 0; -1 takes"),
        ({"num_test": -2}, "`num_test` expected to be an integer of at least 1 but got -2"),
        ({"val_per_class": 0}, "`val_per_class` expected to be an integer of at least 1 but got 0"),
        (
            {"val_per_class": 3, "split": "public"},
            "`val_per_class` expected split = random but `split` is 'public'; leave it out, or use random",
        ),
        ({"fold": -1}, "`fold` expected to be an integer of at least 0 but got -1"),
        ({"fold": 1}, "`fold` expected to be 0 with split = random but got 1; vary `seed`"),
        ({"edge_noise": -0.1}, "`edge_noise` expected to be a number of at least 0 but got -0.1; 0.1 adds"),
        ({"edge_noise": float("nan")}, "`edge_noise` expected to be a number of at least 0 but got nan"),
        ({"edge_noise": True}, "`edge_noise` expected to be a number of at least 0 but got True"),
        (
            {"edge_attack": "random"},
            "`edge_attack` expected to be one of dice, prbcd but got 'random'; null is none, and",
        ),
        ({"edge_attack": "dice", "attack_share": 0}, "`attack_share` expected to be a number above 0 but got 0; 0.25 changes"),
        ({"edge_attack": "dice", "attack_share": True}, "`attack_share` expected to be a number above 0 but got True"),
        (
            {"edge_attack": "dice", "edge_noise": 0.1},
            "`edge_noise` expected to be 0 beside `edge_attack` = dice but got 0.1",
        ),
        ({"attack_share": 0.1}, "`attack_share` belongs to an attack, but `edge_attack` is null. Leave it out, or give one"),
        (
            {"edge_attack": "dice", "attack_surrogate": "gcn"},
            "`attack_surrogate` belongs to edge_attack prbcd, but `edge_attack` is dice. Leave it out, or use prbcd",
        ),
        (
            {"edge_attack": "prbcd", "attack_surrogate": "gat"},
            "`attack_surrogate` expected to be one of gcn, low_rank but got 'gat'",
        ),
        ({"drop_dissimilar": 1}, "`drop_dissimilar` expected to be a number in [0, 1) but got 1; 0 removes"),
        ({"drop_dissimilar": False}, "`drop_dissimilar` expected to be a number in [0, 1) but got False"),
        ({"knn": 0}, "`knn` expected to be an integer of at least 1 but got 0; 10 is usual"),
        ({"row_normalize": 1}, "`row_normalize` expected to be true or false but got 1"),
        ({"batch_size": 0}, "`batch_size` expected to be an integer of at least 1 but got 0; null takes the whole"),
        ({"fanout": []}, "`fanout` expected to be a list of integers but got []; give one for each hop"),
        ({"fanout": 10}, "`fanout` expected to be a list of integers but got 10"),
        ({"fanout": [10, 0]}, "`fanout` expected to be an integer of at least 1 but got 0; -1 takes all"),
        ({"seed": -1}, "`seed` expected to be an integer of at least 0 but got -1"),
        ({"seed": 2**32}, "`seed` expected to be at most 4294967295 but got 4294967296"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=re.escape("Argument " + message)):
        GraphDataModule(**options)


def test_arguments_survive_yaml(tmp_path):
    options = {"source": "wine", "fanout": [5, -1], "num_test": -1, "batch_size": 8, "edge_noise": 1, "num_val": 9}
    options |= {"drop_dissimilar": 0}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"data": {"class_path": "datamodules.GraphDataModule", "init_args": options}}))

    def parse(path):
        arguments = ["--config", str(path)]
        return LightningCLI(
            Probe, LightningDataModule, subclass_mode_data=True, run=False, args=arguments, save_config_callback=None
        )

    first = parse(path)
    again = tmp_path / "again.yaml"
    again.write_text(first.parser.dump(first.config))
    given = {name: first.datamodule.hparams[name] for name in options}
    assert list(given.pop("fanout")) == [5, -1] and given == {name: options[name] for name in given}
    assert parse(again).datamodule.hparams == first.datamodule.hparams


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(3)
    np.random.seed(3)
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(ready(edge_noise=0.1, batch_size=50).train_dataloader())
    assert torch.equal(before, torch.get_rng_state()) and (numbers == np.random.get_state()[1]).all()

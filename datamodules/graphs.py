"""Graphs for node classification, supervised or contrastive: the whole graph as one batch, or subgraphs around seed nodes.

All draws come from `seed`, in streams of their own for the split, the noise and the neighbours: more noise leaves the split as
it was. The global random state is neither used nor changed.

Legend: N nodes, E directed edges (each undirected edge twice), F features.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch_geometric.data import Data

from datamodules.graph_attacks import SHARE, Attack, Surrogate, check_attack, dice, kept_on_disk, prbcd
from datamodules.graph_edges import add_edges, check_dissimilar, check_noise, drop_dissimilar
from datamodules.graph_sources import load_graph
from datamodules.graph_splits import split_nodes
from datamodules.graph_types import Graph
from datamodules.neighbors import NeighborSampler, SeedLoader
from utilities.checks import check_integer
from utilities.contract import GraphData, GraphFacts

Split = Literal["public", "random", "geom-gcn", "uniform"]
LARGEST_SEED = 2**32 - 1
NUM_VAL, NUM_TEST = 500, 1000


class GraphDataModule(LightningDataModule, GraphData):
    """A graph with training, validation and test nodes.

    Without `batch_size`, each batch of each dataloader is the whole graph, `data`, one step an epoch. It is a
    `torch_geometric.data.Data` with `x` (N, F) float32, `edge_index` (2, E) undirected, coalesced and without self-loops, `y`
    (N,) long, `train_mask`, `val_mask` and `test_mask` (N,) disjoint, and `node_ids` (N,) = 0 to N - 1.

    With it, a batch is a subgraph of the same form, whose first `num_seeds` nodes are its seeds; `node_ids` are positions in
    the whole graph, and masks are False on nodes that are not seeds. Seeds are all nodes for training, shuffled, and for
    prediction, in order; else the validation or the test nodes.

    Several processes each see the whole graph, with the result of one process and no faster. Subgraphs they share: in training
    the seeds of each step, of which each process sees the neighbours that it draws for its own; else the subgraphs that
    one process would see. So a mean over labelled seeds is that of one process up to the draws of neighbours, and the
    very same where `fanout` takes all neighbours of as many hops as the layers and one more; whatever looks at
    other nodes of a batch (contrast, low-rank view, choice of pseudo-labels) sees those of its own process only.

    Args:
        source: digits, wine or breast_cancer (scikit-learn's tables as kNN graphs of standardised features), karate
            (featureless, so `x` is the identity), Cora, CiteSeer, PubMed, cornell, texas, wisconsin, Actor, Photo, Computers,
            CS, Physics, WikiCS, ogbn-arxiv (needs the package ogb), or the path of a .npz file with CSR attributes, edges and
            labels (`datamodules.graph_files.read_npz`).
        root: Folder in which data sets are, or to which they are downloaded; null takes data.
        split: random: `labels_per_class` nodes of each class for training, then `num_val` and `num_test` of the others. public:
            that of the data set; what it lacks is drawn as in random. geom-gcn: the ten splits of Pei et al. (2020). uniform:
            48 % of all nodes for training, 32 % for validation and 20 % for the test, drawn as those ten were, by `seed`.
        labels_per_class: Number of training nodes of each class; null takes 20, or all that a public or geom-gcn split has. Of
            these splits, fewer are drawn; a .npz file has its own training nodes for 20, 40 and 60. Not with uniform.
        num_val: Number of validation nodes; of no effect on splits that have them. Not with uniform.
        num_test: Number of test nodes; of no effect on splits that have them; -1 or null takes all that are left, as uniform
            does, with which no other number goes.
        fold: Number of the public or geom-gcn split, of several, from 0.
        edge_noise: Number of edges added at random between nodes that have none, as a share of the number of edges.
        knn: Number of neighbours of each node of a kNN graph; of no effect on others.
        row_normalize: Divide each node's features by their sum. Only done to words (Planetoid, WebKB, Actor, Amazon, Coauthor,
            .npz files without negative values), never to standardised features, embeddings or the identity.
        batch_size: Number of seeds a step, over all processes; null takes the whole graph as one batch.
        fanout: Number of neighbours drawn of each node, for each hop; -1 takes all. Of no effect without `batch_size`.
        seed: Seed of the split, the noise, the order of seeds and their neighbours.
        val_per_class: Number of validation nodes of each class, in place of `num_val`, which null takes; of split random
            only.
        edge_attack: Poisoning of the edges by someone who knows all labels (`datamodules.graph_attacks`): dice deletes edges
            within classes and adds edges between them; prbcd flips those that cost a GCN most on nodes that are not for
            training, which takes minutes and is kept in the folder attacks in `root`. null for none.
        attack_share: Number of edges that the attack changes, as a share of the number of edges; null takes 0.25.
        attack_surrogate: Model that prbcd attacks: gcn, or low_rank, a GCN on the edges' projection on their leading 20
            singular vectors; null takes gcn.
        drop_dissimilar: Remove edges, after noise or an attack, between nodes whose words have a Jaccard index of at most this;
            0 removes those without a common word. null keeps all edges.
    """

    def __init__(
        self,
        source: str = "digits",
        root: str | None = None,
        split: Split = "random",
        labels_per_class: int | None = None,
        num_val: int = NUM_VAL,
        num_test: int | None = NUM_TEST,
        fold: int = 0,
        edge_noise: float = 0.0,
        knn: int = 10,
        row_normalize: bool = True,
        batch_size: int | None = None,
        fanout: list[int] | tuple[int, ...] = (10, 10),
        seed: int = 0,
        val_per_class: int | None = None,
        edge_attack: Attack | None = None,
        attack_share: float | None = None,
        attack_surrogate: Surrogate | None = None,
        drop_dissimilar: float | None = None,
    ) -> None:
        super().__init__()
        for name, value, hint in (
            ("source", source, "digits needs no download"),
            ("root", "data" if root is None else root, "null takes data"),
        ):
            if not isinstance(value, str) or not value:
                raise ValueError(f"Argument `{name}` expected to be a name but got {value!r}; {hint}.")
        if split not in get_args(Split):
            accepted = ", ".join(get_args(Split))
            raise ValueError(f"Argument `split` expected to be one of {accepted} but got {split!r}; random suits every source.")
        if labels_per_class is not None:
            check_integer("labels_per_class", labels_per_class, 1, "null takes 20, or what the split has")
        check_integer("num_val", num_val, 1, "choices need validation nodes")
        if val_per_class is not None:
            check_integer("val_per_class", val_per_class, 1, "null draws num_val of all classes alike")
            if split != "random":
                raise ValueError(
                    f"Argument `val_per_class` expected split = random but `split` is {split!r}; leave it out, or use random."
                )
        if num_test is not None and num_test != -1:
            check_integer("num_test", num_test, 1, "-1 takes all nodes that are left")
        if split == "uniform":
            _check_uniform(labels_per_class, num_val, num_test)
        check_integer("fold", fold, 0, "0 is the first split")
        if split in ("random", "uniform") and fold:
            raise ValueError(f"Argument `fold` expected to be 0 with split = {split} but got {fold}; vary `seed` instead.")
        check_noise(edge_noise)
        check_attack(edge_attack, attack_share, attack_surrogate, edge_noise)
        check_dissimilar(drop_dissimilar)
        check_integer("knn", knn, 1, "10 is usual")
        if not isinstance(row_normalize, bool):
            raise ValueError(f"Argument `row_normalize` expected to be true or false but got {row_normalize!r}; choose one.")
        if batch_size is not None:
            check_integer("batch_size", batch_size, 1, "null takes the whole graph")
        if not isinstance(fanout, list | tuple) or not fanout:
            raise ValueError(f"Argument `fanout` expected to be a list of integers but got {fanout!r}; give one for each hop.")
        for count in fanout:
            if count != -1 or isinstance(count, bool):
                check_integer("fanout", count, 1, "-1 takes all neighbours")
        check_integer("seed", seed, 0, "0 is as good as any")
        if seed > LARGEST_SEED:
            raise ValueError(f"Argument `seed` expected to be at most {LARGEST_SEED} but got {seed}; lower it.")
        self.save_hyperparameters()
        self.data: Data | None = None
        """The whole graph on the CPU; None before `setup`, as are the next five."""
        self.num_classes: int | None = None
        self.num_features: int | None = None
        self.classes: list[str] | None = None
        """Names of the classes; None too if the source has none."""
        self.split_name: str | None = None
        """Name of the split, for logs and tables."""
        self._neighbors: NeighborSampler | None = None
        self._on_device: tuple[torch.device, Data] | None = None
        self._told = False

    def prepare_data(self) -> None:
        """Let one of several processes download the data, and attack the graph, that all will read."""
        if self.trainer is not None and self.trainer.world_size > 1:
            self._read()

    def setup(self, stage: str | None = None) -> None:
        """Read the graph, split its nodes and change its edges, all once.

        Raises:
            ValueError: If the source is unknown or cannot be had, has no such split, too few nodes for it, too few pairs of
                nodes without an edge for the noise or the attack, or no words whose likeness counts.
            ModuleNotFoundError: If a package is missing.
        """
        if self.data is not None:
            return
        graph, self.data, self.split_name, normalized = self._read()
        self.num_classes, self.num_features, self.classes = graph.num_classes, self.data.num_features, graph.classes
        sizes = " / ".join(f"{int(self.data[part].sum()):,}" for part in ("train_mask", "val_mask", "test_mask"))
        rank_zero_info(
            f"Graph {graph.name}: {self.data.num_nodes:,} nodes, {self.data.num_edges // 2:,} edges"
            f"{self._changes(graph)}, {self.num_classes} classes, {self.num_features:,} features"
            f"{', rows sum to 1' * normalized}; split: {self.split_name} ({sizes} nodes)"
        )

    def _read(self) -> tuple[Graph, Data, str, bool]:
        """Return the graph as its source has it, the data made of it, the split's name, and whether rows were normalised."""
        options = self.hparams
        graph = load_graph(options.source, options.root or "data", options.split, options.knn)
        num_test = None if options.num_test == -1 else options.num_test
        (train, val, test), name = split_nodes(
            graph,
            options.split,
            options.labels_per_class,
            options.num_val,
            num_test,
            options.fold,
            options.seed,
            options.val_per_class,
        )
        x = graph.x
        words = graph.bag_of_words and bool((x >= 0).all())
        if options.drop_dissimilar is not None and not words:
            raise ValueError(
                f"Argument `drop_dissimilar` expected features that are words, but those of {graph.name} are not; leave it out."
            )
        if normalize := options.row_normalize and words:
            total = x.sum(dim=1, keepdim=True)
            x = x / total.where(total > 0, 1)  # rows without a word stay zero
        edge_index = self._changed(graph, x, train, val)
        if options.drop_dissimilar is not None:
            edge_index = drop_dissimilar(edge_index, x, options.drop_dissimilar)
        nodes = torch.arange(len(x))
        data = Data(x=x, edge_index=edge_index, y=graph.y, train_mask=train, val_mask=val, test_mask=test, node_ids=nodes)
        return graph, data, name, normalize

    def _changed(self, graph: Graph, x: Tensor, train: Tensor, val: Tensor) -> Tensor:
        """Add noise, or attack the graph; what takes long is kept on disk."""
        options, edges, labels = self.hparams, graph.edge_index, graph.y
        if options.edge_attack is None:
            return add_edges(edges, len(x), options.edge_noise, options.seed)
        share = SHARE if options.attack_share is None else options.attack_share
        if options.edge_attack == "dice":
            return dice(edges, labels, share, options.seed)
        attacked = ~train if graph.unlabelled is None else ~train & ~graph.unlabelled
        surrogate = options.attack_surrogate or "gcn"
        given = {"x": x, "edge_index": edges, "labels": labels, "train": train, "val": val, "attacked": attacked}
        return kept_on_disk(
            Path(options.root or "data").expanduser() / "attacks",
            f"{graph.name}-prbcd-{surrogate}-{share}-{options.seed}",
            given,
            lambda: prbcd(**given, share=share, seed=options.seed, surrogate=surrogate),
        )

    def _changes(self, graph: Graph) -> str:
        """Tell in words how the edges differ from those of the source."""
        before, after = (edges[0] * graph.y.numel() + edges[1] for edges in (graph.edge_index, self.data.edge_index))
        added, removed = (int((~torch.isin(*pair)).sum()) // 2 for pair in ((after, before), (before, after)))
        parts = [f"{added:,} of them {'by ' + self.hparams.edge_attack if self.hparams.edge_attack else 'noise'}"] * bool(added)
        parts += [f"{removed:,} removed"] * bool(removed)
        return f" ({', '.join(parts)})" * bool(parts)

    def graph_facts(self) -> GraphFacts:
        """Tell the graph, number and names of its classes, and whether batches are sampled.

        Raises:
            RuntimeError: If `setup` has not read the graph.
        """
        if self.data is None or self.num_classes is None:
            raise RuntimeError("The graph expected `setup` to be called before it is used; call it, or use a Trainer.")
        return GraphFacts(self.data, self.num_classes, tuple(self.classes or ()), self.hparams.batch_size is not None)

    def train_dataloader(self) -> "WholeGraph | SeedLoader":
        """Give the whole graph, or subgraphs around all nodes, labelled or not, in an order that depends on seed and epoch."""
        return self._loader(shuffle=True)

    def val_dataloader(self) -> "WholeGraph | SeedLoader":
        """Give the whole graph, or subgraphs around validation nodes, the same in each epoch."""
        return self._loader("val_mask")

    def test_dataloader(self) -> "WholeGraph | SeedLoader":
        """Give the whole graph, or subgraphs around test nodes."""
        return self._loader("test_mask")

    def predict_dataloader(self) -> "WholeGraph | SeedLoader":
        """Give the whole graph, or subgraphs around all nodes in order."""
        return self._loader()

    def all_nodes_dataloader(self) -> "WholeGraph | SeedLoader":
        """Give what prediction gets, but all nodes to the process that asks."""
        return self._loader(alone=True)

    def _loader(self, mask: str | None = None, shuffle: bool = False, alone: bool = False) -> "WholeGraph | SeedLoader":
        if self.data is None:
            raise RuntimeError("The graph expected `setup` to be called before its dataloaders are; call it, or use a Trainer.")
        rank, processes = (0, 1) if alone or self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        if self.hparams.batch_size is None:
            if processes > 1 and not self._told:
                rank_zero_info(
                    f"Each of {processes} processes works on the whole graph: the result is that of one process, and comes no "
                    "sooner. Set `batch_size` to share the work."
                )
                self._told = True
            return WholeGraph(self.data)
        if self.hparams.batch_size < processes:
            raise ValueError(
                f"Argument `batch_size` expected to be at least the number of processes, {processes}, but got "
                f"{self.hparams.batch_size}; raise it, or lower trainer.devices."
            )
        if self._neighbors is None:
            self._neighbors = NeighborSampler(self.data, self.hparams.fanout)
        seeds = self.data.node_ids if mask is None else self.data.node_ids[self.data[mask]]
        return SeedLoader(self._neighbors, seeds, self.hparams.batch_size, self.hparams.seed, shuffle, rank, processes)

    def transfer_batch_to_device(self, batch: Data, device: torch.device, dataloader_idx: int) -> Data:
        """Copy a subgraph to the device; the whole graph is copied once and kept there until another device is asked for."""
        if batch is not self.data:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        if device == self.data.x.device:
            return self.data
        if self._on_device is None or self._on_device[0] != device:
            self._on_device = (device, copy.copy(self.data).to(device))  # Data.to moves the object itself, so move a copy
        return self._on_device[1]


def _check_uniform(labels_per_class: int | None, num_val: int, num_test: int | None) -> None:
    """Check that no sizes are given to a split that takes shares of all nodes; defaults are no such sizes.

    Raises:
        ValueError: If one is.
    """
    for name, value, accepted, text in (
        ("labels_per_class", labels_per_class, (None,), "null"),
        ("num_val", num_val, (NUM_VAL,), f"{NUM_VAL}, its default,"),
        ("num_test", num_test, (NUM_TEST, -1, None), f"{NUM_TEST}, its default, or -1,"),
    ):
        if value not in accepted:
            raise ValueError(
                f"Argument `{name}` expected to be {text} with split = uniform, which takes shares of all nodes, but got "
                f"{value}; leave it out, or use random."
            )


class WholeGraph:
    """A dataloader with one batch: the graph itself."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Data]:
        yield self.data

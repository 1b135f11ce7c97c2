"""Where graphs come from: kNN graphs of scikit-learn's tables, karate club, PyG's and OGB's data sets, .npz files; splits.

Every graph becomes undirected, coalesced and free of self-loops, whatever its files hold. No file runs code: the raw files of
Planetoid, which are pickles, may hold arrays and plain values only, PyG's and OGB's processed files are read with
weights_only=True, and nothing else is tried if that fails. Whatever is wrong with a file is a ValueError that names it.

Legend: N nodes, E directed edges (each undirected edge twice), F features.
"""

import errno
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_geometric import datasets
from torch_geometric.data import Data
from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
from torch_geometric.data.storage import GlobalStorage
from torch_geometric.utils import remove_self_loops, to_undirected

from utilities.safe_load import brief, check_arrays, weights_only

SPLIT_STREAM = 0
EMBEDDED = ("digits", "wine", "breast_cancer", "karate")
PYG = {
    "Cora": "Planetoid",
    "CiteSeer": "Planetoid",
    "PubMed": "Planetoid",
    "cornell": "WebKB",
    "texas": "WebKB",
    "wisconsin": "WebKB",
    "Actor": "Actor",
    "Photo": "Amazon",
    "Computers": "Amazon",
    "CS": "Coauthor",
    "Physics": "Coauthor",
    "WikiCS": "WikiCS",
}
ACCEPTED_SOURCES = f"{', '.join((*EMBEDDED, *PYG))}, ogbn-arxiv or the path of a .npz file"
PLANETOID_PICKLES = ("x", "tx", "allx", "y", "ty", "ally", "graph")
NPZ_KEYS = ("attr_data", "attr_indices", "attr_indptr", "attr_shape", "edge", "labels")
LARGEST_FEATURES = 2**30
"""Most entries of a feature matrix read from a .npz file: 4 GiB, since it is dense in memory."""

Masks = tuple[Tensor, Tensor | None, Tensor | None]
"""Training, validation and test nodes, each (N,) or (N, folds); None where the data set has none."""


@dataclass
class Graph:
    """A graph as its source has it, and the splits that come with it."""

    name: str
    x: Tensor
    """(N, F) float32"""
    edge_index: Tensor
    """(2, E), made undirected, coalesced, without self-loops"""
    y: Tensor
    """(N,) long"""
    classes: list[str] | None = None
    bag_of_words: bool = False
    """Whether rows of `x` are counts or indicators of words, which may be divided by their sum."""
    public: dict[int | None, Masks] = field(default_factory=dict)
    """Its own splits by labels a class, or under None."""
    geom_gcn: Masks | None = None
    unlabelled: Tensor | None = None
    """(N,) nodes whose entry of `y` only fills a gap"""

    def __post_init__(self) -> None:
        self.edge_index = to_undirected(remove_self_loops(self.edge_index)[0].long(), num_nodes=len(self.y))
        self.x, self.y = self.x.float(), self.y.long()

    @property
    def num_classes(self) -> int:
        """One more than the largest label."""
        return int(self.y.max()) + 1

    def class_name(self, label: int) -> str:
        """For messages."""
        return f"{label} ({self.classes[label]})" if self.classes and self.classes[label] != str(label) else str(label)


def load_graph(source: str, root: str, split: str, knn: int) -> Graph:
    """Read a graph, downloading it if it is not in `root` yet.

    Args:
        source: One of ACCEPTED_SOURCES; names in any case.
        root: Folder of PyG's and OGB's data sets.
        split: geom-gcn reads other files of Planetoid.
        knn: Neighbours of each row of a table.

    Raises:
        ValueError: If the source is unknown, or cannot be downloaded or read, or `knn` is too large for it.
        ModuleNotFoundError: If ogb is needed and missing.
    """
    if source.lower().endswith(".npz"):
        return read_npz(Path(source).expanduser())
    names = {name.lower(): name for name in (*EMBEDDED, *PYG, "ogbn-arxiv")}
    if source.lower() not in names:
        raise ValueError(f"Argument `source` expected to be {ACCEPTED_SOURCES} but got {source!r}; choose one of these.")
    name, folder = names[source.lower()], Path(root).expanduser()
    if name == "karate":
        data = datasets.KarateClub()[0]
        return Graph(name, data.x, data.edge_index, data.y, public={None: (data.train_mask, None, None)})
    if name == "ogbn-arxiv":
        return _read_arxiv(folder)
    return _read_pyg(name, folder, split) if name in PYG else _knn_graph(name, knn)


def _knn_graph(name: str, knn: int) -> Graph:
    """Rows of a table of scikit-learn, standardised, each joined with its `knn` nearest others (Euclidean)."""
    import sklearn.datasets
    from sklearn.neighbors import NearestNeighbors
    from sklearn.preprocessing import StandardScaler

    table = getattr(sklearn.datasets, f"load_{name}")()
    features = StandardScaler().fit_transform(table.data)
    if knn >= len(features):
        raise ValueError(
            f"Argument `knn` expected to be below {len(features)}, the number of nodes of {name}, but got {knn}; lower it."
        )
    nearest = NearestNeighbors(n_neighbors=knn).fit(features).kneighbors(return_distance=False)  # of each, without itself
    edge_index = torch.stack([torch.arange(len(features)).repeat_interleave(knn), torch.from_numpy(nearest).flatten()])
    classes = [str(label) for label in table.target_names]
    return Graph(name, torch.from_numpy(features), edge_index, torch.from_numpy(table.target), classes)


def _read_pyg(name: str, root: Path, split: str) -> Graph:
    kind = PYG[name]
    arguments = {"root": str(root / kind)} if kind in ("Actor", "WikiCS") else {"root": str(root), "name": name}
    raw = root / name / "raw"
    if kind == "Planetoid" and split == "geom-gcn":
        arguments["split"], raw = "geom-gcn", root / name / "geom-gcn" / "raw"
    if kind == "WikiCS":
        arguments["is_undirected"] = True
    with _explained(name, root, raw):
        if kind == "Planetoid":
            for part in PLANETOID_PICKLES:
                if (path := raw / f"ind.{name.lower()}.{part}").is_file():
                    _check_pickle(path)
        data = getattr(datasets, kind)(**arguments)[0]
    graph = Graph(name, data.x, data.edge_index, data.y, bag_of_words=kind != "WikiCS")
    if kind in ("Amazon", "Coauthor"):
        return graph
    masks = (data.train_mask, data.val_mask, data.test_mask)
    if kind == "WebKB" or kind == "Actor" or (kind == "Planetoid" and split == "geom-gcn"):
        graph.geom_gcn = masks
    if split != "geom-gcn":
        graph.public[20 if kind == "Planetoid" else None] = masks
    if kind == "Planetoid" and split != "geom-gcn":  # nodes from the first test node on that are not for test fill gaps
        last = torch.arange(len(data.y)) >= data.test_mask.nonzero().min()
        graph.unlabelled = last & ~data.test_mask
    return graph


def _read_arxiv(root: Path) -> Graph:
    try:
        from ogb.nodeproppred import PygNodePropPredDataset
    except ModuleNotFoundError as error:
        message = f"Argument `source` = 'ogbn-arxiv' needs the package {error.name!r}, which is not installed: pip install ogb"
        raise ModuleNotFoundError(message, name=error.name) from error
    before = torch.serialization.get_safe_globals()  # PyG's own: the end of the block would take them away
    pickled = [kind for kind in (Data, DataEdgeAttr, DataTensorAttr, GlobalStorage) if kind not in before]  # whole, by OGB
    with _explained("ogbn-arxiv", root, root / "ogbn_arxiv" / "raw"), torch.serialization.safe_globals(pickled):
        dataset = PygNodePropPredDataset("ogbn-arxiv", root=str(root))
        data, parts = dataset[0], dataset.get_idx_split()
    masks = tuple(_as_mask(parts[part], len(data.x)) for part in ("train", "valid", "test"))
    return Graph("ogbn-arxiv", data.x, data.edge_index, data.y.flatten(), public={None: masks})


@contextmanager
def _explained(name: str, root: Path, raw: Path) -> Iterator[None]:
    """Turn what a data set raises into a ValueError that says what to do; nothing that it loads unpickles objects."""
    try:
        with warnings.catch_warnings(), weights_only():
            warnings.filterwarnings("error", "Weights only load failed")  # PyG would then go on to unpickle the file
            warnings.filterwarnings("ignore", ".*`scipy.sparse.csr`")  # as the files of Planetoid call it
            yield
    except Exception as error:  # PyG, fsspec and urllib raise many kinds, none of which names the data set
        cause = brief(error)
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ValueError(
                f"Argument `root` expected a folder that can be written to, since PyG keeps processed/ beside raw/, but got "
                f"'{root}' ({cause}); copy {name} to a folder of your own and give that."
            ) from error
        raise ValueError(
            f"Argument `source` = {name!r} expected to be in, or downloadable to, `root` = '{root}' but got {cause}; without a "
            f"network, put its raw files into '{raw}'; if they are there, delete '{raw.parent}' and get them anew."
        ) from error


def _check_pickle(path: Path) -> None:
    try:
        check_arrays(path)
    except Exception as error:  # bytes that are no pickle make anything of the reader
        raise ValueError(f"'{path}' is no pickle of arrays ({brief(error)})") from error


def read_npz(path: Path) -> Graph:
    """Read a graph from a file that holds the CSR parts of the attributes, `edge` (e, 2), `labels` (N,) and, for the public
    split, node indices `train20` and `test20`, or with other numbers of labels a class.

    Raises:
        ValueError: If the file is missing, damaged, incomplete or contradicts itself.
    """
    keys = ", ".join(NPZ_KEYS)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {
                key: np.asarray(file[key])
                for key in file.files
                if key in NPZ_KEYS or re.fullmatch(r"(train|test)[0-9]{1,9}", key)
            }
    except Exception as error:  # what zipfile, zlib and numpy make of damaged bytes shares no base class below this one
        raise ValueError(
            f"Argument `source` expected a .npz file with {keys} but got '{path}' ({brief(error)}); check it."
        ) from error
    missing = [key for key in NPZ_KEYS if key not in arrays]
    if missing:
        raise ValueError(f"File '{path}' expected to hold {keys} but has no {', '.join(missing)}; add it.")

    def expect(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"File '{path}' expected to hold {what} but does not; write it again.")

    for key, array in arrays.items():
        whole = array.dtype.kind in "biu" or (array.dtype.kind == "f" and bool((np.floor(array) == array).all()))
        if key == "attr_data":
            expect(array.dtype.kind in "biuf", "numbers in `attr_data`")
        else:
            expect(whole, f"integers in `{key}`")
        expect(array.ndim == 1 or key == "edge", f"`{key}` in one dimension")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes Inf, which is refused below
        values = torch.from_numpy(arrays.pop("attr_data").astype(np.float32))
    with np.errstate(invalid="ignore"):  # and Inf a number that is refused, too
        parts = {key: torch.from_numpy(array.astype(np.int64)) for key, array in arrays.items()}
    indices, pointers, shape, edges, labels = (parts.pop(key) for key in NPZ_KEYS[1:])
    expect(len(shape) == 2 and bool((shape > 0).all()), "two positive numbers in `attr_shape`")
    num_nodes, num_features = shape.tolist()
    expect(num_nodes * num_features <= LARGEST_FEATURES, f"an `attr_shape` of at most {LARGEST_FEATURES:,} entries")
    expect(
        len(labels) == num_nodes and _within(labels, num_nodes), f"`labels` of {num_nodes} nodes, from 0, below their number"
    )
    expect(edges.ndim == 2 and edges.shape[1] == 2 and _within(edges, num_nodes), f"`edge` (e, 2) of nodes below {num_nodes}")
    counts = pointers.diff()
    rises = len(counts) == num_nodes and bool((counts >= 0).all()) and pointers[0] == 0
    expect(rises and pointers[-1] == len(indices) == len(values), "`attr_indptr` that rises from 0 to the number of values")
    expect(_within(indices, num_features), f"`attr_indices` below {num_features}")
    expect(bool(values.isfinite().all()), "finite numbers in `attr_data`")
    for key, nodes in parts.items():
        expect(_within(nodes, num_nodes), f"`{key}` of nodes below {num_nodes}")
    x = torch.zeros(num_nodes, num_features)
    rows = torch.arange(num_nodes).repeat_interleave(counts)
    x.index_put_((rows, indices), values, accumulate=True)
    public = {
        labels_per_class: (_as_mask(parts[f"train{labels_per_class}"], num_nodes), None, _as_mask(parts[test], num_nodes))
        for labels_per_class in sorted(int(key[5:]) for key in parts if key.startswith("train"))
        if (test := f"test{labels_per_class}") in parts and f"train{labels_per_class}" in parts
    }
    return Graph(path.stem, x, edges.T, labels, bag_of_words=True, public=public)


def _within(values: Tensor, limit: int) -> bool:
    return not values.numel() or bool(values.min() >= 0 and values.max() < limit)


def _as_mask(indices: Tensor | np.ndarray, size: int) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.as_tensor(indices).long()] = True
    return mask


def split_nodes(
    graph: Graph, split: str, labels_per_class: int | None, num_val: int, num_test: int | None, fold: int, seed: int
) -> tuple[tuple[Tensor, Tensor, Tensor], str]:
    """Masks (N,) of training, validation and test nodes, disjoint, and what to call the split.

    Args:
        graph: With its own splits.
        split: public, random or geom-gcn.
        labels_per_class: Training nodes of each class; None takes 20, or all that the split has.
        num_val: Validation nodes, where they are drawn.
        num_test: Test nodes, where they are drawn; None takes the rest.
        fold: Which of several splits.
        seed: Seed of what is drawn.

    Raises:
        ValueError: If the graph has no such split, or too few nodes for it.
    """
    rng = np.random.default_rng([seed, SPLIT_STREAM])
    labelled = torch.ones(len(graph.y), dtype=torch.bool) if graph.unlabelled is None else ~graph.unlabelled
    if split == "random":
        count = 20 if labels_per_class is None else labels_per_class
        train, val, test = _subsample(graph, labelled, count, "", rng), None, None
        name = f"random, {count} labels a class"
    else:
        (train, val, test), count, name = _stored_split(graph, split, labels_per_class, fold)
        if count is not None:
            train = _subsample(graph, train, count, f" for training in the {split} split", rng)
    drawn = count is not None
    if val is None:
        free = labelled & ~train if test is None else labelled & ~train & ~test
        sizes = {"num_val": num_val} | ({"num_test": num_test} if test is None else {})
        parts = _draw(graph, free, sizes, rng)
        if split != "random":
            what = " and ".join(f"{int(mask.sum())} for {part[4:]}" for part, mask in parts.items())
            name, drawn = f"{name}, {what} drawn from the rest", True
        val, test = parts["num_val"], parts.get("num_test", test)
    if (train & val).any() or (train & test).any() or (val & test).any():
        raise ValueError(f"Argument `split` = {split!r} of {graph.name} has nodes in two parts; use random.")
    return (train, val, test), f"{name}, seed {seed}" if drawn else name


def _stored_split(graph: Graph, split: str, labels_per_class: int | None, fold: int) -> tuple[Masks, int | None, str]:
    """Masks (N,) of a split of the data set itself, to how many labels a class it is to be cut (None: not), and its name."""
    if not (graph.public if split == "public" else graph.geom_gcn):
        raise ValueError(f"Argument `split` expected one that {graph.name} has but got {split!r}; use random.")
    masks, name, cut = graph.geom_gcn, split, labels_per_class
    if split == "public":
        choices = graph.public
        key = next(iter(choices)) if labels_per_class is None or len(choices) == 1 else labels_per_class
        if key not in choices:
            accepted = ", ".join(map(str, choices))
            raise ValueError(
                f"Argument `labels_per_class` expected to be one of {accepted}, those of the public splits of {graph.name}, "
                f"but got {key}; use one of them, or split = random."
            )
        masks, cut = choices[key], None if key == labels_per_class else labels_per_class
        name = f"public, train{key} and test{key}" if key is not None and masks[1] is None else split
    folds = masks[0].shape[1] if masks[0].ndim == 2 else 1
    if fold >= folds:
        raise ValueError(
            f"Argument `fold` expected to be below {folds}, the number of {split} splits of {graph.name}, but got {fold}; "
            "lower it."
        )
    picked = tuple(mask[:, fold] if mask is not None and mask.ndim == 2 else mask for mask in masks)
    name += f", fold {fold}" * (folds > 1) + f", cut to {cut} labels a class" * (cut is not None)
    return tuple(mask if mask is None else mask.bool() for mask in picked), cut, name


def _subsample(graph: Graph, pool: Tensor, count: int, what: str, rng: np.random.Generator) -> Tensor:
    """`count` nodes of each class from a pool, as a mask (N,)."""
    chosen = []
    for label in range(graph.num_classes):
        members = (pool & (graph.y == label)).nonzero().flatten().numpy()
        if len(members) < count:
            hint = "lower it" if len(members) else "no value suits: use another split or relabel the classes without gaps"
            raise ValueError(
                f"Argument `labels_per_class` expected to be at most {len(members)}, the number of nodes of class "
                f"{graph.class_name(label)} of {graph.name}{what}, but got {count}; {hint}."
            )
        chosen.append(rng.permutation(members)[:count])
    return _as_mask(np.concatenate(chosen), len(graph.y))


def _draw(graph: Graph, free: Tensor, sizes: dict[str, int | None], rng: np.random.Generator) -> dict[str, Tensor]:
    """Disjoint masks (N,) of nodes from a pool by name; a size that is None takes the rest, at least one node."""
    nodes = rng.permutation(free.nonzero().flatten().numpy())
    wanted = sum(1 if size is None else size for size in sizes.values())
    if wanted > len(nodes):
        given = " and ".join(f"`{name}` = {-1 if size is None else size}" for name, size in sizes.items())
        hint = "; lower them, or take all the rest with num_test = -1." if sizes.get("num_test") else "; lower it."
        raise ValueError(
            f"Arguments {given} expected to need at most {len(nodes)} nodes, those of {graph.name} ({len(graph.y)} nodes) that "
            f"are not in another part, but got {wanted}{hint}"
        )
    masks, begin = {}, 0
    for name, size in sizes.items():
        end = len(nodes) if size is None else begin + size
        masks[name], begin = _as_mask(nodes[begin:end], len(graph.y)), end
    return masks

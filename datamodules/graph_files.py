"""Graphs from files: data sets that PyG and OGB download, and .npz files.

No file runs code: the raw files of Planetoid, which are pickles, may hold arrays and plain values only, PyG's and OGB's
processed files are read with weights_only=True, and nothing else is tried if that fails. Whatever is wrong with a file is a
ValueError that names it.
"""

import errno
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_geometric import datasets
from torch_geometric.data import Data
from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
from torch_geometric.data.storage import GlobalStorage

from datamodules.graph_types import Graph, as_mask
from utilities.safe_load import brief, check_arrays, weights_only

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
PLANETOID_PICKLES = ("x", "tx", "allx", "y", "ty", "ally", "graph")
NPZ_KEYS = ("attr_data", "attr_indices", "attr_indptr", "attr_shape", "edge", "labels")
LARGEST_FEATURES = 2**30
"""Most entries of a feature matrix read from a .npz file: 4 GiB, since it is dense in memory."""


def read_pyg(name: str, root: Path, split: str) -> Graph:
    """Read a data set of PyG, downloading it if it is not in `root` yet.

    Args:
        name: One of PYG.
        root: Folder of the data sets.
        split: geom-gcn reads other files of Planetoid.

    Raises:
        ValueError: If it cannot be downloaded or read.
    """
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


def read_arxiv(root: Path) -> Graph:
    """Read ogbn-arxiv, downloading it if it is not in `root` yet.

    Raises:
        ValueError: If it cannot be downloaded or read.
        ModuleNotFoundError: If the package ogb is missing.
    """
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
    masks = tuple(as_mask(parts[part], len(data.x)) for part in ("train", "valid", "test"))
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
        labels_per_class: (as_mask(parts[f"train{labels_per_class}"], num_nodes), None, as_mask(parts[test], num_nodes))
        for labels_per_class in sorted(int(key[5:]) for key in parts if key.startswith("train"))
        if (test := f"test{labels_per_class}") in parts and f"train{labels_per_class}" in parts
    }
    return Graph(path.stem, x, edges.T, labels, bag_of_words=True, public=public)


def _within(values: Tensor, limit: int) -> bool:
    return not values.numel() or bool(values.min() >= 0 and values.max() < limit)

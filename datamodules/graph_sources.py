"""Sources of graphs: kNN graphs of scikit-learn's tables, karate club, PyG's and OGB's data sets, .npz files.

graph_files.py reads downloads and files, graph_splits.py splits the nodes; graph_types.py has what all of them make.

Legend: N nodes, E directed edges (each undirected edge twice), F features.
"""

from pathlib import Path

import torch
from torch_geometric import datasets

from datamodules.graph_files import PYG, read_arxiv, read_npz, read_pyg
from datamodules.graph_types import Graph

EMBEDDED = ("digits", "wine", "breast_cancer", "karate")
ACCEPTED_SOURCES = f"{', '.join((*EMBEDDED, *PYG))}, ogbn-arxiv or the path of a .npz file"


def load_graph(source: str, root: str, split: str, knn: int) -> Graph:
    """Read a graph, downloading it if it is not in `root` yet.

    Args:
        source: One of ACCEPTED_SOURCES; names in any case.
        root: Folder of PyG's and OGB's data sets.
        split: geom-gcn reads other files of Planetoid.
        knn: Number of neighbours of each row of a table.

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
        return read_arxiv(folder)
    return read_pyg(name, folder, split) if name in PYG else _knn_graph(name, knn)


def _knn_graph(name: str, knn: int) -> Graph:
    """Join each row of a table of scikit-learn, standardised, with its `knn` nearest others (Euclidean)."""
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

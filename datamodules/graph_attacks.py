"""Poisoned graphs: edges that an attacker changes before anyone trains.

dice   "delete internally, connect externally" (Waniek et al., Nature Human Behaviour 2018): half of the changes delete edges
       within a class, half add edges between classes, drawn at random.
prbcd  projected randomised block coordinate descent (Geisler et al., NeurIPS 2021), torch-geometric's, against a surrogate GCN:
       whatever flips of edges cost the surrogate most. The surrogate is trained on the clean graph and stays as it is (an
       evasion attack); the changed graph is what others train on (the transfer to poisoning of Mujkanovic et al., NeurIPS
       2022). It does not know their weights (gray box).

The attacker knows features, edges and the labels of all nodes, those of test nodes too. Who trains on the changed graph never
sees a label outside training and validation nodes. Features and labels are not changed.
Legend: N nodes, E directed edges (each undirected edge twice), F features, C classes, q rank.
"""

import copy
import os
import tempfile
import warnings
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout
from torch_geometric.nn.models import GCN
from torch_geometric.utils import coalesce, to_scipy_sparse_matrix

from utilities.digest import digest

Attack = Literal["dice", "prbcd"]
Surrogate = Literal["gcn", "low_rank"]
ATTACK_STREAM = 3
"""Stream of the draws from a seed; the split, the noise and the neighbours have others."""
SHARE, RANK, HIDDEN, DROPOUT, EPOCHS = 0.25, 20, 64, 0.5, 200
BLOCK = 250_000
"""Pairs of nodes among which an attack looks at once, as in torch-geometric's example."""


def check_attack(attack: str | None, share: float | None, surrogate: str | None, noise: float) -> None:
    """Check the settings of an attack, and that they belong to one.

    Args:
        attack: `edge_attack`.
        share: `attack_share`.
        surrogate: `attack_surrogate`.
        noise: `edge_noise`.

    Raises:
        ValueError: If one is out of range, or does not apply beside the others.
    """
    if attack is not None and attack not in get_args(Attack):
        raise ValueError(
            f"Argument `edge_attack` expected to be one of {', '.join(get_args(Attack))} but got {attack!r}; null is none, and "
            "edge_noise adds edges at random."
        )
    number = isinstance(share, int | float) and not isinstance(share, bool)
    if share is not None and not (number and 0 < share < inf):
        raise ValueError(
            f"Argument `attack_share` expected to be a number above 0 but got {share!r}; 0.25 changes a quarter as many "
            "edges as there are."
        )
    if surrogate is not None and surrogate not in get_args(Surrogate):
        raise ValueError(
            f"Argument `attack_surrogate` expected to be one of {', '.join(get_args(Surrogate))} but got {surrogate!r}."
        )
    if share is not None and attack is None:
        raise ValueError("Argument `attack_share` belongs to an attack, but `edge_attack` is null. Leave it out, or give one.")
    if surrogate is not None and attack != "prbcd":
        raise ValueError(
            f"Argument `attack_surrogate` belongs to edge_attack prbcd, but `edge_attack` is {attack or 'null'}. Leave it out, "
            "or use prbcd."
        )
    if attack is not None and noise:
        raise ValueError(
            f"Argument `edge_noise` expected to be 0 beside `edge_attack` = {attack} but got {noise}; leave out one of them."
        )


def budget_of(edge_index: Tensor, share: float) -> int:
    """Compute the number of undirected edges that an attack may change: a share of those that there are, rounded.

    Raises:
        ValueError: If it is none.
    """
    edges = edge_index.shape[1] // 2
    if not round(share * edges):
        raise ValueError(
            f"Argument `attack_share` expected to change an edge, but {share} of {edges:,} edges is none; raise it."
        )
    return round(share * edges)


def dice(edge_index: Tensor, labels: Tensor, share: float, seed: int) -> Tensor:
    """Delete edges within classes and add edges between classes, each such set of edges as likely as another.

    Args:
        edge_index: (2, E), undirected, coalesced, without self-loops.
        labels: (N,), of all nodes.
        share: Number of changes, in relation to E / 2. Half of them, rounded down, delete.
        seed: Seed of the draw.

    Returns:
        (2, E'), undirected, coalesced, without self-loops.

    Raises:
        ValueError: If there are fewer edges within classes, or fewer pairs of different classes without an edge.
    """
    budget, num_nodes = budget_of(edge_index, share), len(labels)
    removed, rng = budget // 2, np.random.default_rng([seed, ATTACK_STREAM])
    low, high = edge_index[:, edge_index[0] < edge_index[1]].numpy()
    y = labels.numpy()
    within = (y[low] == y[high]).nonzero()[0]
    sizes = np.bincount(y).astype(np.int64)
    free = (num_nodes**2 - int((sizes**2).sum())) // 2 - (len(low) - len(within))
    if removed > len(within) or budget - removed > free:
        raise ValueError(
            f"Argument `attack_share` expected to delete at most {len(within):,} edges within classes and add at most {free:,} "
            f"between them, but {share} of {len(low):,} edges is {removed:,} and {budget - removed:,}; lower it."
        )
    kept = np.ones(len(low), dtype=bool)
    kept[rng.choice(within, removed, replace=False)] = False
    taken, added = set((low * num_nodes + high).tolist()), []
    while len(added) < budget - removed:  # pairs in the order in which they are drawn first
        first, second = np.sort(rng.integers(num_nodes, size=(2, budget)), axis=0)
        for pair in (first * num_nodes + second)[y[first] != y[second]].tolist():
            if pair not in taken and len(added) < budget - removed:
                taken.add(pair)
                added.append(pair)
    pairs = np.concatenate([low[kept] * num_nodes + high[kept], np.array(added, dtype=np.int64)])
    edges = torch.from_numpy(np.stack([pairs // num_nodes, pairs % num_nodes]))
    return coalesce(torch.cat([edges, edges.flip(0)], dim=1), num_nodes=num_nodes)


def prbcd(
    x: Tensor,
    edge_index: Tensor,
    labels: Tensor,
    train: Tensor,
    val: Tensor,
    attacked: Tensor,
    share: float,
    seed: int,
    surrogate: Surrogate = "gcn",
) -> Tensor:
    """Flip the edges that cost a surrogate's margins on some nodes most, on a GPU if there is one.

    The surrogate learns from the training nodes of the clean graph; the epoch is that of the best validation accuracy. The
    attack maximises the mean, over the attacked nodes, of tanh(log probability of the best wrong class less that of the true
    one).

    Args:
        x: (N, F).
        edge_index: (2, E), undirected, coalesced, without self-loops.
        labels: (N,), of all nodes: the attacker knows them.
        train: (N,) bool, nodes from whose labels the surrogate learns.
        val: (N,) bool, nodes that choose its epoch.
        attacked: (N,) bool, nodes that are to be misclassified.
        share: Number of flips, in relation to E / 2.
        seed: Seed of the surrogate and the attack; one seed gives one result on one kind of device.
        surrogate: gcn, or low_rank: a GCN on the projection of the edges on the leading RANK singular vectors of the clean
            graph, for an attacker who knows that others propagate by a low-rank view.

    Returns:
        (2, E'), undirected, coalesced, without self-loops, on the CPU.

    Raises:
        ValueError: If more than half of all pairs of nodes would be flipped.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*contains experimental code", UserWarning)
        from torch_geometric.contrib.nn import PRBCDAttack

    budget, num_nodes = budget_of(edge_index, share), len(x)
    pairs = num_nodes * (num_nodes - 1) // 2
    if budget > pairs // 2:
        raise ValueError(
            f"Argument `attack_share` expected to flip at most half of the {pairs:,} pairs of nodes, but {share} of "
            f"{edge_index.shape[1] // 2:,} edges is {budget:,}; lower it."
        )
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    x, edge_index, labels, train, val, attacked = (
        tensor.to(device) for tensor in (x, edge_index, labels, train, val, attacked)
    )
    entropy = int(np.random.SeedSequence([seed, ATTACK_STREAM]).generate_state(1, np.uint64)[0])
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(entropy)
        model = _trained(surrogate, x, edge_index, labels, train, val, entropy % 2**32)
        attack = PRBCDAttack(model, block_size=min(BLOCK, pairs), loss="tanh_margin", log=False)
        changed, _ = attack.attack(x, edge_index, labels, budget, attacked)
    return coalesce(changed.cpu(), num_nodes=num_nodes)


def _trained(surrogate: Surrogate, x: Tensor, edge_index: Tensor, labels: Tensor, train: Tensor, val: Tensor, seed: int):
    """Train a surrogate on the training nodes (full batch, Adam) and return the weights of its best validation epoch."""
    classes = int(labels.max()) + 1
    if surrogate == "gcn":
        model: nn.Module = GCN(x.shape[1], HIDDEN, 2, classes, dropout=DROPOUT)
    else:
        model = LowRankGCN(x.shape[1], classes, leading_vectors(edge_index, len(x), seed))
    model.to(x.device)
    optimizer, best, kept = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4), -1.0, {}
    for _ in range(EPOCHS):
        model.train()
        optimizer.zero_grad()
        cross_entropy(model(x, edge_index)[train], labels[train]).backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(x, edge_index).argmax(1) == labels)[val].double().mean().item()
        if accuracy >= best:
            best, kept = accuracy, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return model.requires_grad_(False)


class LowRankGCN(nn.Module):
    """A GCN of two layers that propagates by D^-½ (Q B Qᵀ + I) D^-½, B = Qᵀ A Q, with A's weights as an argument.

    What GCN-SVD (Entezari et al., WSDM 2020) makes of a graph that an attack has changed so little that its leading singular
    vectors Q stay: to the first order the singular values change by the diagonal of Qᵀ dA Q.

    Args:
        in_channels: F.
        classes: C.
        basis: Q (N, q), orthonormal columns.
    """

    def __init__(self, in_channels: int, classes: int, basis: Tensor) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(in_channels, HIDDEN), nn.Linear(HIDDEN, classes)
        self.register_buffer("basis", basis)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """Compute logits (N, C) of features (N, F), edges (2, E) and their weights (E,), ones when None."""
        basis, (source, target) = self.basis, edge_index
        rows = basis[source] if edge_weight is None else edge_weight[:, None] * basis[source]
        core = basis.T @ torch.zeros_like(basis).index_add(0, target, rows)
        scale = (basis @ (core @ basis.sum(0)) + 1).clamp_min(1).rsqrt()[:, None]

        def propagated(hidden: Tensor) -> Tensor:
            hidden = scale * hidden
            return scale * (basis @ (core @ (basis.T @ hidden)) + hidden)

        hidden = propagated(self.first(dropout(x, DROPOUT, self.training))).relu()
        return propagated(self.second(dropout(hidden, DROPOUT, self.training)))


def leading_vectors(edge_index: Tensor, num_nodes: int, seed: int) -> Tensor:
    """Find the leading RANK left singular vectors of the adjacency matrix, (N, at most RANK)."""
    from sklearn.utils.extmath import randomized_svd

    adjacency = to_scipy_sparse_matrix(edge_index, num_nodes=num_nodes).tocsr()
    vectors = randomized_svd(adjacency, min(RANK, num_nodes), random_state=seed)[0]
    return torch.from_numpy(np.ascontiguousarray(vectors)).float().to(edge_index.device)


def kept_on_disk(folder: Path, name: str, tensors: dict[str, Tensor], make: Callable[[], Tensor]) -> Tensor:
    """Read edges that were made of the same inputs before, or make and keep them; of several processes one makes them.

    Args:
        folder: Folder of the files.
        name: Start of the file's name, which tells all settings; a hash of the tensors follows.
        tensors: What the edges are made of, by name.
        make: Makes the edges (2, E).

    Raises:
        ValueError: If the folder cannot be written.
    """
    path = folder / f"{name}-{digest(tensors.items())[:16]}.safetensors"
    if not path.exists():
        _check_writable(folder)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                new = path.with_suffix(".new")
                save_file({"edge_index": make().contiguous()}, new)
                os.replace(new, path)
    return load_file(path)["edge_index"]


def _check_writable(folder: Path) -> None:
    """Check, before minutes of work, that what they make can be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"Argument `root` expected a folder that can be written, since edge_attack prbcd keeps its graphs in "
            f"{str(folder)!r}, but got: {error.strerror}. Choose another folder, or make it writable."
        ) from error

"""Splits of a graph's nodes into training, validation and test nodes: those that came with it, or drawn ones."""

import numpy as np
import torch
from torch import Tensor

from datamodules.graph_types import Graph, Masks, as_mask

SPLIT_STREAM = 0
"""Stream of the draws from a seed; noise and neighbours have others."""
UNIFORM_SHARES = (0.48, 0.32)
"""Shares of training and validation nodes of split uniform, those of the geom-gcn splits."""


def split_nodes(
    graph: Graph,
    split: str,
    labels_per_class: int | None,
    num_val: int,
    num_test: int | None,
    fold: int,
    seed: int,
    val_per_class: int | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], str]:
    """Return masks (N,) of training, validation and test nodes, disjoint, and a name for the split.

    Args:
        graph: Graph with its own splits.
        split: public, random, geom-gcn or uniform.
        labels_per_class: Number of training nodes of each class; None takes 20, or all that the split has.
        num_val: Number of validation nodes, where they are drawn.
        num_test: Number of test nodes, where they are drawn; None takes the rest.
        fold: Number of the split, of several, from 0.
        seed: Seed of what is drawn.
        val_per_class: Number of validation nodes of each class, in place of `num_val`; of split random only.

    Raises:
        ValueError: If the graph has no such split, or too few nodes for it.
    """
    rng = np.random.default_rng([seed, SPLIT_STREAM])
    labelled = torch.ones(len(graph.y), dtype=torch.bool) if graph.unlabelled is None else ~graph.unlabelled
    if split == "uniform":
        return _uniform(graph, labelled, rng), f"uniform, seed {seed}"
    if split == "random":
        count = 20 if labels_per_class is None else labels_per_class
        train, val, test = _subsample(graph, labelled, count, "", rng), None, None
        name = f"random, {count} labels a class"
        if val_per_class is not None:
            val = _subsample(graph, labelled & ~train, val_per_class, " that are not for training", rng, "val_per_class")
            test = _draw(graph, labelled & ~train & ~val, {"num_test": num_test}, rng)["num_test"]
            name += f", {val_per_class} for validation"
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


def _uniform(graph: Graph, labelled: Tensor, rng: np.random.Generator) -> Masks:
    """Draw 48, 32 and 20 % of the labelled nodes, as masks (N,), whatever their classes are."""
    train, val = (round(share * int(labelled.sum())) for share in UNIFORM_SHARES)
    parts = _draw(graph, labelled, {"train": train, "num_val": val, "num_test": None}, rng)
    return parts["train"], parts["num_val"], parts["num_test"]


def _stored_split(graph: Graph, split: str, labels_per_class: int | None, fold: int) -> tuple[Masks, int | None, str]:
    """Return masks (N,) of the data set's own split, the labels a class to which it is cut (None: not), and its name."""
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


def _subsample(
    graph: Graph, pool: Tensor, count: int, what: str, rng: np.random.Generator, argument: str = "labels_per_class"
) -> Tensor:
    """Draw `count` nodes of each class from a pool, as a mask (N,)."""
    chosen = []
    for label in range(graph.num_classes):
        members = (pool & (graph.y == label)).nonzero().flatten().numpy()
        if len(members) < count:
            hint = "lower it" if len(members) else "no value suits: use another split or relabel the classes without gaps"
            raise ValueError(
                f"Argument `{argument}` expected to be at most {len(members)}, the number of nodes of class "
                f"{graph.class_name(label)} of {graph.name}{what}, but got {count}; {hint}."
            )
        chosen.append(rng.permutation(members)[:count])
    return as_mask(np.concatenate(chosen), len(graph.y))


def _draw(graph: Graph, free: Tensor, sizes: dict[str, int | None], rng: np.random.Generator) -> dict[str, Tensor]:
    """Draw disjoint masks (N,) of nodes from a pool by name; a size that is None takes the rest, at least one node."""
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
        masks[name], begin = as_mask(nodes[begin:end], len(graph.y)), end
    return masks

"""Methods of the graph studies: which class each is, and the settings among which a random search draws.

A configuration is flat, as it stands in the results files; `module_arguments` makes a module's arguments of it.
"""

import random
from typing import Any

COMMON = {
    "learning_rate": [0.005, 0.01],
    "weight_decay": [1e-4, 5e-4, 1e-3, 2e-3],
    "dropout": [0.3, 0.5, 0.7, 0.8],
    "hidden_channels": [64],
}
UNSUPERVISED = {
    "learning_rate": [5e-4, 1e-3, 3e-3],
    "weight_decay": [0.0, 1e-5, 1e-4],
    "dropout": [0.0, 0.2],
    "hidden_channels": [256, 512],
    "num_layers": [2, 3],
}
CONTRAST = {
    "rank": [100],
    "mix": [0.1, 0.2, 0.4],
    "contrast_weight": [1.0, 3.0],
    "temperature": [0.5, 1.0],
    "beta": [1.0],
    "anchors": [256],
}
PSEUDO = {
    "pseudo_weight": [0.1, 0.3, 1.0],
    "alignment": [0.0, 2.0, 8.0],
    "confident": [0.6, 0.8],
    "warmup_epochs": [60],
}
"""The part of wider spaces that was ever worth it, on splits of other seeds; commit 70822f4 has the wider ones."""
DEFAULT = {
    "encoder": "gcn",
    "hidden_channels": 64,
    "dropout": 0.5,
    "learning_rate": 0.01,
    "weight_decay": 5e-4,
    "rank": 100,
    "mix": 0.2,
    "contrast_weight": 0.3,
    "temperature": 0.5,
    "beta": 1.0,
    "anchors": 256,
    "pseudo_weight": 1.0,
    "alignment": 2.0,
    "confident": 0.8,
    "warmup_epochs": 60,
}
"""Those of the class, the same on every data set: not tuned."""
BALANCED = {"contrast_weight": 0.0, "balanced": True, "alignment": 0.0, "clean": True, "confident": "mean"}
"""Balanced softmax on pseudo-labels, and no contrast."""
JOINT_OR_NEIGHBOURS = {"base": "joint", "mix": 1.0, "edge_weight": 1.0, "warmup_epochs": 60}
OTHER_VIEW = {"view": ["svd", "knn", "drop"], "pseudo_weight": PSEUDO["pseudo_weight"]}
"""Second views that differ from the edges: the joint low-rank one, edges and neighbours, dropped edges."""
ENCODERS = ("gcn", "gat", "graphsage", "gin", "appnp", "sgc")
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, list]]] = {
    **{name: ("NodeClassifier", {"encoder": name}, COMMON) for name in ENCODERS},
    "gcn, pseudo-labels": ("NodeClassifier", {"encoder": "gcn"}, COMMON | PSEUDO),
    "appnp, pseudo-labels": ("NodeClassifier", {"encoder": "appnp"}, COMMON | PSEUDO),
    "dgi": ("DGI", {}, {**UNSUPERVISED, "num_layers": [2]}),
    "grace": ("GRACE", {}, UNSUPERVISED | {"temperature": [0.2, 0.4, 0.7]}),
    **{f"csg2l, {name}": ("CSG2L", {"encoder": name}, COMMON | CONTRAST | PSEUDO) for name in ENCODERS},
    "csg2l, gcn, edge drop": (
        "CSG2L",
        {"encoder": "gcn", "view": "drop"},
        COMMON | CONTRAST | PSEUDO | {"drop_edges": [0.2, 0.4], "drop_features": [0.2, 0.4]},
    ),
    **{
        f"csg2l, {name}, balanced": ("CSG2L", JOINT_OR_NEIGHBOURS | BALANCED | {"encoder": name}, COMMON | OTHER_VIEW)
        for name in ("gcn", "appnp")
    },
}
METHODS["csg2l, default"] = ("CSG2L", DEFAULT, {})
"""Name of a row -> class, what is fixed, and values among which the random search draws."""
COMPARED = ("gcn", "gat", "appnp", "gcn, pseudo-labels", "appnp, pseudo-labels", "dgi", "grace", "csg2l, gcn", "csg2l, appnp",
            "csg2l, default")  # fmt: skip
"""Methods of the comparison; the others are for the study of encoders."""

JOINT = ("neighbors", "neighbor_weight", "similarity")
SVD = {name: name for name in ("base", "rank", "mix", "diffusion_steps", *JOINT, "seed")}
KNN = {name: name for name in ("neighbors", "mix", "edge_weight", "similarity")}
DROP = {"drop_edges": "edges", "drop_features": "features"}
WEIGHED = {"contrast_weight": "weight"} | {
    name: name for name in ("form", "beta", "reweight", "temperature", "intra_view", "head_channels", "anchors")
}
PREDICTED = {"pseudo_weight": "weight", "pseudo_beta": "beta"} | {
    name: name for name in ("alignment", "confident", "warmup_epochs", "balanced", "clean")
}
CLUSTERED = {"confident": "confident", "warmup_epochs": "warmup_epochs", "cluster_every": "every", "seed": "seed"}
"""Names in a flat configuration -> names in the group of CSG2L that they belong to."""


def configuration(method: str, number: int) -> dict[str, Any]:
    """The number-th random configuration of a method, the same on every data set."""
    _, fixed, space = METHODS[method]
    draw = random.Random(f"{method}/{number}")
    return fixed | {name: draw.choice(values) for name, values in space.items()}


def class_of(method: str) -> str:
    """Name of the LightningModule of a method, or of a variant, which is called "<method>: <what is different>"."""
    return METHODS[method.split(":")[0]][0]


def module_arguments(name: str, flat: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a LightningModule for a flat configuration.

    A search draws all settings of CSG2L alike; those that do not apply to its view or to a contrast of weight 0 are left out.
    `purified_rank` is the rank of a purified local view.

    Args:
        name: Name of the module's class.
        flat: Settings by name.
    """
    from lightning_modules.parts.csg2l_settings import ClusteredLabels, Contrast, PredictedLabels
    from lightning_modules.parts.csg2l_views import DropView, KnnView, PurifiedView, SvdView

    if "purified_rank" in flat:
        local = {"local_view": PurifiedView(flat["purified_rank"])}
        flat = {key: value for key, value in flat.items() if key != "purified_rank"} | local
    if name != "CSG2L":
        return flat

    def group(names: dict[str, str]) -> dict[str, Any]:
        return {new: flat[old] for old, new in names.items() if old in flat}

    kind, names = {"drop": (DropView, DROP), "knn": (KnnView, KNN)}.get(flat.get("view", "svd"), (SvdView, SVD))
    view = kind(**group(names))
    contrast = Contrast(weight=0.0) if flat.get("contrast_weight") == 0 else Contrast(**group(WEIGHED))
    supervised = flat.get("supervised", True)
    labels = PredictedLabels(**group(PREDICTED)) if supervised else ClusteredLabels(**group(CLUSTERED))
    grouped = {*SVD, *KNN, *DROP, *WEIGHED, *PREDICTED, *CLUSTERED, "view"}
    plain = {key: value for key, value in flat.items() if key not in grouped}
    return plain | {"view": view, "contrast": contrast, "pseudo_labels": labels}

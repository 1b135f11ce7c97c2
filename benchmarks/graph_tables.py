"""Tables of the docs about graphs, from results/csg2l*.csv (python -m benchmarks.tables)."""

import json
import math
import statistics
from collections.abc import Iterable

from benchmarks.graph_settings import ENCODERS
from benchmarks.markdown import read, spread, table

NAMES = {
    "Cora": "Cora",
    "CiteSeer": "CiteSeer",
    "acm": "ACM",
    "digits": "digits",
    "wine": "wine",
    "breast_cancer": "breast cancer",
    "uai": "UAI",
    "BlogCatalog": "BlogCatalog",
    "flickr": "Flickr",
}
CLEAN, NOISY, FEW = ("0.0",), ("0.2", "0.5"), ("1", "3", "5")
Key = tuple[str, ...]


def accuracies(rows: Iterable[dict[str, str]], phase: str, *columns: str, measure: str = "test") -> dict[Key, dict[int, float]]:
    """Test accuracy, or another measure, in per cent by the columns named, then by seed."""
    found: dict[Key, dict[int, float]] = {}
    for row in rows:
        if row["phase"] == phase:
            found.setdefault(tuple(row[column] for column in columns), {})[int(row["seed"])] = 100 * float(row[measure])
    return found


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean of paired differences and half the width of its 95 % interval (Student's t)."""
    from scipy.stats import t

    n = len(differences)
    return statistics.mean(differences), float(t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)


def paired(one: dict[int, float], other: dict[int, float]) -> list[float]:
    """Differences on the seeds that both have."""
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def environment(row: dict[str, str]) -> str:
    """Hardware and versions of a row."""
    return f"{row['hardware']}, torch {row['torch']}, torch-geometric {row['torch_geometric']}"


def hardware(rows: list[dict[str, str]]) -> str:
    """Name the machines on which the rows of a table were measured."""
    return " and ".join(sorted({environment(row) for row in rows}))


def quality() -> str:
    """Test accuracy on public splits by method, and how far CSG2L is ahead of its own encoder."""
    rows = [row for row in read("csg2l.csv") if row["phase"] == "final"]
    found = accuracies(rows, "final", "method", "dataset")
    datasets = [name for name in NAMES if any(key[1] == name for key in found)]
    methods = sorted({key[0] for key in found}, key=lambda name: ("csg2l" in name, "pseudo" in name, name))
    lines = []
    for method in methods:
        values = [found.get((method, name), {}).values() for name in datasets]
        lines.append([method, *(spread(of_one) if len(of_one) > 1 else "" for of_one in values)])
    pairs = [(f"csg2l, {name}{what}", name) for what in ("", ", balanced") for name in ("gcn", "appnp")]
    for ours, alone in (*pairs, (DEFAULT, "gcn")):
        cells = [gain(paired(found.get((ours, name), {}), found.get((alone, name), {}))) for name in datasets]
        if any(cells):
            lines.append([f"{ours} − {alone}", *cells])
    seeds = sorted({len(values) for values in found.values()})
    note = (
        f"Test accuracy in per cent, mean ± standard deviation of {' or '.join(map(str, seeds))} fresh seeds; differences are "
        f"paired, ± half a 95 % interval. {hardware(rows)}."
    )
    return f"{table(['', *map(NAMES.get, datasets)], lines)}\n\n{note}"


def robust() -> str:
    """Test accuracy by labels a class, noise 0 / 20 / 50 % in a cell."""
    rows = [row for row in read("csg2l_robust.csv") if row["phase"] == "final"]
    found = accuracies(rows, "final", "method", "dataset", "labels", "noise")
    tables = []
    for dataset in ("Cora", "CiteSeer", "acm"):
        methods = list(dict.fromkeys(key[0] for key in found if key[1] == dataset and ":" not in key[0]))
        labels = ("1", "3", "5", "20")
        lines = []
        for method in sorted(methods, key=lambda name: ("csg2l" in name, "pseudo" in name, name)):
            cells = []
            for count in labels:
                values = [found.get((method, dataset, count, noise)) for noise in (*CLEAN, *NOISY)]
                cells.append(" / ".join(f"{statistics.mean(v.values()):.1f}" if v else "–" for v in values))
            lines.append([method, *cells])
        tables.append(table([NAMES[dataset], *(f"{n} label{'s' * (n != '1')} a class" for n in labels)], lines))
    counts = [len(values) for key, values in found.items() if ":" not in key[0]]
    note = (
        f"Test accuracy in per cent with 0 / 20 / 50 % added edges, mean of {min(counts)} to {max(counts)} seeds, each with "
        f"its own split and noise, the same for all methods. {hardware(rows)}."
    )
    return "\n\n".join([*tables, note])


def seed_means(found: dict[Key, dict[int, float]], one: str, other: str, cells: Iterable[Key]) -> list[float]:
    """Differences of two methods paired by seed: mean over cells, of the seeds that both have in all of them."""
    pairs = [(found.get((one, *cell), {}), found.get((other, *cell), {})) for cell in cells]
    seeds = set.intersection(*(a.keys() & b.keys() for a, b in pairs))
    return [statistics.mean(a[seed] - b[seed] for a, b in pairs) for seed in sorted(seeds)]


def gain(values: list[float], counted: bool = False) -> str:
    """Mean difference ± half a 95 % interval, with the number of seeds if it is wanted; nothing of fewer than two."""
    if len(values) < 2:
        return ""
    return "{:+.1f} ± {:.1f}".format(*interval(values)) + f" ({len(values)})" * counted


DATASETS = ("Cora", "CiteSeer", "acm")
"""Of csg2l_robust.csv."""
SETTINGS = {
    "≤ 5 labels, clean": (FEW, CLEAN),
    "≤ 5 labels, noisy": (FEW, NOISY),
    "1 label, clean": (("1",), CLEAN),
    "20 labels, clean": (("20",), CLEAN),
}
"""Column -> labels a class and noises that it pools."""


def cells_of(datasets: Iterable[str], setting: str) -> list[Key]:
    """Data set, labels and noise of all cells of csg2l_robust.csv that a column pools."""
    labels, noises = SETTINGS[setting]
    return [(dataset, count, noise) for dataset in datasets for count in labels for noise in noises]


def robust_accuracies() -> dict[Key, dict[int, float]]:
    """(Method, data set, labels, noise) -> seed -> test accuracy, from csg2l_robust.csv."""
    return accuracies(read("csg2l_robust.csv"), "final", "method", "dataset", "labels", "noise")


def differences(compared: dict[str, tuple[str, ...]]) -> str:
    """Differences pooled over cells with few labels, and those with 20, a line for each data set."""
    found, lines = robust_accuracies(), []
    for one, others in compared.items():
        for other in others:
            for dataset in DATASETS:
                cells = [gain(seed_means(found, one, other, cells_of([dataset], setting))) for setting in SETTINGS]
                if any(cells):
                    lines.append([f"{one} − {other.removeprefix(f'{one}: ')}, {NAMES[dataset]}", *cells])
    return table(["", *SETTINGS], lines)


def gains() -> str:
    """Differences of the default to its rivals, pooled over data sets too."""
    found, lines, counts = robust_accuracies(), [], {}
    for rival in RIVALS:
        values = [seed_means(found, DEFAULT, rival, cells_of(DATASETS, setting)) for setting in SETTINGS]
        counts[rival] = min(map(len, values))
        lines.append([rival, *map(gain, values)])
    most = max(counts.values())
    fewer = "".join(f", {count} for {rival}" for rival, count in counts.items() if count < most)
    note = (
        "Points of test accuracy. One observation is a seed: the mean of its paired differences over "
        f"{', '.join(map(NAMES.get, DATASETS))} and over the labels a class and noises of a column. Mean ± half a 95 % "
        f"interval (Student's t) over {most} seeds{fewer}."
    )
    return f"{table(['csg2l, default −', *SETTINGS], lines)}\n\n{note}"


DEFAULT = "csg2l, default"
RIVALS = ("gcn", "appnp", "gcn, pseudo-labels", "appnp, pseudo-labels", "dgi", "grace")
COMPARED = {DEFAULT: ("gcn", "gat", *RIVALS[1:]), "csg2l, appnp": RIVALS[1:4]}
"""All that csg2l_robust.csv compares; the table of six rows has RIVALS."""
VARIANTS = ("no reweighting", "edge drop instead of SVD", "no contrast", "no pseudo-label cross-entropy")


def weights() -> str:
    """Validation accuracy of the default by the weight of its contrast."""
    rows = read("csg2l_default.csv")
    columns = {
        "all": {},
        **{NAMES[name]: {"dataset": name} for name in ("Cora", "CiteSeer", "acm")},
        **{f"{n} label{'s' * (n != '1')}": {"labels": n} for n in ("1", "5", "20")},
        **{f"{share} % noise": {"noise": noise} for noise, share in (("0.0", 0), ("0.2", 20), ("0.5", 50))},
    }
    found: dict[float, list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault(json.loads(row["arguments"])["contrast_weight"], []).append(row)
    lines = []
    for weight, those in sorted(found.items()):
        cells = []
        for wanted in columns.values():
            cells.append(statistics.mean(100 * float(row["val"]) for row in those if wanted.items() <= row.items()))
        lines.append([str(weight), *(f"{cell:.2f}" for cell in cells)])
    seeds = sorted({int(row["seed"]) for row in rows})
    note = (
        f"Validation accuracy in per cent, mean over the other settings and seeds {seeds[0]} to {seeds[-1]}, each with its own "
        f"split and noise. {hardware(rows)}."
    )
    return f"{table(['λ', *columns], lines)}\n\n{note}"


def ablation() -> str:
    """Change of test accuracy when one thing is changed in the chosen configuration, paired by seed."""
    found = accuracies(read("csg2l.csv"), "ablation", "method", "dataset")
    datasets = [name for name in NAMES if any(key[1] == name for key in found)]
    base = "csg2l, gcn: unchanged"
    lines = []
    for method in dict.fromkeys(key[0] for key in found if key[0] != base):
        pairs = [paired(found.get((method, name), {}), found[base, name]) for name in datasets]
        lines.append([method.split(": ")[1], *map(gain, pairs)])
    return table(["", *map(NAMES.get, datasets)], lines)


def encoders() -> str:
    """Test accuracy of each encoder alone and under CSG2L, and the paired difference."""
    rows = [row for row in read("csg2l_encoders.csv") if row["phase"] == "final"]
    found = accuracies(rows, "final", "method", "dataset")
    names = [name for name in ENCODERS if (f"csg2l, {name}", "Cora") in found]
    datasets, lines = [name for name in NAMES if any(key[1] == name for key in found)], []
    for name in names:
        cells = []
        for dataset in datasets:
            alone, ours = found.get((name, dataset), {}), found.get((f"csg2l, {name}", dataset), {})
            cells += [spread(values.values()) if values else "" for values in (alone, ours)] + [gain(paired(ours, alone))]
        lines.append([name, *cells])
    head = [f"{NAMES[dataset]}, {what}" for dataset in datasets for what in ("alone", "CSG2L", "gain")]
    return f"{table(['', *head], lines)}\n\nPublic splits, 5 or 10 seeds. {hardware(rows)}."


def speed() -> str:
    """Seconds of the factors and of an epoch."""
    rows = read("csg2l_speed.csv")
    lines = [[row["what"], row["setting"], row["value"], row["unit"]] for row in rows]
    return f"{table(['what', 'setting', 'value', 'unit'], lines)}\n\n{hardware(rows)}."


TABLES = {
    "graphs": quality,
    "graphs-gains": gains,
    "graphs-gains-all": lambda: differences(COMPARED),
    "graphs-variants": lambda: differences({DEFAULT: tuple(f"{DEFAULT}: {variant}" for variant in VARIANTS)}),
    "graphs-default": weights,
    "graphs-robust": robust,
    "graphs-ablation": ablation,
    "graphs-encoders": encoders,
    "graphs-speed": speed,
}

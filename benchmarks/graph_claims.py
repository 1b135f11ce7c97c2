"""Tables of the three claims of CSG2L's abstract (arXiv 2504.18148), from results/csg2l*.csv (python -m benchmarks.tables).

The claims: a view from an SVD is better than random perturbation; pairs should not all weigh the same; any GNN gains. Each line
is a difference of two methods, paired by seed. Lines whose rows are not there yet are left out.
"""

from collections.abc import Iterable

from benchmarks.graph_contrast import LABELLED, NONE, WITH, WITHOUT
from benchmarks.graph_embeddings import SWAPPED
from benchmarks.graph_few import PREFIX
from benchmarks.graph_runs import read as read_if_there
from benchmarks.graph_settings import ENCODERS
from benchmarks.graph_tables import (
    DATASETS,
    DEFAULT,
    FEW,
    NAMES,
    Key,
    accuracies,
    cells_of,
    gain,
    hardware,
    interval,
    robust_accuracies,
    seed_means,
)
from benchmarks.markdown import ROOT, read, table

Found = dict[Key, dict[int, float]]
PLANETOID = ("Cora", "CiteSeer")
FEW_LABELS = ("≤ 5 labels, clean", "≤ 5 labels, noisy")
VIEWS = (
    ("joint, balanced", "dropped edges, balanced"),
    ("joint, balanced", "knn and edges, balanced"),
    ("decoupled, edges", "decoupled, dropped edges"),
    ("decoupled, joint", "decoupled, dropped edges"),
    ("decoupled, joint", "decoupled, knn and edges"),
    ("decoupled, joint", "decoupled, knn"),
    ("all words, edges", "all words, dropped edges"),
    ("all words, joint", "all words, dropped edges"),
    ("all words, joint", "all words, knn and edges"),
    ("all words, joint", "all words, knn"),
)
"""A view from an SVD, and what stands in its place; csg2l_few.csv."""
ATTACKED = (
    ("joint, balanced", "dropped edges, balanced"),
    ("joint, balanced", "knn, balanced"),
    ("decoupled, joint", "decoupled, dropped edges"),
    ("decoupled, joint", "decoupled, knn"),
    ("purified, joint", "joint, balanced"),
    ("purified, knn", "knn, balanced"),
    ("purified, joint", "purified, knn"),
    ("purified, joint", "knn, balanced"),
)
"""The same in csg2l_attack.csv; `purified` is a local view from an SVD in place of the edges."""
ATTACKS = ("none", "prbcd 25 %", "dice 25 %")
FRESH = (("default", "alone"), ("default", "pseudo-labels"), ("chosen", "alone"), ("chosen", "pseudo-labels"))
"""CSG2L, and the encoder by itself."""


MEASURES = {"test": "regression", "nmi": "NMI", "ari": "ARI"}
"""Of embeddings without labels: column -> what a table calls it."""

NOTE = (
    "Points of test accuracy, paired by seed (which draws the split, but for public ones), mean over the labels a class, "
    "noises and data sets that are pooled ± half a 95 % interval (seeds); bold where the interval leaves out 0."
)


def cell(found: Found, one: str, other: str, keys: Iterable[Key]) -> str:
    """Mean difference over cells ± half an interval (seeds), bold where the interval leaves out 0."""
    values = seed_means(found, one, other, keys)
    text = gain(values, counted=True)
    if not text:
        return ""
    mean, half = interval(values)
    return f"**{text}**" if abs(mean) > half else text


def views() -> str:
    """Claim a: a view from an SVD against dropped edges, and against neighbours without an SVD, clean and attacked."""
    found = accuracies(read("csg2l_few.csv"), "final", "method", "dataset", "labels")
    columns = {
        f"{name}, {label}": [(dataset, count) for dataset in datasets for count in labels]
        for label, labels in (("1 to 20 labels", ("1", "3", "5", "20")), ("3 and 5 labels", ("3", "5")))
        for name, datasets in (*((NAMES[name], (name,)) for name in PLANETOID), ("both", PLANETOID))
    }
    clean = lines(found, VIEWS, columns)
    found = accuracies(read("csg2l_attack.csv"), "final", "method", "dataset", "attack")
    attacked = {
        f"{name}, {attack}": [(dataset, attack) for dataset in datasets]
        for attack in ATTACKS
        for name, datasets in (*((NAMES[name], (name,)) for name in PLANETOID), ("both", PLANETOID))
    }
    poisoned = lines(found, ATTACKED, attacked)
    pair = ("gcn: svd", "gcn")
    poisoned.append([" − ".join(pair), *(cell(found, *pair, keys) for keys in attacked.values())])
    head = "SVD − other"
    return f"{table([head, *columns], clean)}\n\n{table([f'{head}, 20 labels', *attacked], poisoned)}\n\n{NOTE}"


def lines(found: Found, pairs: Iterable[tuple[str, str]], columns: dict[str, list[Key]]) -> list[list[str]]:
    """A line for each pair of variants of the default that has a cell."""
    texts = []
    for one, other in pairs:
        cells = [cell(found, PREFIX + one, PREFIX + other, keys) for keys in columns.values()]
        if any(cells):
            texts.append([f"{one} − {other}", *cells])
    return texts


def reweighting() -> str:
    """Claim b: the contrast weighed by R against the one without, and R in the cross-entropy on pseudo-labels."""
    pools = (*((name,) for name in DATASETS), DATASETS)
    robust, texts = robust_accuracies(), []
    for setting in FEW_LABELS:
        pair = (DEFAULT, f"{DEFAULT}: no reweighting")
        texts.append(
            [f"default: with R − without, {setting}", *(cell(robust, *pair, cells_of(pool, setting)) for pool in pools)]
        )
    tuned = accuracies(read("csg2l.csv"), "ablation", "method", "dataset")
    pair = ("csg2l, gcn: unchanged", "csg2l, gcn: no reweighting")
    cells = [cell(tuned, *pair, [(name,) for name in pool]) for pool in pools]
    texts += [["tuned: with R − without, 20 labels, public split", *cells], *beside_neighbours()]
    return f"{table(['', *(NAMES[name] for name in DATASETS), 'all of them'], texts)}\n\n{NOTE}"


def beside_neighbours() -> list[list[str]]:
    """Lines of csg2l_contrast.csv, if it is there: groups against each other, with 3 and 5 labels a class and with 1."""
    rows = read_if_there(ROOT / "results" / "csg2l_contrast.csv")
    found = accuracies(rows, "final", "method", "dataset", "labels")
    texts = []
    for one, other in ((WITH, WITHOUT), (WITHOUT, NONE), (WITH, NONE), (LABELLED, NONE)):
        for label, labels in (("3 and 5 labels", ("3", "5")), ("1 label", ("1",))):
            pools = (*((name,) for name in PLANETOID), PLANETOID)
            keys = [[(name, count) for name in names for count in labels] for names in pools]
            cells = [cell(found, PREFIX + one, PREFIX + other, of_one) for of_one in keys]
            if any(cells):
                texts.append([f"knn and edges, balanced: {one} − {other}, {label}", *cells[:2], "", cells[2]])
    return texts


def embeddings() -> str:
    """Claim b without labels: embeddings by the contrast with R and without, beside DGI and GRACE, and their differences."""
    rows = [row for row in read("csg2l_embeddings.csv") if row["phase"] == "final"]
    found = {measure: accuracies(rows, "final", "method", "dataset", measure=measure) for measure in MEASURES}
    count = len({(row["dataset"], row["seed"]) for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    methods = [name for name in methods if sum(row["method"] == name for row in rows) == count]
    cells = [(measure, dataset) for measure in MEASURES for dataset in PLANETOID]
    lines_of = []
    for method in methods:
        values = [list(found[measure][method, dataset].values()) for measure, dataset in cells]
        lines_of.append([method.split(": ")[1], *("{:.1f} ± {:.1f}".format(*interval(one)) for one in values)])
    weighed, alike = (PREFIX + name for name in (WITH, WITHOUT))
    pairs = (
        (weighed, PREFIX + SWAPPED[WITH]),
        (PREFIX + SWAPPED[WITHOUT], alike),
        (weighed, alike),
        (weighed, "dgi: dgi"),
        (weighed, "grace: grace"),
    )
    differences = []
    for one, other in pairs:
        texts = [cell(found[measure], one, other, [(dataset,)]) for measure, dataset in cells]
        differences.append([" − ".join(name.split(": ")[1] for name in (one, other)), *texts])
    head = ["", *(f"{MEASURES[measure]}, {dataset}" for measure, dataset in cells)]
    note = (
        f"Per cent, mean ± half a 95 % interval over {len({row['seed'] for row in rows})} fresh splits; below, differences "
        f"paired by split, bold where the interval leaves out 0. {hardware(rows)}."
    )
    return f"{table(head, lines_of)}\n\n{table(head, differences)}\n\n{note}"


def any_encoder() -> str:
    """Claim c: each encoder under CSG2L against itself."""
    public = accuracies(read("csg2l_encoders.csv"), "final", "method", "dataset")
    robust, few = robust_accuracies(), accuracies(read("csg2l_few.csv"), "final", "method", "dataset", "labels")
    texts = []
    for name in ENCODERS:
        pair = (f"csg2l, {name}", name)
        cells = [cell(robust, *pair, cells_of(DATASETS, setting)) for setting in FEW_LABELS]
        cells += [cell(public, *pair, [(dataset,) for dataset in pool]) for pool in (*((n,) for n in PLANETOID), PLANETOID)]
        texts.append([name, *cells])
    pair = (f"{PREFIX}decoupled, joint", f"{PREFIX}decoupled, labels alone")
    pooled = cell(few, *pair, [(dataset, count) for dataset in PLANETOID for count in FEW])
    texts.append(["decoupled, no contrast", pooled, "", "", "", ""])
    head = ["CSG2L − encoder alone", *FEW_LABELS, *(f"20 labels, {name}" for name in (*PLANETOID, "both"))]
    note = (
        f"{NOTE} Up to 5 labels: random splits of {', '.join(NAMES[name] for name in DATASETS)} (decoupled: Cora and "
        "CiteSeer); noisy: 20 and 50 % added edges; 20 labels: public splits. Both sides but decoupled are tuned on validation "
        "nodes."
    )
    return f"{table(head, texts)}\n\n{note}\n\n{fresh_encoders()}"


def fresh_encoders() -> str:
    """Claim c on fresh splits (csg2l_encoders_fresh.csv): an encoder under the default and a chosen setting against itself."""
    rows = [row for row in read("csg2l_encoders_fresh.csv") if row["phase"] == "final"]
    found = accuracies(rows, "final", "method", "dataset", "labels")
    texts = []
    for encoder, count in sorted({(row["encoder"], row["labels"]) for row in rows}, key=lambda key: (key[0], int(key[1]))):
        pairs = [(f"csg2l, {encoder}: {one}", f"{encoder}: {other}") for one, other in FRESH]
        for label, datasets in (*((NAMES[name], (name,)) for name in PLANETOID), ("both", PLANETOID)):
            cells = [cell(found, *pair, [(name, count) for name in datasets]) for pair in pairs]
            if any(cells):
                texts.append([f"{encoder}, {label}, {count} labels", *cells])
    intro = "On fresh splits, with nothing tuned but the setting (`chosen`: by validation, on other splits):"
    return f"{intro}\n\n{table(['', *(' − '.join(pair) for pair in FRESH)], texts)}"


TABLES = {
    "graphs-claim-views": views,
    "graphs-claim-reweighting": reweighting,
    "graphs-embeddings": embeddings,
    "graphs-claim-encoders": any_encoder,
}

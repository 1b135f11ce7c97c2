"""Time and memory of CSG2L's parts against the size of a random graph -> results/csg2l_scaling.csv.

    python -m benchmarks.graph_scaling

Ten edges a node. Each size runs in a process of its own, whose peak memory is that of nothing else. `contrast` is one value and
gradient of the reweighted loss over `anchors` rows of S in blocks of 2048; `epoch` is one training step of CSG2L's default;
`joint` finds 15 nearest neighbours by 128 features, joins them with the graph and factorises; `purified` is the other base.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch_geometric.data import Data

from benchmarks.graph_runs import read
from benchmarks.quality import ENVIRONMENT, append, environment
from functional.graph import low_rank_factors, purified_factors, reweighted_info_nce
from lightning_modules import CSG2L, SvdView

EDGES_A_NODE, FEATURES, CLASSES, DIMENSIONS, RANK = 10, 128, 10, 64, 100
COLUMNS = ("what", "nodes", "edges", "anchors", "seconds", "more_peak_gib", "rank", "seed", "threads", *ENVIRONMENT)


def main() -> None:
    """Run every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1_000, 10_000, 30_000, 100_000])
    parser.add_argument("--all-anchors-up-to", type=int, default=30_000, help="nodes; above it 2048 anchors")
    parser.add_argument("--what", nargs="+", choices=list(PARTS), default=list(PARTS), help="rows of other parts are kept")
    parser.add_argument("--out", type=Path, default=Path("results/csg2l_scaling.csv"))
    options = parser.parse_args()
    facts = environment() | {"rank": RANK, "seed": 0, "threads": torch.get_num_threads()}
    context = multiprocessing.get_context("spawn")
    unfinished = options.out.with_suffix(".unfinished.csv")
    unfinished.unlink(missing_ok=True)
    for row in read(options.out):
        if row["what"] not in options.what:
            append(unfinished, row, COLUMNS)
    for nodes in options.nodes:
        anchors = nodes if nodes <= options.all_anchors_up_to else 2048
        for what in options.what:
            with context.Pool(1) as pool:
                seconds, gib = pool.apply(measured, (PARTS[what], nodes, anchors))
            used = {"contrast": anchors, "epoch": 256}.get(what, "")
            row = {"what": what, "nodes": nodes, "edges": nodes * EDGES_A_NODE, "anchors": used}
            row |= {"seconds": f"{seconds:.3g}", "more_peak_gib": f"{gib:.3g}"} | facts
            append(unfinished, row, COLUMNS)
            print({name: row[name] for name in COLUMNS[:6]}, flush=True)
    unfinished.replace(options.out)


def measured(function: Callable[[int, int], Callable[[], object]], nodes: int, anchors: int) -> tuple[float, float]:
    """Seconds of a call, and by how many GiB it raises the peak memory."""
    torch.manual_seed(0)
    call = function(nodes, anchors)
    before = peak()
    if on_gpu := torch.cuda.is_available():
        call()  # what is compiled or chosen in the first call is not what is measured
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start, peak() - before


def peak() -> float:
    """Return the peak memory in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def graph(nodes: int) -> Data:
    """Draw an undirected graph at random."""
    half = torch.randint(nodes, (2, nodes * EDGES_A_NODE // 2))
    data = Data(
        x=torch.randn(nodes, FEATURES), edge_index=torch.cat([half, half.flip(0)], 1), y=torch.randint(CLASSES, (nodes,))
    )
    data.node_ids = torch.arange(nodes)
    data.train_mask = torch.arange(nodes) < 20 * CLASSES
    return data.to("cuda" if torch.cuda.is_available() else "cpu")


def factors(nodes: int, anchors: int) -> Callable[[], object]:
    """Prepare the randomised SVD."""
    edges = graph(nodes).edge_index
    return lambda: low_rank_factors(edges, nodes, RANK)


def contrast(nodes: int, anchors: int) -> Callable[[], object]:
    """Prepare value and gradient of the contrast."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    first, second = (torch.nn.functional.normalize(torch.randn(nodes, DIMENSIONS, device=device)) for _ in range(2))
    views = [view.requires_grad_() for view in (first, second)]
    labels = torch.randint(CLASSES, (nodes,), device=device)
    chosen = torch.randperm(nodes, device=device)[:anchors]
    return lambda: reweighted_info_nce(*views, labels=labels, anchors=chosen).backward()


def epoch(nodes: int, anchors: int) -> Callable[[], object]:
    """Prepare losses, gradients and a step of Adam, after the warm-up."""
    data, module = graph(nodes), CSG2L()
    module.build(data, CLASSES)
    module.to(data.x.device).train()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        module.losses(data, module.warmup_epochs + 1)["loss"].backward()
        optimizer.step()

    return step


def joint(nodes: int, anchors: int) -> Callable[[], object]:
    """Prepare the neighbours and the factors of base joint."""
    data, view = graph(nodes), SvdView("joint", RANK)
    return lambda: view.buffers(data)


def purified(nodes: int, anchors: int) -> Callable[[], object]:
    """Prepare the factors of base purified."""
    edges = graph(nodes).edge_index
    return lambda: purified_factors(edges, nodes, RANK)


PARTS = {"factors": factors, "joint": joint, "purified": purified, "contrast": contrast, "epoch": epoch}


if __name__ == "__main__":
    main()

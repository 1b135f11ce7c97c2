"""Graph modules in two real processes (gloo): what one process gives, and nobody waits for anybody."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.graph_runs import CASES

ROOT = Path(__file__).parents[2]
WHOLE = [name for name, (_, options) in CASES.items() if not options]
EXACT = [name for name, (_, options) in CASES.items() if options and min(options["fanout"]) < 0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the run with two processes, and of one process that measures its weights; they run at the same time."""
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-W", "ignore", str(ROOT / "tests/helpers/graph_runs.py")]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    running = [
        subprocess.Popen([*script, *arguments], cwd=two, env=environment, **pipes)
        for arguments in (["2", str(two)], ["1", str(one), str(two)])
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=1800)
            assert process.returncode == 0, errors[-5000:]
    finally:
        for process in running:
            process.kill()
    return two, one


@pytest.fixture(scope="module")
def found(folders):
    """What the first and the second of two processes saw, and the only one."""
    two, one = folders
    return tuple(json.loads(path.read_text()) for path in (two / "rank0.json", two / "rank1.json", one / "rank0.json"))


@pytest.mark.parametrize("name", WHOLE)
def test_whole_graphs_give_the_result_of_one_process(name, found):
    first, second, alone = (run[name] for run in found)
    assert first["losses"] == second["losses"] == alone["losses"] and len(alone["losses"]) == 4
    assert first["weights"] == second["weights"] == alone["weights"]
    assert first["scores"] == second["scores"] == alone["scores"] and len(alone["scores"]) == 4


@pytest.mark.parametrize("name", EXACT)
def test_means_over_labelled_seeds_are_those_of_one_process(name, found):
    """All neighbours are taken, so that seeds see the same, whoever has them; some steps have no labels."""
    first, second, alone = (run[name] for run in found)
    for key, tolerance in (("losses", 1e-5), ("weights", 1e-4)):
        values = {rank: list(run[key].values()) if key == "weights" else run[key] for rank, run in enumerate((first, alone))}
        assert values[0] == pytest.approx(values[1], rel=tolerance, abs=tolerance)
    assert first["losses"] == second["losses"]
    for shared, scores in zip(first["scores"], alone["scores"], strict=True):
        assert shared == pytest.approx(scores, rel=1e-4)
    assert len(alone["losses"]) == len(alone["nodes"])  # Lightning keeps the last loss where a step had none


@pytest.mark.parametrize("name", [name for name in CASES if name not in WHOLE])
def test_seeds_are_shared_in_every_step(name, found):
    first, second, alone = (run[name]["nodes"] for run in found)
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [sorted(nodes) for nodes in alone]
    assert all(0 <= len(a) - len(b) <= 1 for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_metrics_probe_clusters_and_predictions_of_the_same_weights_are_equal(name, found):
    first, second, alone = (run[name] for run in found)
    for split in ("val", "test"):
        assert first[split] == second[split] == alone[split] and f"{split}/accuracy" in alone[split]
    assert {"test/probe_accuracy", "test/nmi", "test/ari"} <= alone["test"].keys()
    assert first["predictions"] == alone["predictions"]
    assert alone["predictions"]["node_ids"] == list(range(178))


def test_each_process_goes_on_with_its_own_random_numbers(found):
    for run in found:
        assert run["sampled"]["resumed"] == run["sampled"]["weights"]


def test_the_first_process_alone_watches(folders):
    for folder in folders:
        events = [path for path in (folder / "run/whole").iterdir() if "tfevents" in path.name]
        assert len(events) == 1
        accumulated = EventAccumulator(str(events[0]))
        accumulated.Reload()
        assert {"spectrum", "embeddings"} <= set(accumulated.Tags()["images"])
        assert {"R/positives", "similarity/negatives"} <= set(accumulated.Tags()["histograms"])


def test_what_would_wait_forever_is_refused(found):
    first, second, alone = found
    for run in (first, second):
        assert "does not depend on spare.weight, spare.bias" in run["unused"]
        assert "trainer.strategy = ddp_find_unused_parameters_true" in run["unused"]
        assert "`batch_size` expected to be at least the number of processes, 2, but got 1" in run["batch_size"]
    assert alone["unused"] is alone["batch_size"] is None

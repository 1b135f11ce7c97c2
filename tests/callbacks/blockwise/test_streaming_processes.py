"""Streamed runs with several processes: the bits of one, kills, and disks that not all see. Real processes on gloo."""

import json
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from callbacks.blockwise import placement
from datamodules import TextDataModule
from lightning_modules import CausalLM
from lightning_modules.parts.host_memory import FileMemory
from tests.helpers.launchers import Fault, PruningRun, go, quiet_trainer
from tests.helpers.streamed_runs import SETTINGS, assert_same, tensors_of

EQUAL_SHARES = {"num_calibration": 12}
"""Whole batches for each of two processes, so that these have the bits of one."""


@pytest.mark.parametrize("name", ["attention", "outlier", "joint", "owl", "error", "wanda"])
def test_two_processes_have_the_bits_of_one_in_memory(name, streamed_run, in_memory, tmp_path):
    settings = {"sparsity": 0.5} | SETTINGS[name]
    run = replace(streamed_run, output=str(tmp_path / "pruned"), processes=2, settings=settings, data=EQUAL_SHARES)
    log = tmp_path / "log"
    assert go(run, log=log) == [0, 0], log.read_text()
    assert_same(tensors_of(run.output), in_memory(settings, EQUAL_SHARES))
    assert {path.name for path in tmp_path.iterdir()} == {"pruned", ".pruned.lock", "log"}
    log.unlink()
    one = replace(run, output=str(tmp_path / "one"), processes=1)
    assert go(one) == [0]
    found, expected = (json.loads((Path(each.output) / "pruning.json").read_text())["metrics"] for each in (run, one))
    for stage in ("dense", "pruned"):
        assert found[stage] == {metric: pytest.approx(value, rel=1e-12) for metric, value in expected[stage].items()}


KILLS = [
    (0, "before a file is renamed", 4),
    (0, "before a shard gets its name", 2),
    (0, "model saved", 1),
    (1, "statistics", 20),
    (1, "weights sent", 9),
]


@pytest.mark.parametrize("rank, place, count", KILLS)
def test_one_of_two_processes_killed(rank, place, count, streamed_run, in_memory, tmp_path):
    run = replace(streamed_run, output=str(tmp_path / "pruned"), processes=2, data=EQUAL_SHARES)
    codes = go(run, {rank: Fault(place, count)})
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] not in (0, None)  # the other does not wait
    assert go(run) == [0, 0]
    assert_same(tensors_of(run.output), in_memory(run.settings, EQUAL_SHARES))
    assert {path.name for path in tmp_path.iterdir()} == {"pruned", ".pruned.lock"}


@dataclass(frozen=True)
class ApartRun(PruningRun):
    """Two processes, each of which sees a disk of its own."""

    def work(self) -> None:
        """Prune, in each of the processes."""
        apart = Path(self.output).parent / os.environ["RANK"]
        PruningRun(self.model, self.text, str(apart / "pruned"), 2, stream=True).work()


def test_processes_without_a_common_disk_are_refused(streamed_run, tmp_path):
    run = ApartRun(streamed_run.model, streamed_run.text, str(tmp_path / "pruned"), 2)
    assert go(run, log=tmp_path / "log") == [1, 1]
    assert (
        "expected a directory that all processes see, with `stream` = True, but process 1 of 2"
        in (tmp_path / "log").read_text()
    )
    assert not [path for path in tmp_path.rglob("*") if path.name not in ("log", "0", "1", ".pruned.lock")]


def test_hidden_states_of_two_processes_go_to_files(streamed_run, in_memory, tmp_path):
    settings = {"sparsity": 0.5} | SETTINGS["joint"]
    run = SpillingRun(streamed_run.model, streamed_run.text, str(tmp_path / "pruned"), 2, settings=settings, data=EQUAL_SHARES)
    assert go(run) == [0, 0]
    assert_same(tensors_of(run.output), in_memory(settings, EQUAL_SHARES))
    assert {path.name for path in tmp_path.iterdir()} == {"pruned", ".pruned.lock", "spilt-0", "spilt-1"}


@dataclass(frozen=True)
class SpillingRun(PruningRun):
    """Processes of a machine with no free memory; each notes that it has written hidden states into files."""

    def work(self) -> None:
        """Prune, in each of the processes."""
        put = FileMemory.put
        noted = Path(self.output).parent / f"spilt-{os.environ['RANK']}"

        def noting(memory: FileMemory, key: int, value: torch.Tensor) -> None:
            noted.touch()
            put(memory, key, value)

        FileMemory.put, placement.free_memory = noting, lambda: 0
        replace(
            PruningRun(self.model, self.text, self.output), processes=2, stream=True, settings=self.settings, data=self.data
        ).work()


@dataclass(frozen=True)
class EvaluationRun(PruningRun):
    """Validation and test, whose metrics every process writes to a file."""

    def work(self) -> None:
        """Evaluate, in each of the processes."""
        found = []
        for stage in ("validate", "test"):
            trainer = quiet_trainer(self, Path(self.output).parent)
            data = TextDataModule(self.model, source=self.text, test_source=self.text, **self.sizes)
            found.append(getattr(trainer, stage)(CausalLM(self.model, stream=self.stream), data, verbose=False))
        Path(f"{self.output}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))


def test_evaluation_with_two_processes_is_that_of_one(streamed_run, tmp_path):
    found = []
    for name, processes, stream in (("memory", 2, False), ("one", 1, True), ("two", 2, True)):
        run = EvaluationRun(streamed_run.model, streamed_run.text, str(tmp_path / name), processes, stream=stream)
        assert go(run) == [0] * processes
        found += [json.loads(path.read_text()) for path in sorted(tmp_path.glob(f"{name}-*.json"))]
    memory, also_memory, one, *two = found
    assert two == [memory, also_memory]
    for stage, expected in zip(two[0], one, strict=True):
        assert stage == [{name: pytest.approx(value, rel=1e-12) for name, value in expected[0].items()}]

"""A pruning run that dies at any moment goes on to the bits of one that nothing happened to. Real processes, real kills."""

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from callbacks import AttentionRule, Diagnostics, Score
from tests.helpers.launchers import BETWEEN_RENAMES, PLACES, Fault, PruningRun, VisionRun, finish, go, start, tiny


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    model, text = tiny(folder)
    return PruningRun(model, text, str(folder / "whole"))


@pytest.fixture(scope="module")
def whole(tiny_run):
    """Bytes of the weights by number of processes and settings, of runs that nothing happened to."""
    found = {}

    def bits(run: PruningRun) -> bytes:
        key = (run.processes, str(run.settings))
        if key not in found:
            untouched = replace(run, output=f"{tiny_run.output}-{len(found)}")
            assert go(untouched) == [0] * run.processes and not untouched.state.exists()
            found[key] = untouched.weights
        return found[key]

    return bits


@pytest.mark.parametrize("seed", range(20))
def test_killed_anywhere(seed, tiny_run, whole, tmp_path):
    """Every second one twice, and then left alone."""
    draw, run = random.Random(seed), replace(tiny_run, output=str(tmp_path / "pruned"))
    for _ in range(1 + seed % 2):
        place = draw.choice(list(PLACES))
        codes = go(run, {0: Fault(place, draw.randint(1, PLACES[place]))})
        assert codes in ([-signal.SIGKILL], [0])  # the second time the place may not be reached as often
    assert go(run) == [0] and run.weights == whole(run) and not run.state.exists()


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_any_time(seed, tiny_run, whole, tmp_path):
    run = replace(tiny_run, output=str(tmp_path / "pruned"))
    processes = start(run)
    time.sleep(random.Random(seed).uniform(0.1, 0.3))  # a run begins to keep blocks at 0.15 s, and ends at 0.3 s
    processes[0].kill()
    assert finish(processes)[0] in (-signal.SIGKILL, 0)
    assert go(run) == [0] and run.weights == whole(run)


@pytest.mark.parametrize("seed", range(6))
def test_one_of_two_processes_killed(seed, tiny_run, whole, tmp_path):
    draw, run = random.Random(seed), replace(tiny_run, output=str(tmp_path / "pruned"), processes=2)
    rank = seed % 2
    place = draw.choice([place for place in PLACES if rank == 0 or place in ("statistics", "hidden states", "solve")])
    codes = go(run, {rank: Fault(place, draw.randint(1, max(PLACES[place] // 3, 1)))}, tmp_path / "log")
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] not in (0, None), (place, codes)  # the other does not wait
    assert go(run) == [0, 0] and run.weights == whole(run)


@pytest.mark.parametrize(
    "settings",
    [
        {"update_rule": "perplexity", "sparsity": 0.5},
        {"update_rule": "outlier", "pattern": "2:4"},
        {"update_rule": AttentionRule(objective="divergence"), "sparsity": 0.6},
        {"method": "sparsegpt", "sparsity": 0.5, "diagnostics": Diagnostics(attention=True)},
        {"method": "wanda", "sparsity": 0.5, "ignore": ["*.1.*"]},
        {"solver": "joint", "sparsity": 0.5},
        {"method": "sparsegpt", "pattern": "2:4", "target": 0.5, "stages": False},
    ],
    ids=str,
)
def test_every_rule_resumes(settings, tiny_run, whole, tmp_path):
    run = replace(tiny_run, output=str(tmp_path / "pruned"), settings=settings)
    blocks = 9 if settings.get("update_rule") == "perplexity" else 3
    place = "before a file is renamed"  # once for the fingerprint, then once a block
    assert go(run, {0: Fault(place, blocks - 1)}) == [-signal.SIGKILL]
    assert len(list(run.state.glob("*.safetensors"))) == blocks - 3
    assert go(run, {0: Fault(place, 3)}) == [-signal.SIGKILL]
    assert go(run) == [0] and run.weights == whole(run)


WEIGHTED = {"method": "sparsegpt", "solver": "joint", "sparsity": 0.6, "class_token_weight": 16.0, "allocation": "depth"}


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, WEIGHTED], ids=["defaults", "class tokens"])
@pytest.mark.parametrize("processes", [1, 2])
def test_vision_transformer(processes, settings, tmp_path):
    whole = VisionRun("", "", str(tmp_path / "whole"), processes, settings=settings)
    run = replace(whole, output=str(tmp_path / "pruned"))
    assert go(whole) == [0] * processes
    assert go(run, {0: Fault("before a file is renamed", 3)})[0] == -signal.SIGKILL
    assert len(list(run.state.glob("*.safetensors"))) == 1
    assert go(run) == [0] * processes and run.weights == whole.weights


def test_report_of_a_resumed_run_is_that_of_a_whole_one(tiny_run, whole, tmp_path):
    runs = [replace(tiny_run, output=str(tmp_path / name)) for name in ("killed", "whole")]
    assert go(runs[0], {0: Fault("before a file is renamed", 4)}) == [-signal.SIGKILL]
    assert go(runs[0]) == [0] and go(runs[1]) == [0]
    reports = [json.loads((Path(run.output) / "pruning.json").read_text()) for run in runs]
    for report in reports:
        assert report.pop("seconds") > 0
        for block in report["blocks"]:
            assert block["seconds"] >= 0 and block["peak_memory_gib"] > 0
            for name in [*block]:
                if name.startswith("seconds") or name == "peak_memory_gib":
                    del block[name]
    assert reports[0] == reports[1] and len(reports[0]["blocks"]) == 3


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", ["statistics", "solve"])
def test_asked_to_stop(signum, place, tiny_run, whole, tmp_path):
    run = replace(tiny_run, output=str(tmp_path / "pruned"))
    codes = go(run, {0: Fault(place, PLACES[place] // 2, signum)}, tmp_path / "log")
    assert codes == [143 if signum == signal.SIGTERM else 1]
    assert f"kept in {run.state}" in (tmp_path / "log").read_text()
    assert (run.state / "00000.safetensors").exists()
    assert go(run) == [0] and run.weights == whole(run)


def test_disk_full_when_the_model_is_written(tiny_run, whole, tmp_path):
    """No part is left, however often it is tried; the blocks are, and with room the same command ends."""
    run, log = replace(tiny_run, output=str(tmp_path / "pruned")), tmp_path / "log"
    for _ in range(2):
        log.unlink(missing_ok=True)
        assert go(run, {0: Fault("disk", 70_000)}, log) == [1]
        assert f"{run.output} could not be written (" in log.read_text()
        assert "File too large" in log.read_text()
        assert sorted(path.name for path in tmp_path.iterdir()) == [".pruned.lock", "log", "pruned.state"]
        assert len(list(run.state.glob("*.safetensors"))) == 3 and f"kept in {run.state}" in log.read_text()
    assert go(run) == [0] and run.weights == whole(run)


def test_killed_between_the_renames(tiny_run, whole, tmp_path):
    """The next start, whatever it is, puts the earlier model back and says so."""
    run, log = replace(tiny_run, output=str(tmp_path / "pruned")), tmp_path / "log"
    assert go(replace(run, settings={"sparsity": 0.25})) == [0]
    earlier = run.weights
    assert go(run, {0: Fault(BETWEEN_RENAMES)}) == [-signal.SIGKILL] and run.weights is None
    assert go(replace(run, settings={"sparsity": 0.75}), log=log) == [1]
    assert run.weights == earlier and "the earlier directory is back in its place" in log.read_text()
    assert go(run) == [0] and run.weights == whole(run)


def test_a_changed_source_is_another_run(tiny_run, whole, tmp_path):
    run, log = replace(tiny_run, output=str(tmp_path / "pruned")), tmp_path / "log"
    assert go(run, {0: Fault("model saved")}) == [-signal.SIGKILL]
    assert go(replace(run, changed_source="functional/pruning/solver.py"), log=log) == [1]
    assert "the code of functional/pruning/solver.py has changed" in log.read_text()
    assert "kept in" not in log.read_text().rpartition("Traceback")[2]  # nothing is promised of a run that was refused
    assert go(run) == [0] and run.weights == whole(run)


@pytest.mark.parametrize("room", [12_000, 30_000])
def test_disk_full(room, tiny_run, whole, tmp_path):
    run, log = replace(tiny_run, output=str(tmp_path / "pruned")), tmp_path / "log"
    assert go(run, {0: Fault("before a file is renamed", 3)}) == [-signal.SIGKILL]  # the fingerprint and a block are there
    kept = {path.name: path.read_bytes() for path in run.state.glob("*.safetensors")}
    assert go(run, {0: Fault("disk", room)}, log) == [1]
    assert "Block 1 could not be kept" in log.read_text() and "File too large" in log.read_text()
    assert {path.name: path.read_bytes() for path in run.state.glob("*.safetensors")} == kept and len(kept) == 1
    assert not list(run.state.glob("*.partial")) and run.weights is None
    assert go(run) == [0] and run.weights == whole(run)


def flip(data: bytes, at: float) -> bytes:
    index = int(at * (len(data) - 1))
    return data[:index] + bytes([data[index] ^ 0x10]) + data[index + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda data, at=at: flip(data, at) for at in (0.0, 0.01, 0.05, 0.5, 1.0)]
    + [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:4], lambda data: data + b"x"],
    ids=[
        "length flipped",
        "header flipped",
        "content flipped",
        "weight flipped",
        "end flipped",
        "half",
        "empty",
        "4 bytes",
        "longer",
    ],
)
def test_damaged_file(damage, tiny_run, whole, tmp_path):
    run, log = replace(tiny_run, output=str(tmp_path / "pruned")), tmp_path / "log"
    assert go(run, {0: Fault("model saved")}) == [-signal.SIGKILL]
    second = run.state / "00001.safetensors"
    second.write_bytes(damage(second.read_bytes()))
    assert go(run, log=log) == [0] and run.weights == whole(run)
    printed = log.read_text()
    assert f"{second} is damaged" in printed and "Block 1 and those after it are pruned again" in printed
    assert "finished 1 of 3 blocks" in printed


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", None])
def test_damaged_fingerprint(content, tiny_run, whole, tmp_path):
    run, log = replace(tiny_run, output=str(tmp_path / "pruned")), tmp_path / "log"
    assert go(run, {0: Fault("model saved")}) == [-signal.SIGKILL]
    path = run.state / "fingerprint.json"
    path.unlink() if content is None else path.write_bytes(content)
    assert go(run, log=log) == [0] and run.weights == whole(run)
    assert "fingerprint.json is damaged or missing: all blocks are pruned again" in log.read_text()


def test_started_differently(tiny_run, whole, tmp_path):
    run, log = replace(tiny_run, output=str(tmp_path / "pruned")), tmp_path / "log"
    other = tmp_path / "other"
    other.mkdir()
    model, _ = tiny(other, blocks=2)
    assert go(run, {0: Fault("model saved")}) == [-signal.SIGKILL]
    kept = {path.name: path.read_bytes() for path in run.state.glob("*")}
    changes = {
        "`sparsity` was 0.5 and is 0.25": {"settings": {"sparsity": 0.25}},
        "`score.lambda1` was 1.0 and is 2.0": {"settings": {"sparsity": 0.5, "score": Score(lambda1=2.0)}},
        "`data.num_calibration` was 13 and is 12": {"data": {"num_calibration": 12}},
        f"`model.model_name_or_path` was '{tiny_run.model}' and is '{model}'": {"model": model},
        "`number of processes` was 1 and is 2": {"processes": 2},
    }
    for words, change in changes.items():
        log.unlink(missing_ok=True)
        changed = replace(run, **change)
        assert go(changed, log=log) == [1] * changed.processes
        assert "was started differently: " in log.read_text() and words in log.read_text()
        assert {path.name: path.read_bytes() for path in run.state.glob("*")} == kept
    assert go(replace(run, output=str(tmp_path / "elsewhere"), settings={"sparsity": 0.25})) == [0]
    assert go(run) == [0] and run.weights == whole(run)


def test_two_runs_in_one_directory(tiny_run, whole, tmp_path):
    """The second is told; the first goes on."""
    run, log = replace(tiny_run, output=str(tmp_path / "pruned")), tmp_path / "log"
    first = start(run, {0: Fault("statistics", 30, signal.SIGSTOP)})
    while not (run.state / "00000.safetensors").exists():
        time.sleep(0.05)
    assert go(run, log=log) == [1]
    assert f"`output_dir` = '{run.output}' is in use by another run" in log.read_text()
    end = time.monotonic() + 60
    while first[0].is_alive() and time.monotonic() < end:  # it stops itself sooner or later
        os.kill(first[0].pid, signal.SIGCONT)
        time.sleep(0.05)
    assert finish(first) == [0] and run.weights == whole(run)


def test_two_runs_without_resume_do_not_mix(tiny_run, tmp_path):
    run, log = replace(tiny_run, output=str(tmp_path / "pruned")), tmp_path / "log"
    runs = [replace(run, settings={"sparsity": share, "resume": False}) for share in (0.5, 0.6)]
    first = start(runs[0], {0: Fault("model saved", 1, signal.SIGSTOP)})
    while not (tmp_path / ".pruned.lock").exists():
        time.sleep(0.05)
    assert go(runs[1], log=log) == [1] and "is in use by another run" in log.read_text()
    while first[0].is_alive():
        os.kill(first[0].pid, signal.SIGCONT)
        time.sleep(0.05)
    report = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert finish(first) == [0] and report["settings"]["sparsity"] == 0.5
    assert report["sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_without_resume_nothing_is_kept(tiny_run, whole, tmp_path):
    run = replace(tiny_run, output=str(tmp_path / "pruned"), settings={"sparsity": 0.5, "resume": False})
    assert go(run, {0: Fault("model saved")}) == [-signal.SIGKILL] and not run.state.exists()
    assert go(run) == [0] and run.weights == whole(tiny_run)

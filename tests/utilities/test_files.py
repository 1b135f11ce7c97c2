"""Directories that appear whole or not at all: what is left after an error, after a death, and beside another run."""

import json
import shutil
from types import SimpleNamespace

import pytest

from utilities import files
from utilities.files import OutputDirectory, check_space, check_writable, write_json


@pytest.fixture
def output(tmp_path):
    found = OutputDirectory(tmp_path / "a" / "model")
    found.open()
    yield found
    found.close()


def write(content):
    return lambda directory: (directory / "weights").write_text(content)


def test_a_result_replaces_the_earlier_one_as_a_whole(output):
    output.publish(write("first"))
    (output.path / "notes").write_text("of the user")
    output.publish(write("second"))
    assert [path.name for path in output.path.iterdir()] == ["weights"]
    assert (output.path / "weights").read_text() == "second"
    assert sorted(path.name for path in output.path.parent.iterdir()) == [".model.lock", "model"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there_and_nothing_else(output, error):
    output.publish(write("first"))

    def fail(directory):
        write("half")(directory)
        raise error

    message = r"model could not be written .No space left on device.; what was there is unchanged. Make room"
    with pytest.raises(type(error), match=message if isinstance(error, OSError) else None):
        output.publish(fail)
    assert (output.path / "weights").read_text() == "first"
    assert sorted(path.name for path in output.path.parent.iterdir()) == [".model.lock", "model"]


def test_a_directory_that_was_moved_aside_comes_back(output, monkeypatch, caplog):
    output.publish(write("first"))

    def die(new, path):
        raise SystemExit

    monkeypatch.setattr(files, "put_in_place", die)
    monkeypatch.setattr(OutputDirectory, "_clear_scratch", lambda self: None)  # a killed process clears nothing
    with pytest.raises(SystemExit):
        output.publish(write("second"))
    monkeypatch.undo()
    assert not output.path.exists()
    output.close()
    output.open()
    assert (output.path / "weights").read_text() == "first"
    assert f"A run died while it replaced {output.path}: the earlier directory is back in its place." in caplog.text
    assert sorted(path.name for path in output.path.parent.iterdir()) == [".model.lock", "model"]


def test_what_a_dead_run_had_half_written_is_removed_at_the_next_start(output):
    stale = output.path.with_name(".model.partial") / "new"
    stale.mkdir(parents=True)
    (stale / "weights").write_text("half")
    output.close()
    output.open()
    assert sorted(path.name for path in output.path.parent.iterdir()) == [".model.lock"]


def test_one_run_at_a_time(output):
    second = OutputDirectory(output.path)
    with pytest.raises(ValueError, match=r"`output_dir` = '.*model' is in use by another run. Wait for it, or choose another"):
        second.open()
    output.close()
    second.open()
    second.close()


def test_a_place_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`output_dir` = '.*x' cannot be written .* Choose another directory, or make"):
        check_writable(tmp_path / "file" / "x")


def test_room_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 2**20 if path == tmp_path else 0))
    check_space(tmp_path / "not" / "yet", 5 * 2**20, "The model")
    with pytest.raises(
        ValueError, match=r"The model needs 6 MiB in '.*yet', but the disk has 5 MiB free. Make room, or choose"
    ):
        check_space(tmp_path / "not" / "yet", 6 * 2**20, "The model")


def test_two_processes_that_write_one_json_file_are_not_in_each_others_way(tmp_path, monkeypatch):
    path, replace = tmp_path / "times.json", files.os.replace

    def replace_late(partial, target):
        """The other process writes from beginning to end before this one renames its file."""
        monkeypatch.setattr(files.os, "replace", replace)
        monkeypatch.setattr(files.os, "getpid", lambda: 2)
        write_json(path, {"written by": 2})
        replace(partial, target)

    monkeypatch.setattr(files.os, "replace", replace_late)
    monkeypatch.setattr(files.os, "getpid", lambda: 1)
    write_json(path, {"written by": 1})
    assert json.loads(path.read_text()) == {"written by": 1} and [found.name for found in tmp_path.iterdir()] == [path.name]


def test_json_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("dead")))
    with pytest.raises(OSError, match="dead"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]

"""PruningState: what was kept comes back whole, or not at all, whatever the bytes on the disk."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from callbacks.blockwise.resume.fingerprint import Fingerprint
from callbacks.blockwise.resume.state import PruningState

BINDING = {"model": "a" * 64, "sparsity": "0.5", "source functional/x.py": "c" * 64}
DESCRIBED = {"model.model_name_or_path": "'x'", "data.seq_len": "16"}
FINGERPRINT = Fingerprint(BINDING, DESCRIBED)
TENSORS = {"q": torch.arange(6, dtype=torch.float32).view(2, 3), "rng_state": torch.arange(8, dtype=torch.uint8)}
CONTENT = {"record": {"name": "layers.0", "error": float("nan")}, "seconds": 1.5}
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def state(tmp_path):
    """Three finished blocks."""
    found = PruningState(tmp_path / "state")
    assert found.open(FINGERPRINT) == 0
    for index in range(3):
        found.write(index, TENSORS, CONTENT)
    found.close()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_is_read(dtype, tmp_path):
    state = PruningState(tmp_path / "a" / "state")
    state.open(FINGERPRINT)
    weight = torch.randn(5, 7).to(dtype).T  # not contiguous
    state.write(0, {"w": weight}, CONTENT)
    tensors, content = state.read(0)
    assert torch.equal(tensors["w"], weight) and tensors["w"].dtype == dtype
    assert content["seconds"] == 1.5 and content["record"]["error"] != content["record"]["error"]
    assert sorted(path.name for path in state.directory.iterdir()) == ["00000.safetensors", "fingerprint.json", "lock"]
    state.remove()
    assert not state.directory.exists()


def test_opened_again(state):
    assert state.open(Fingerprint(dict(reversed(BINDING.items())), {})) == 3


def test_a_gap_ends_what_counts(state):
    (state.directory / "00001.safetensors").unlink()
    assert state.open(FINGERPRINT) == 1 and not (state.directory / "00002.safetensors").exists()


@given(st.data())
@quick
def test_any_bytes_in_place_of_a_block(state, data):
    path = state.directory / "00001.safetensors"
    whole = path.read_bytes()
    changed = data.draw(st.one_of(st.binary(max_size=400), mutations(whole)))
    path.write_bytes(changed)
    try:
        if changed == whole:
            assert state.open(FINGERPRINT) == 3
        else:
            with pytest.raises(ValueError, match=r"00001\.safetensors is damaged"):
                state.read(1)
            assert state.open(FINGERPRINT) == 1
    finally:
        state.close()
        for index in range(3):
            state.write(index, TENSORS, CONTENT)


@given(st.one_of(st.binary(max_size=200), st.recursive(st.none() | st.text(), st.lists).map(lambda x: json.dumps(x).encode())))
@quick
def test_any_bytes_in_place_of_the_fingerprint(state, content):
    (state.directory / "fingerprint.json").write_bytes(content)
    try:
        assert state.open(FINGERPRINT) == 0  # nothing is trusted without it
        assert json.loads((state.directory / "fingerprint.json").read_text()) == FINGERPRINT.as_json()
    finally:
        state.close()
        for index in range(3):
            state.write(index, TENSORS, CONTENT)


@st.composite
def mutations(draw, whole: bytes) -> bytes:
    """Some bytes of a file changed, put in, or left out."""
    at, length = draw(st.integers(0, len(whole))), draw(st.integers(0, 9))
    return whole[:at] + draw(st.binary(max_size=9)) + whole[at + length :]


def test_another_fingerprint(state):
    before = {path.name: path.read_bytes() for path in state.directory.iterdir()}
    other = Fingerprint(
        {"model": "b" * 64, "sparsity": "0.5", "version of torch": "3", "source functional/x.py": "d" * 64},
        {"model.model_name_or_path": "'y'", "data.seq_len": "32"},
    )
    with pytest.raises(ValueError, match="was started differently") as raised:
        state.open(other)
    told = str(raised.value)
    assert "`model.model_name_or_path` was 'x' and is 'y'" in told and "`version of torch` was absent and is 3" in told
    assert "the code of functional/x.py has changed" in told and str(state.directory) in told
    assert "sparsity" not in told and "seq_len" not in told and "aaaa" not in told and not state.is_open
    assert {path.name: path.read_bytes() for path in state.directory.iterdir()} == before


def test_a_file_that_has_changed_under_the_same_settings():
    changed = Fingerprint(BINDING | {"model": "b" * 64}, DESCRIBED)
    assert changed.differences(FINGERPRINT) == [
        "the weights changed although the settings are the same: a file has other content"
    ]
    assert Fingerprint(BINDING, DESCRIBED | {"data.seq_len": "32"}).differences(FINGERPRINT) == []  # the same data all the same


def test_a_directory_in_use(state):
    """Against another object here, against other processes in tests/callbacks/test_resume.py."""
    state.open(FINGERPRINT)
    second = PruningState(state.directory)
    with pytest.raises(ValueError, match="Another pruning run is using"):
        second.open(FINGERPRINT)
    state.close()
    assert second.open(FINGERPRINT) == 3
    second.close()


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be kept in .*file/state \(Not a directory\).* `resume: false`"):
        PruningState(tmp_path / "file" / "state").open(FINGERPRINT)

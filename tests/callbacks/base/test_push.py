"""push_to_hub: refused before a run starts, done once after the result is complete, and no loss if it fails.

The hub's client is replaced by stubs that have its signatures.
"""

import json
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import create_autospec, patch

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from callbacks import BlockwisePruning, LoRA, SaveModel
from callbacks.base.model_card import MARK
from lightning_modules import CausalLM
from tests.helpers.launchers import PruningRun, go, tiny
from tests.helpers.recovery_runs import loaded, prune_two_of_four, short_windows
from tests.helpers.tiny import quiet

REPOSITORY = "me/pruned"


class Hub:
    """Stands for the hub: keeps what is uploaded, or fails."""

    def __init__(self, folder: Path, failing: bool = False) -> None:
        self.folder, self.failing, self.calls = folder, failing, []
        self.create_repo = create_autospec(HfApi.create_repo, side_effect=self._create)
        self.upload_folder = create_autospec(HfApi.upload_folder, side_effect=self._upload)

    def _create(self, api, repo_id, **options):
        self.calls.append(("create", repo_id, options))
        return f"https://hub/{repo_id}"

    def _upload(self, api, *, repo_id, folder_path, **options):
        self.calls.append(("upload", repo_id, Path(folder_path)))
        if self.failing:
            raise ConnectionError("the line\nis dead")
        shutil.copytree(folder_path, self.folder / repo_id)

    def patched(self):
        return patch.multiple(HfApi, create_repo=self.create_repo, upload_folder=self.upload_folder)


@pytest.fixture
def online(monkeypatch):
    """A token, and no word of being offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_stub")


@pytest.fixture
def hub(tmp_path, online):
    found = Hub(tmp_path / "hub")
    with found.patched():
        yield found


@pytest.fixture
def text(text_file, tiny_model):
    return short_windows(tiny_model("llama"), text_file)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pruned_model_is_uploaded_when_it_is_complete(hub, tiny_model, text, tmp_path):
    callback = BlockwisePruning(sparsity=0.5, push_to_hub=REPOSITORY, resume=True)
    quiet(tmp_path, callback, max_epochs=None).fit(CausalLM(tiny_model("llama")), text)
    assert hub.calls == [
        ("create", REPOSITORY, {"private": True, "exist_ok": True}),
        ("upload", REPOSITORY, tmp_path / "pruned"),
    ]
    uploaded = files(tmp_path / "hub" / REPOSITORY)
    assert uploaded == files(tmp_path / "pruned") and {"README.md", "pruning.json", "model.safetensors"} <= set(uploaded)
    assert json.loads(uploaded["pruning.json"])["metrics"]["pruned"]["val/loss"] > 0
    assert not (tmp_path / "pruning_state").exists()


@pytest.mark.parametrize("kind", ["SaveModel", "LoRA"])
def test_trained_model_is_uploaded(kind, hub, tiny_model, text, tmp_path):
    module = loaded(tiny_model("llama"))
    prune_two_of_four(module)
    module.save(tmp_path / "pruned")
    callback = SaveModel(push_to_hub=REPOSITORY) if kind == "SaveModel" else LoRA(merge="none", push_to_hub=REPOSITORY)
    for _ in range(2):  # the second time into a directory of ours
        quiet(tmp_path, callback).fit(CausalLM(str(tmp_path / "pruned")), text)
        uploaded = files(tmp_path / "hub" / REPOSITORY)
        assert uploaded == files(tmp_path / "model") and MARK in uploaded["README.md"].decode()
        shutil.rmtree(tmp_path / "hub")
    assert ("adapter_model.safetensors" in uploaded) == (kind == "LoRA")
    assert [call[0] for call in hub.calls] == ["create", "upload"] * 2


def test_nothing_is_uploaded_unless_asked(hub, tiny_model, text, tmp_path):
    quiet(tmp_path, BlockwisePruning(sparsity=0.5), max_epochs=None).fit(CausalLM(tiny_model("llama")), text)
    quiet(tmp_path, SaveModel()).fit(CausalLM(tiny_model("llama")), text)
    assert hub.calls == []


@pytest.mark.parametrize(
    "name", ["pruned", "a/b/c", "me/", "/pruned", "me/a model", "me/a--b", "me/a.git", "https://hf.co/me/a", ""]
)
def test_malformed_names_fail_when_written(name):
    for make in (lambda: BlockwisePruning(sparsity=0.5, push_to_hub=name), lambda: SaveModel(push_to_hub=name)):
        with pytest.raises(
            ValueError, match=r"^Argument `push_to_hub` expected owner/name .* but got '.*'\. Correct it"
        ) as told:
            make()
        assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "make", [lambda: BlockwisePruning(sparsity=0.5, push_to_hub=REPOSITORY), lambda: SaveModel(None, REPOSITORY)]
)
def test_refused_before_the_run_starts(make, hub, tiny_model, text, tmp_path, monkeypatch):
    monkeypatch.setattr("callbacks.base.push.get_token", lambda: None)
    before = sorted(tmp_path.iterdir())
    for message in (r"there is no token for it\. Run `hf auth login`, or set HF_TOKEN", r"HF_HUB_OFFLINE is set\. Unset it"):
        module = CausalLM(tiny_model("llama"))
        with pytest.raises(ValueError, match=rf"^Argument `push_to_hub` = 'me/pruned' needs the hub, but {message}; or leave"):
            quiet(tmp_path, make()).fit(module, text)
        assert module.model is None and module.calibration_step is None
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.calls == [] and sorted(tmp_path.iterdir()) == before


def test_other_files_are_never_uploaded(hub, tiny_model, text, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/passwords.txt").touch()
    with pytest.raises(ValueError, match=r"`push_to_hub` uploads all of `output_dir` = '.*model', which already holds other"):
        quiet(tmp_path, SaveModel(push_to_hub=REPOSITORY)).fit(CausalLM(tiny_model("llama")), text)
    assert hub.calls == [] and [path.name for path in (tmp_path / "model").iterdir()] == ["passwords.txt"]


@pytest.mark.parametrize("kind", ["BlockwisePruning", "SaveModel"])
def test_failed_upload_loses_nothing(kind, online, tiny_model, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"output_dir": "my result", "push_to_hub": REPOSITORY}
    callback = SaveModel(**options) if kind == "SaveModel" else BlockwisePruning(sparsity=0.5, resume=True, **options)
    hub = Hub(tmp_path / "hub", failing=True)
    with hub.patched(), pytest.raises(RuntimeError) as told:
        quiet(tmp_path, callback, max_epochs=None if kind == "BlockwisePruning" else 1).fit(CausalLM(tiny_model("llama")), text)
    message = str(told.value)
    assert message.startswith(
        "The model is complete in my result, but it could not be uploaded to me/pruned (ConnectionError: the "
    )
    assert "\n" not in message
    command = shlex.split(message.split("`")[1])
    assert command == ["hf", "upload", REPOSITORY, "my result", ".", "--private"]
    found = files(tmp_path / "my result")
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= set(found)
    loaded("my result")
    if kind == "BlockwisePruning":
        assert json.loads(found["pruning.json"])["metrics"]["pruned"]["val/loss"] > 0
        assert not (tmp_path / "my result.state").exists(), "the next run starts anew"
        again = BlockwisePruning(sparsity=0.5, output_dir="my result")
        quiet(tmp_path, again, max_epochs=None).fit(CausalLM(tiny_model("llama")), text)  # the lock is released


def test_the_command_for_an_upload_by_hand_exists():
    """`hf upload` takes the words that the error gives."""
    import inspect

    from huggingface_hub.cli.upload import upload

    assert {"repo_id", "local_path", "path_in_repo", "private"} <= set(inspect.signature(upload).parameters)


@dataclass(frozen=True)
class PushingRun(PruningRun):
    """A pruning run that uploads to a stub; calls of each process are written beside the output.

    Attributes:
        failing: Whether the upload fails.
        token_in: Rank of the only process that has a token.
    """

    processes: int = 2
    failing: bool = False
    token_in: int = 0

    def work(self):
        rank, folder = int(os.environ["RANK"]), Path(self.output).parent
        hub = Hub(folder / "hub", self.failing)
        token = patch("callbacks.base.push.get_token", lambda: "hf_stub" if rank == self.token_in else None)
        offline = patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        with hub.patched(), offline, token:
            try:
                super().work()
            finally:
                (folder / f"calls{rank}.json").write_text(json.dumps([call[0] for call in hub.calls]))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize("failing", [False, True])
def test_first_of_two_processes_uploads(failing, sources, tmp_path):
    settings, log = {"sparsity": 0.5, "push_to_hub": REPOSITORY}, tmp_path / "log"
    run = PushingRun(*sources, str(tmp_path / "pruned"), settings=settings, failing=failing)
    assert go(run, log=log) == [1 if failing else 0, 0], log.read_text()[-3000:]
    assert [json.loads((tmp_path / f"calls{rank}.json").read_text()) for rank in range(2)] == [["create", "upload"], []]
    assert (tmp_path / "pruned/model.safetensors").is_file() and not run.state.exists()
    if failing:
        assert f"The model is complete in {run.output}, but it could not be uploaded" in log.read_text()
    else:
        assert files(tmp_path / "hub" / REPOSITORY) == files(tmp_path / "pruned")


def test_first_process_needs_the_token_and_all_hear_of_it(sources, tmp_path):
    log = tmp_path / "log"
    run = PushingRun(*sources, str(tmp_path / "pruned"), settings={"sparsity": 0.5, "push_to_hub": REPOSITORY}, token_in=1)
    assert go(run, log=log) == [1, 1] and log.read_text().count("ValueError: Argument `push_to_hub` = 'me/pruned' needs") == 2
    assert not (tmp_path / "pruned").exists()

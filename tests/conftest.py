"""Tiny models and text, made and saved once a session."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# Of the processes that tests start:
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])

from types import SimpleNamespace

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores
    os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on CPU tensors; read when they are defined

from tests.helpers.tiny import VOCABULARY, make_model, make_tokenizer, write_citeseer

SLOW = (
    "test_smollm2.py",
    "callbacks/test_resume.py",
    "callbacks/blockwise/test_streaming.py",
    "lightning_modules/test_resume.py",
    "test_after_pruning.py",
    "functional/sparse24/test_decode.py",
    "test_train.py",
    "callbacks/blockwise/test_exchange.py",
    "lightning_modules/test_graph_processes.py",
    "test_train_deit.py",
    "lightning_modules/parts/test_linear24.py",
    "functional/pruning/test_solver_triton.py",
    "callbacks/blockwise/test_quotas.py",
    "utilities/test_failures.py",
    "benchmarks/test_smaller_faster.py",
    "callbacks/test_save_compressed.py",
    "callbacks/test_export_onnx.py",
    "callbacks/test_evaluate_tasks.py",
    "datamodules/test_text_self.py",
)
"""Files that take more than 15 s: marked `slow`, and run first, so that no worker waits for another at the end."""


def pytest_collection_modifyitems(items):
    """Mark and order the slow files."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(SLOW)}
    for item in items:
        if item.path in places:
            item.add_marker("slow")
    items.sort(key=lambda item: places.get(item.path, len(SLOW)))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """family -> directory of a saved tiny model with its tokenizer."""
    made = {}

    def build(family: str) -> str:
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            make_model(family).save_pretrained(directory)
            make_tokenizer(family).save_pretrained(directory)
            made[family] = str(directory)
        return made[family]

    return build


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """4,000 words that follow one another with some structure, so that channels are correlated."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(1, 5, (4000,), generator=generator).cumsum(0) % (VOCABULARY - 2) + 2
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{i}" for i in steps.tolist()))
    return str(path)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """Folder in which configs/deit trained a transformer, for 15 epochs, and pruned it, as a user runs them; what they gave."""
    from train import main

    configs = Path(__file__).parents[1] / "configs/deit"
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["train.py"])
        dense = main(["fit", "--config", str(configs / "digits.yaml"), *quiet, "--trainer.max_epochs", "15"])
        top1 = float(dense.trainer.callback_metrics["val/top1"])
        pruned = main(["fit", "--config", str(configs / "prune_digits.yaml"), *quiet]).model.model.state_dict()
    return SimpleNamespace(folder=folder, top1=top1, pruned=pruned, quiet=quiet)


@pytest.fixture
def citeseer(tmp_path):
    """Root of a small CiteSeer, as raw files."""
    write_citeseer(tmp_path)
    return str(tmp_path)

"""Files that would run code when unpickled, in every place that a file is read from: none of it runs, and an error says so."""

import io
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch_geometric.data import Data

from datamodules import GraphDataModule, TextDataModule
from datamodules.graph_files import read_npz
from datamodules.image_classes import read_classes
from datamodules.image_sources import FolderImages
from datamodules.text_sources import read_file
from lightning_modules import CausalLM, ImageClassifier
from train import main
from utilities.safe_load import FORCED, check_arrays


class Harmful:
    """Unpickled, it creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """A path that must not exist after the test; first it is made sure that a pickle of `Harmful` would create it."""
    path = tmp_path / "marker"
    pickle.loads(pickle.dumps(Harmful(path)))
    assert path.is_dir()
    path.rmdir()
    yield path
    assert not path.exists()


def contents(marker):
    """A pickle as pickle, torch.save (both forms) and numpy write it."""
    found = {"pickle": pickle.dumps(Harmful(marker)), "old pickle": pickle.dumps(Harmful(marker), protocol=0)}
    for name, options in (("zip", {}), ("legacy", {"_use_new_zipfile_serialization": False})):
        stream = io.BytesIO()
        torch.save({"state_dict": {}, "harmful": Harmful(marker)}, stream, **options)
        found[name] = stream.getvalue()
    stream = io.BytesIO()
    np.save(stream, np.array([Harmful(marker)], dtype=object), allow_pickle=True)
    found["npy"] = stream.getvalue()
    return found


FORMS = ("pickle", "old pickle", "zip", "legacy", "npy")


def config(text_file, model, tmp_path):
    return [
        "--config", "configs/quickstart.yaml", "--model.model_name_or_path", model, "--data.source", text_file,
        "--data.seq_len", "16", "--data.num_calibration", "4", "--data.num_heldout", "2", "--trainer.accelerator", "cpu",
        "--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(tmp_path),
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("given", [[], ["--weights_only", "false"]])
def test_checkpoints_on_the_command_line(given, command, marker, tmp_path, tiny_model, text_file):
    path = tmp_path / "run.ckpt"
    for content in contents(marker).values():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^Argument `ckpt_path` expected a checkpoint .*run\.ckpt"):
            main([command, *config(text_file, tiny_model("llama"), tmp_path), "--ckpt_path", str(path), *given])
        assert not marker.exists() and FORCED not in os.environ


def test_the_last_checkpoint_of_a_run(marker, tmp_path, tiny_model, text_file):
    """Found by the trainer, later than a path would be."""
    folder = tmp_path / "logs" / "lightning_logs" / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    logger = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", str(tmp_path / "logs")]
    arguments = [*config(text_file, tiny_model("llama"), tmp_path), *logger, "--ckpt_path", "last", "--weights_only", "false"]
    for content in contents(marker).values():
        (folder / "last.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=r"^Argument `ckpt_path` expected a checkpoint"):
            main(["validate", *arguments])
        assert not marker.exists()


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_given_to_a_trainer(form, marker, tmp_path):
    """Lightning leaves it to torch, which refuses."""
    path = tmp_path / "run.ckpt"
    path.write_bytes(contents(marker)[form])

    class Module(LightningModule):
        def training_step(self, batch, batch_idx):
            return None

        def configure_optimizers(self):
            return None

    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=1, enable_checkpointing=False)
    with pytest.raises(Exception, match=r"[Ww]eights[ _]only|Unsupported"):
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.zeros(2, 1)), ckpt_path=path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.pth", "model.gguf"])
@pytest.mark.parametrize("form", ["zip", "old pickle"])
def test_language_models(form, name, marker, tmp_path, tiny_model):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(contents(marker)[form])
    module = CausalLM(str(folder / name) if name.endswith("gguf") else str(folder))
    with pytest.raises(ValueError, match=r"^Argument `model_name_or_path`: no model could be loaded from .*safetensors"):
        module.configure_model()


def test_sharded_language_models(marker, tmp_path, tiny_model):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    (folder / "model.safetensors").unlink()
    (folder / "part.bin").write_bytes(contents(marker)["zip"])
    for index in ("pytorch_model.bin.index.json", "model.safetensors.index.json"):
        (folder / index).write_text('{"metadata": {}, "weight_map": {"model.norm.weight": "part.bin"}}')
        with pytest.raises(ValueError, match=r"^Argument `model_name_or_path`: no model could be loaded"):
            CausalLM(str(folder)).configure_model()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json"])
def test_tokenizers(name, marker, tmp_path, tiny_model, text_file):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    for other in folder.glob("tokenizer*"):
        other.unlink()
    (folder / name).write_bytes(contents(marker)["old pickle"])
    data = TextDataModule(tokenizer=str(folder), source=text_file, seq_len=8, num_calibration=2, num_heldout=1)
    with pytest.raises(ValueError, match=r"^Argument `tokenizer`: none could be loaded"):
        data.setup("fit")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.safetensors", "model.npz"])
def test_checkpoints_of_image_classifiers(name, form, marker, tmp_path):
    path = tmp_path / name
    path.write_bytes(contents(marker)[form])
    module = ImageClassifier("vit_tiny_patch16_224", checkpoint=str(path), model_args={"img_size": 32, "depth": 1})
    with pytest.raises(ValueError, match=r"^Argument `checkpoint` .*safetensors"):
        module.configure_model()
    module = ImageClassifier("vit_tiny_patch16_224", model_args={"img_size": 32, "depth": 1, "checkpoint_path": str(path)})
    with pytest.raises(ValueError, match=r"^Argument `model_args`: checkpoint_path would say where weights come from"):
        module.configure_model()


@pytest.mark.parametrize("config", ['{"architecture": "vit_tiny_patch16_224"}', '{"model_type": "vit"}', "[]", "{"])
@pytest.mark.parametrize("names", [["pytorch_model.bin"], ["model.safetensors"], ["pytorch_model.bin", "model.safetensors"]])
def test_directories_of_image_classifiers(names, config, marker, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(config)
    for name in names:
        (tmp_path / "model" / name).write_bytes(contents(marker)["zip"])
    with pytest.raises(
        ValueError, match=r"^Argument `model_name_or_path`.*\.safetensors|^Argument `model_name_or_path`: no model"
    ):
        ImageClassifier(str(tmp_path / "model")).configure_model()


@pytest.mark.parametrize("form", FORMS)
def test_npz_files(form, marker, tmp_path):
    path = tmp_path / "g.npz"
    path.write_bytes(contents(marker)[form])
    with pytest.raises(ValueError, match=r"g\.npz' (\(|expected to hold attr_data.* but has no attr_data)"):
        read_npz(path)
    for key in ("labels", "attr_data", "train1", "other"):
        arrays = {
            "attr_data": np.ones(1),
            "attr_indices": [0],
            "attr_indptr": [0, 1],
            "attr_shape": [1, 1],
            "edge": [[0, 0]],
            "labels": [0],
        }
        np.savez(path, allow_pickle=True, **(arrays | {key: np.array([Harmful(marker)], dtype=object)}))
        if key == "other":  # not looked at
            assert len(read_npz(path).y) == 1
            continue
        with pytest.raises(ValueError, match=r"^Argument `source` expected a \.npz file .*Object arrays cannot be loaded"):
            read_npz(path)


@pytest.mark.parametrize("split", ["public", "geom-gcn"])
@pytest.mark.parametrize("name", ["data.pt", "pre_transform.pt", "pre_filter.pt"])
@pytest.mark.parametrize("form", ["pickle", "zip", "legacy"])
def test_processed_graphs(form, name, split, marker, tmp_path, citeseer):
    def read():
        data = GraphDataModule("CiteSeer", root=citeseer, split=split)
        data.setup()

    read()
    folder = Path(citeseer) / "CiteSeer" / ("geom-gcn" if split == "geom-gcn" else "") / "processed"
    assert (folder / name).is_file()
    (folder / name).write_bytes(contents(marker)[form])
    with pytest.raises(ValueError, match=r"^Argument `source` = 'CiteSeer' .*Unpickling"):
        read()
    assert FORCED not in os.environ


@pytest.mark.parametrize("name", ["Photo", "CS", "cornell", "Actor", "WikiCS"])
def test_processed_graphs_of_other_sets(name, marker, tmp_path):
    folder = {"Actor": "Actor/processed", "WikiCS": "WikiCS/processed", "cornell": "cornell/processed"}.get(
        name, f"{name}/processed"
    )
    raw = (tmp_path / folder).parent / "raw"
    for directory in (tmp_path / folder, raw):
        directory.mkdir(parents=True)
    for number in range(10):
        (raw / f"cornell_split_0.6_0.2_{number}.npz").touch()
        (raw / f"film_split_0.6_0.2_{number}.npz").touch()
    for known in (
        "amazon_electronics_photo.npz",
        "ms_academic_cs.npz",
        "out1_node_feature_label.txt",
        "out1_graph_edges.txt",
        "data.json",
    ):
        (raw / known).write_bytes(contents(marker)["zip"])
    for file in ("data.pt", "data_undirected.pt", "pre_transform.pt"):
        (tmp_path / folder / file).write_bytes(contents(marker)["zip"])
    with pytest.raises(ValueError, match=f"^Argument `source` = '{name}' "):
        GraphDataModule(name, root=str(tmp_path)).setup()


def test_what_ogb_pickles_is_read_if_it_is_data(marker, tmp_path, monkeypatch):
    """OGB saves PyG's Data object whole and reads it with torch.load, which refuses classes that it does not know."""
    path = tmp_path / "processed.pt"

    class Dataset:
        def __init__(self, name, root):
            self.data, _ = torch.load(path)

        def __getitem__(self, index):
            return self.data

        def get_idx_split(self):
            return {"train": torch.arange(4), "valid": torch.arange(4, 6), "test": torch.arange(6, 8)}

    monkeypatch.setitem(sys.modules, "ogb", ModuleType("ogb"))
    monkeypatch.setitem(sys.modules, "ogb.nodeproppred", ModuleType("ogb.nodeproppred"))
    sys.modules["ogb.nodeproppred"].PygNodePropPredDataset = Dataset
    ring = torch.stack([torch.arange(8), torch.arange(8).roll(1)])
    data = Data(x=torch.ones(8, 2), edge_index=ring, y=torch.arange(8)[:, None] % 2)
    torch.save((data, None), path)
    module = GraphDataModule("ogbn-arxiv", root=str(tmp_path), split="public")
    module.setup()
    assert module.data.train_mask.sum() == 4
    data.more = Harmful(marker)
    torch.save((data, None), path)
    with pytest.raises(ValueError, match=r"^Argument `source` = 'ogbn-arxiv' .*Weights only load failed"):
        GraphDataModule("ogbn-arxiv", root=str(tmp_path), split="public").setup()


@pytest.mark.parametrize("part", ["x", "ty", "graph"])
@pytest.mark.parametrize("form", ["pickle", "old pickle"])
def test_raw_graphs(form, part, marker, citeseer):
    (Path(citeseer) / "CiteSeer" / "raw" / f"ind.citeseer.{part}").write_bytes(contents(marker)[form])
    with pytest.raises(ValueError, match=rf"ind\.citeseer\.{part}' is no pickle of arrays .*posix\.mkdir, which is no data"):
        GraphDataModule("CiteSeer", root=citeseer, split="public").setup()


def test_pickles_of_arrays_of_every_protocol_pass(tmp_path):
    import scipy.sparse

    matrix = scipy.sparse.csr_matrix(np.eye(3, dtype=np.float32))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for value in (matrix, np.ones((2, 2)), {np.int64(1): [np.int32(2)], 3: []}):
            (tmp_path / "a").write_bytes(pickle.dumps(value, protocol))
            check_arrays(tmp_path / "a")


def test_text_images_and_classes(marker, tmp_path):
    for form, content in contents(marker).items():
        for name in ("a.txt", "a.json", "a.jsonl", "a.parquet", "a.json.gz"):
            path = tmp_path / name
            path.write_bytes(content)
            if (name, form) == ("a.txt", "old pickle"):  # it is text
                read_file(path, "text")
                continue
            with pytest.raises(ValueError, match=f"^Text file '{path}'"):
                read_file(path, "text")
        (tmp_path / "ant").mkdir(exist_ok=True)
        (tmp_path / "ant" / "a.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"^Image '.*a\.png' cannot be read"):
            FolderImages(tmp_path).read(0)
        (tmp_path / "classes.txt").write_bytes(content)
        try:
            read_classes(str(tmp_path / "classes.txt"))
        except ValueError as error:
            assert "classes.txt" in str(error)  # some are text, if no sensible one
        assert not marker.exists()


def test_a_parquet_schema_with_a_pickled_type(marker, tmp_path):
    """Arrow once kept Python types as pickles in a file's metadata."""
    import pyarrow
    from pyarrow import parquet

    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Harmful(marker))}
    field = pyarrow.field("text", pyarrow.string(), metadata=metadata)
    parquet.write_table(pyarrow.table([["words"]], schema=pyarrow.schema([field])), tmp_path / "a.parquet")
    assert read_file(tmp_path / "a.parquet", "text") == ["words"]


def test_an_npz_whose_member_is_a_bare_pickle(marker, tmp_path):
    with zipfile.ZipFile(tmp_path / "g.npz", "w") as file:
        file.writestr("labels.npy", pickle.dumps(Harmful(marker)))
    with pytest.raises(ValueError, match=r"g\.npz"):
        read_npz(tmp_path / "g.npz")

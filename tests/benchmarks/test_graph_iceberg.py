"""A rival's published code is run on our splits, with its own settings: held by a stand-in of the same interface."""

import json
import sys

import pytest
import torch

from benchmarks import graph_few, graph_iceberg

ARGS = """
import argparse

def parse_args():
    parser = argparse.ArgumentParser()
    for name, kind in (("net", str), ("patience", int), ("loss_type", str), ("T", int), ("alpha", float), ("lr", float),
                       ("feat_dim", int), ("weight_decay", float), ("imb_ratio", float), ("label_per_class", int)):
        parser.add_argument("--" + name, type=kind)
    parser.add_argument("--no_feat_norm", action="store_true")
    return parser.parse_args()
"""
TRAINER = """
import torch
from ogb.nodeproppred import PygNodePropPredDataset
from torch_scatter import scatter_add

class Trainer:
    def __init__(self, args, data, device):
        self.args, self.data, self.seed = args, data.to(device), 100

    def init_data_few(self):
        raise AssertionError("our split was not taken")

    def train(self, r):
        self.init_data_few()
        torch.optim.lr_scheduler.ReduceLROnPlateau(None, verbose=False)
        assert self.args.imb_ratio == 1 and (self.args.net, self.args.T) == ("Diff", 20) and self.args.no_feat_norm
        assert self.class_num_list.tolist() == [self.args.label_per_class] * 3
        assert torch.equal(self.data_unlabel_mask, ~self.data_train_mask)
        assert self.data.x.sum(1).ne(1).any()
        print("progress")
        masks = (self.data_train_mask, self.data_val_mask, self.data_test_mask)
        return r / 10000, sum(scale * mask.nonzero().sum().item() for scale, mask in zip((1, 1e-6, 1e-12), masks)), 0, 0
"""


def test_the_published_code_trains_on_our_split(tmp_path, monkeypatch, capsys):
    (tmp_path / "args.py").write_text(ARGS)
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("args", "trainer", *graph_iceberg.UNUSED):
        monkeypatch.delitem(sys.modules, name, raising=False)
    ((row, data),) = graph_iceberg.tasks({"wine": {"source": "wine"}}, ["wine"], [5], range(4000, 4001))
    assert json.loads(row["arguments"]) == {"labels": 5, "settings": (
        "--net Diff --patience 2000 --loss_type bs --T 20 --alpha 0.1 --lr 0.1 --feat_dim 128 --no_feat_norm "
        "--weight_decay 0.005"
    )}  # fmt: skip
    assert data == {"source": "wine", "row_normalize": False} | graph_few.balanced(5) and row["method"] == graph_iceberg.METHOD
    run = (row["method"], json.loads(row["arguments"]), data, row["seed"], row["data_seed"])
    failing = (*run[:2], data | {"source": "nothing"}, *run[3:])
    bad, found = graph_iceberg.train(tmp_path, [failing, run])
    for name in ("args", "trainer", *graph_iceberg.UNUSED):
        sys.modules.pop(name, None)
    batch, _ = graph_iceberg.graph_on(torch.device("cpu"), json.dumps({**data, "seed": 4000}))
    masks = (batch.train_mask, batch.val_mask, batch.test_mask)
    expected = sum(scale * mask.nonzero().sum().item() for scale, mask in zip((1, 1e-6, 1e-12), masks, strict=True))
    assert found["val"] == 0.4 and found["test"] == pytest.approx(expected, rel=1e-15)
    assert isinstance(bad, ValueError) and "progress" not in capsys.readouterr().out


def test_a_folder_without_the_code_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--data", str(tmp_path), "--code", str(tmp_path)])
    with pytest.raises(SystemExit):
        graph_iceberg.main()
    assert "--code expected a clone of github.com/ZhixunLEE/IceBerg but" in capsys.readouterr().err

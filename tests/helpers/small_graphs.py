"""What the tests of graphs share: a data module with small parts that is set up, and what is to hold for any graph."""

import torch

from datamodules import GraphDataModule

SMALL = {"num_val": 30, "num_test": 50}
PARTS = ("train_mask", "val_mask", "test_mask")


def ready(source="wine", **options):
    module = GraphDataModule(source, **{**SMALL, **options})
    module.setup("fit")
    return module


def masks(module):
    return torch.stack([module.data[part] for part in PARTS])


def sizes(module):
    return masks(module).sum(dim=1).tolist()


def pairs(edge_index):
    return set(map(tuple, edge_index.T.tolist()))


def check_form(module):
    data, num_nodes = module.data, module.data.num_nodes
    assert data.x.dtype == torch.float32 and data.x.shape == (num_nodes, module.num_features)
    assert data.y.dtype == torch.long and data.y.shape == (num_nodes,) and int(data.y.max()) + 1 == module.num_classes
    assert data.is_undirected() and data.is_coalesced() and not data.has_self_loops()
    assert data.edge_index.dtype == torch.long and data.node_ids.tolist() == list(range(num_nodes))
    assert all(data[part].dtype == torch.bool and data[part].shape == (num_nodes,) for part in PARTS)
    assert masks(module).sum(dim=0).max() <= 1 and min(sizes(module)) > 0
    assert type(module.num_classes) is int and type(module.num_features) is int
    assert module.classes is None or len(module.classes) == module.num_classes

"""The picture of embeddings says which class is which and how many nodes are drawn; the monitor wants a graph module."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from callbacks import GraphMonitor
from callbacks.graph_monitor import NAMED, embedding_figure, spectrum_figure


def panels(nodes):
    generator = torch.Generator().manual_seed(0)
    return {title: torch.randn(nodes, 4, generator=generator) for title in ("before training", "after training")}


def texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_the_legend_names_the_classes_in_the_colours_of_their_nodes():
    labels = torch.arange(30) % 3
    figure = embedding_figure(panels(30), labels, ("malignant", "benign", "unknown"), total=5000)
    assert texts(figure) == ["malignant", "benign", "unknown"]
    assert figure.get_suptitle() == "t-SNE of 30 of 5,000 nodes"
    assert [axis.get_title() for axis in figure.axes] == ["before training", "after training"]
    for axis in figure.axes:
        for drawn, handle in zip(axis.collections, figure.legends[0].legend_handles, strict=True):
            assert len(drawn.get_offsets()) == 10 and (drawn.get_facecolor() == handle.get_facecolor()).all()


def test_classes_without_names_are_numbered_and_those_without_nodes_left_out():
    figure = embedding_figure(panels(20), torch.tensor([0, 4]).repeat(10))
    assert texts(figure) == ["0", "4"] and figure.get_suptitle() == "t-SNE of all 20 nodes"


def test_a_colour_bar_stands_for_more_classes_than_a_legend_holds():
    assert len(texts(embedding_figure(panels(2 * NAMED), torch.arange(2 * NAMED) % NAMED))) == NAMED
    figure = embedding_figure(panels(44), torch.arange(44) % 22, [f"c{n}" for n in range(22)])
    assert not figure.legends and len(figure.axes) == 3 and figure.axes[2].get_ylabel() == "class (22 in all)"


def test_the_spectrum_is_drawn_from_zero():
    axis = spectrum_figure(torch.tensor([1.0, 0.5, 0.2])).axes[0]
    assert axis.get_ylim()[0] == 0 and axis.lines[0].get_ydata().tolist() == pytest.approx([1.0, 0.5, 0.2])


def test_other_modules_are_refused(tmp_path):
    trainer = Trainer(default_root_dir=tmp_path, logger=False, enable_checkpointing=False, callbacks=[GraphMonitor()])
    with pytest.raises(TypeError, match="GraphMonitor needs a NodeModule such as CSG2L but got BoringModel"):
        trainer.fit(BoringModel())

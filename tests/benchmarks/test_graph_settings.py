"""Configurations of the graph studies: drawn once, buildable, without settings that do not apply."""

import pytest

from benchmarks import graph_settings, graph_training
from lightning_modules import CSG2L, Contrast, DropView, PredictedLabels

WINE = {"source": "wine", "labels_per_class": 5, "num_val": 40, "num_test": -1}


@pytest.mark.parametrize("method", graph_settings.METHODS)
def test_configurations_are_drawn_once_and_can_be_built(method):
    module, fixed, space = graph_settings.METHODS[method]
    arguments = graph_settings.configuration(method, 7)
    assert arguments == graph_settings.configuration(method, 7)
    assert arguments != graph_settings.configuration(method, 8) or not space
    assert all(arguments[name] in values for name, values in space.items()) and fixed.items() <= arguments.items()
    run = graph_training.Run(method, arguments, WINE, 0)
    assert type(run.module).__name__ == module == graph_settings.class_of(f"{method}: some variant")


def test_the_default_is_that_of_the_class():
    arguments = graph_settings.module_arguments("CSG2L", graph_settings.DEFAULT)
    assert CSG2L(**arguments).hparams == CSG2L().hparams


def test_settings_that_do_not_apply_are_left_out():
    """A search draws them all; results files hold them all."""
    drawn = {
        "view": "drop",
        "rank": 7,
        "drop_edges": 0.1,
        "contrast_weight": 0.0,
        "beta": 2.0,
        "alignment": 3.0,
        "dropout": 0.2,
    }
    assert graph_settings.module_arguments("CSG2L", drawn) == {
        "view": DropView(edges=0.1),
        "contrast": Contrast(weight=0.0),
        "pseudo_labels": PredictedLabels(alignment=3.0),
        "dropout": 0.2,
    }

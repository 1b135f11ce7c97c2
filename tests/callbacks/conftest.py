"""A pruned tiny model for the tests of what comes after pruning, and the tiny models of the tests of update rules."""

import pytest

from tests.callbacks.recovery_runs import loaded, prune_two_of_four
from tests.callbacks.rule_cases import Case


@pytest.fixture(scope="session")
def pruned(tiny_model, tmp_path_factory):
    """Directory of a tiny LLaMA with two zeros in every four weights."""
    module = loaded(tiny_model("llama"))
    prune_two_of_four(module)
    folder = tmp_path_factory.mktemp("pruned")
    module.save(folder)
    return str(folder)


@pytest.fixture
def case(request, tiny_model, text_file, tmp_path):
    """The tiny model that `on_models` names."""
    return Case(request.param, tiny_model, text_file, tmp_path)

"""A pruned tiny model for the tests of what comes after pruning."""

import pytest

from lightning_modules import CausalLM
from tests.callbacks.recovery_runs import prune_two_of_four


@pytest.fixture(scope="session")
def pruned(tiny_model, tmp_path_factory):
    """Directory of a tiny LLaMA with two zeros in every four weights."""
    module = CausalLM(tiny_model("llama"))
    module.configure_model()
    prune_two_of_four(module)
    folder = tmp_path_factory.mktemp("pruned")
    module.save(folder)
    return str(folder)

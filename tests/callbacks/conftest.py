"""A pruned tiny model for the tests of what comes after pruning, the tiny models of the tests of update rules, and the server
from which processes are forked."""

import pytest

from tests.helpers import launchers
from tests.helpers.recovery_runs import loaded, prune_two_of_four
from tests.helpers.rule_cases import Case

launchers.PRELOADED += (
    "train",
    "datamodules.images",
    "lightning_modules.causal_lm",
    "lightning_modules.image_classifier",
    "timm",
    "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt",
)
"""What else the runs of these tests import: else each process of about 250 does so by itself, for half a second."""


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

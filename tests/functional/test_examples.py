"""Examples in the docstrings of functional/: each is run as a doctest, with the names of its module at hand."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("functional/*/[!_]*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name):
    if name.endswith("_triton"):
        pytest.importorskip("triton")
    results = doctest.testmod(import_module(name), report=True)
    assert results.failed == 0, f"{name}: {results.failed} of {results.attempted} examples differ; see the captured output"


def test_the_main_modules_have_examples():
    finder = doctest.DocTestFinder()
    for module in ("admm", "allocation", "attention", "masks", "prune", "scores", "solver", "statistics"):
        loaded = import_module(f"functional.pruning.{module}")
        assert any(test.examples for test in finder.find(loaded)), module

"""The solver of a whole run: what it lowers, and what it leaves alone."""

import json
from pathlib import Path

import pytest

from callbacks import FixedRule
from tests.helpers.launchers import PruningRun, go, tiny


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Settings -> a run of its own."""
    folder = tmp_path_factory.mktemp("solver")
    model, text = tiny(folder)
    data, made = {"num_calibration": 8, "num_heldout": 4}, iter(range(100))
    return lambda **settings: PruningRun(model, text, str(folder / str(next(made))), settings=settings, data=data)


def errors_of(run):
    report = json.loads((Path(run.output) / "pruning.json").read_text())
    return [{name: linear["error"] for name, linear in block["linears"].items()} for block in report["blocks"]]


@pytest.mark.parametrize("target", [{"sparsity": 0.6}, {"pattern": "2:4"}], ids=str)
def test_admm_lowers_errors_of_updated_linears_only(target, run_of):
    """In the first block, whose inputs are the same; v is held."""
    runs = [run_of(update_rule=FixedRule("v"), solver=solver, **target) for solver in ("obs", "admm")]
    assert [go(run) for run in runs] == [[0], [0]]
    obs, admm = (errors_of(run)[0] for run in runs)
    for name, error in obs.items():
        assert admm[name] == error if "v_proj" in name else admm[name] < error, name

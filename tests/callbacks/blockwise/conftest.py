"""Fixtures of streamed runs."""

import pytest

from tests.helpers.streamed_runs import WholeRuns, run_of


@pytest.fixture(scope="module")
def streamed_run(tmp_path_factory):
    """A streamed run of a tiny model, to be changed with `dataclasses.replace`."""
    return run_of(tmp_path_factory.mktemp("streamed"))


@pytest.fixture(scope="module")
def in_memory(streamed_run):
    """Results of the same runs in memory."""
    return WholeRuns(streamed_run)

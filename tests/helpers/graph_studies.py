"""What tests of the graph studies share."""

import json


def run_here(rows, workers, write, stop_at, together, train) -> None:
    """Stand in for benchmarks.graph_runs.run_all: train in this process, so that what a test replaced is seen."""
    runs = [(row["method"], json.loads(row["arguments"]), data, row["seed"], row["data_seed"]) for row, data in rows]
    for (row, _), result in zip(rows, train(runs), strict=True):
        write(row | result)

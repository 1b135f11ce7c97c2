"""Rows of results files, and tables of README.md and docs/ made of them (tables.py, graph_tables.py)."""

import csv
import statistics
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def read(name: str) -> list[dict[str, str]]:
    """Rows of a file in results/, or of one whose whole path is given."""
    with (ROOT / "results" / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown, numbers to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Iterable[str | float]) -> str:
    """Mean ± standard deviation over seeds."""
    numbers = list(map(float, values))
    mean, deviation = statistics.mean(numbers), statistics.stdev(numbers)
    return f"{mean:,.0f} ± {deviation:,.0f}" if mean >= 1000 else f"{mean:.1f} ± {deviation:.1f}"

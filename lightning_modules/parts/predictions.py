"""Predictions: rows that `predict` collects in every process, and that the first process writes as JSON lines in order."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from utilities.distributed import gathered

FILE = "predictions.jsonl"


class Predictions:
    """Rows of predictions, each with an `index`."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        """Add a row of this process."""
        self._rows.append(row)

    def write(self, trainer: Trainer) -> list[dict[str, Any]]:
        """Write the rows of all processes, ordered by index, to `predictions.jsonl` in the run's folder, and forget them.

        Returns:
            All rows in the first process; an empty list in the others.
        """
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # every process has to ask
        parts, self._rows = gathered(self._rows), []
        if not trainer.is_global_zero:
            return []
        rows = {row["index"]: row for part in parts for row in part}  # Lightning's sampler may repeat samples
        ordered = [rows[index] for index in sorted(rows)]
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered)
        (folder / FILE).write_text(text, encoding="utf-8")
        rank_zero_info(f"{len(ordered)} predictions written to {folder / FILE}.")
        return ordered

"""NodePredictions: what `predict` finds about nodes in every process, and the first one writes in the nodes' order."""

from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from utilities.distributed import gathered

FILE = "predictions.safetensors"


class NodePredictions:
    """Tensors by name, with a row for each node; `node_ids` says which."""

    def __init__(self) -> None:
        self._parts: list[dict[str, Tensor]] = []

    def add(self, found: dict[str, Tensor]) -> None:
        """Add the nodes of a batch of this process."""
        self._parts.append({name: value.cpu() for name, value in found.items()})

    def write(self, trainer: Trainer) -> None:
        """Write the nodes of all processes to `predictions.safetensors` in the run's folder, and forget them."""
        from safetensors.torch import save_file

        folder = Path(trainer.log_dir or trainer.default_root_dir)  # every process has to ask
        processes, self._parts = gathered(self._parts), []
        if not trainer.is_global_zero:
            return
        parts = [part for process in processes for part in process]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        order = found["node_ids"].argsort()
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: values[order] for name, values in found.items()}, folder / FILE)
        rank_zero_info(f"{', '.join(found)} of {len(order)} nodes written to {folder / FILE}.")

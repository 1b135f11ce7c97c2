"""Allocation: how many weights each linear loses, from one pass of the calibration data over the dense model.

The pass adds up ‖X_j‖² of the inputs of all linears, and how much of the hidden states each block writes, batch by batch, block
by block, so it needs the memory of one batch; with several processes the sums are those of all.
`functional.pruning.allocation` makes shares of zeros of them, one for each block, and numbers of zeros that sum to that of the
whole model.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from typing_extensions import Self

from callbacks.blockwise.collector import by_sample
from callbacks.blockwise.placement import Offload
from callbacks.blockwise.processes import Processes
from callbacks.blockwise.settings import Plan, PruningSettings
from functional.pruning import OutputStatistics, zeros_wanted
from functional.pruning.allocation import (
    GRID,
    bounds,
    equal_slopes,
    error_curve,
    outlier_ratio_of_scores,
    owl_sparsities,
    unit_tokens,
    whole_numbers,
    written_share,
)
from lightning_modules.base.prunable import PrunableModule
from lightning_modules.parts.architectures import PrunableLinear
from lightning_modules.parts.block_stream import BlockStream

Linears = dict[str, dict[str, PrunableLinear]]
"""Block -> name -> linear."""


@dataclass(frozen=True)
class Targets:
    """What each block and each linear is to lose.

    Attributes:
        zeros: Block -> linear -> number of weights that become 0.
        measures: Block -> its share of zeros (sparsity), and what that was read off: outlier_ratio, or written_share and
            expected_error, the estimate of the relative error of its output.
    """

    zeros: dict[str, dict[str, int]]
    measures: dict[str, dict[str, float]]

    def sparsity(self, block: str, linear: str, numel: int) -> Fraction:
        """Share of zeros of a linear, exactly."""
        return Fraction(self.zeros[block][linear], numel)

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any] | None) -> Self | None:
        """From a file."""
        return None if content is None else cls(**content)


def allocate(
    trainer: Trainer, module: PrunableModule, settings: PruningSettings, plan: Plan, offload: Offload, processes: Processes
) -> Targets | None:
    """Targets of a model that is still dense, the same in all processes; None where all linears lose the same share.

    Raises:
        ValueError: If calibration data are not finite; names block and linear.
    """
    if settings.allocation == "uniform":
        return None
    rank_zero_info(f"allocation {settings.allocation}: calibration data go through the dense model once.")
    blocks = module.blocks
    linears = {block: {name: module.linears(blocks[block])[name] for name in names} for block, names in plan.items() if names}
    with isolate_rng():  # dataloaders draw from it
        norms, written = _dense_pass(trainer, module, linears, offload, settings.allocation == "error")
    processes.add_up([*(found.sums()["square_norm"] for found in norms.values()), written])

    def read() -> dict[str, Any]:
        mine = list(linears)[processes.rank :: processes.size]
        return {block: _read(settings, block, linears[block], norms) for block in mine}

    read_off = {block: value for part in processes.gather(processes.together(read)) for block, value in part.items()}
    shares = dict(zip(blocks, (written[:, 0] / written[:, 1]).tolist(), strict=True))
    return processes.from_first(processes.in_first(lambda: _targets(settings, plan, module, linears, read_off, shares)))


def _dense_pass(
    trainer: Trainer, module: PrunableModule, linears: Linears, offload: Offload, unit: bool
) -> tuple[dict[nn.Linear, OutputStatistics], Tensor]:
    """Statistics of the inputs, by module: the sums that pruning needs of outputs are all that is needed of inputs here.

    With `unit` of tokens of length 1. And of each block the sum of `written_share` and the number of tokens, (blocks, 2).
    """
    norms = {linear.module: OutputStatistics(linear.in_features) for found in linears.values() for linear in found.values()}
    stream = BlockStream(list(module.blocks.values()))
    written = torch.zeros(len(stream.blocks), 2, dtype=module.metric_dtype, device=module.device)
    batches = islice(trainer.train_dataloader, trainer.num_training_batches)
    with torch.no_grad(), offload.passing():
        for batch in (trainer.strategy.batch_to_device(batch) for batch in batches):
            positions = module.sample_positions(batch)
            with trainer.precision_plugin.forward_context():
                stream.capture(0, lambda batch=batch: module.calibration_forward(batch))
                with _adding(norms, positions, unit):
                    for index in range(len(stream.blocks)):
                        before = stream.hidden(0)
                        stream.advance(0, index)
                        written[index, 0] += written_share(before, stream.hidden(0))
                        written[index, 1] += before[..., 0].numel()
    return norms, written


@contextmanager
def _adding(norms: Mapping[nn.Linear, OutputStatistics], positions: Tensor, unit: bool) -> Iterator[None]:
    def add(linear: nn.Linear, args: tuple[Tensor], _: Tensor) -> None:
        x = by_sample(args[0], positions)
        norms[linear].update(unit_tokens(x) if unit else x, positions)

    handles = [linear.register_forward_hook(add) for linear in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read(
    settings: PruningSettings, block: str, linears: Mapping[str, PrunableLinear], norms: Mapping[nn.Linear, OutputStatistics]
) -> float | list[float]:
    """What the rule reads off a block: its outlier ratio, or its error curve, the mean over its linears."""
    found = []
    for name, linear in linears.items():
        try:
            norms[linear.module].check_finite("inputs")
        except ValueError as error:
            raise ValueError(f"{block}.{name}: {error}") from error
        square_norm = norms[linear.module].square_norm
        if settings.allocation == "error":
            found.append(error_curve(linear.weight, square_norm))
        else:
            found.append(linear.weight.to(square_norm.device, torch.float32).abs().mul_(square_norm.sqrt()))
    if settings.allocation == "error":
        return torch.stack(found).mean(0).tolist()
    return outlier_ratio_of_scores(found, settings.owl_threshold)


def _targets(
    settings: PruningSettings,
    plan: Plan,
    module: PrunableModule,
    linears: Linears,
    read_off: Mapping[str, Any],
    written: Mapping[str, float],
) -> Targets:
    """From what was read off all blocks."""
    sizes = {block: {name: linear.weight.numel() for name, linear in found.items()} for block, found in linears.items()}
    of_blocks, read = [sum(found.values()) for found in sizes.values()], [read_off[block] for block in sizes]
    if settings.allocation == "owl":
        shares = owl_sparsities(read, of_blocks, settings.sparsity, settings.owl_range)
        measures = [{"outlier_ratio": ratio} for ratio in read]
    else:
        read = [[written[block] * error for error in curve] for block, curve in zip(sizes, read, strict=True)]
        shares = equal_slopes(read, of_blocks, settings.sparsity, *bounds(settings.sparsity))
        measures = [
            {"written_share": written[block], "expected_error": curve[round(share * GRID)]}
            for block, curve, share in zip(sizes, read, shares, strict=True)
        ]
    wholesale = settings.by_rows(module)
    entries = [
        (share, size, linears[block][name].out_features if wholesale(name, plan[block][name]) else 1)
        for (block, found), share in zip(sizes.items(), shares, strict=True)
        for name, size in found.items()
    ]
    numbers = iter(whole_numbers(*zip(*entries, strict=True), zeros_wanted(sum(of_blocks), settings.sparsity)))
    zeros = {block: {name: next(numbers) for name in found} for block, found in sizes.items()}
    return Targets(
        zeros,
        {
            block: {"sparsity": sum(zeros[block].values()) / size} | measure
            for block, size, measure in zip(sizes, of_blocks, measures, strict=True)
        },
    )

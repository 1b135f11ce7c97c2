"""Quotas: the number of zeros of each linear, from one pass of the calibration data through the dense model, or from depth.

The pass sums ‖X_j‖² of the inputs of all linears, and the share of the hidden states that each block writes. It goes batch by
batch and block by block, so it needs the memory of one batch; if blocks are streamed, it goes block by block, with all batches.
The sums are taken over all processes.
`functional.pruning.allocation` turns them into a share of zeros for each block, and into numbers of zeros whose sum is exact.
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

from callbacks.blockwise.allocations import DepthAllocation, ErrorAllocation, OwlAllocation, UniformAllocation
from callbacks.blockwise.placement import Placement, Spill, make_room
from callbacks.blockwise.plan import Plan, rows_lose_alike
from callbacks.blockwise.settings import PruningSettings
from callbacks.blockwise.statistics import by_sample
from functional.pruning import OutputStatistics, zeros_wanted
from functional.pruning.allocation import (
    GRID,
    bounds,
    depth_sparsities,
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
from lightning_modules.parts.experts import Routing
from utilities.distributed import Processes

Linears = dict[str, dict[str, PrunableLinear]]
"""Block -> name -> linear."""


@dataclass(frozen=True)
class Quotas:
    """Number of zeros of each linear.

    Attributes:
        zeros: Block -> linear -> number of weights that become 0.
        measures: Block -> its share of zeros (sparsity) and the measures that it follows from: outlier_ratio, or written_share
            and expected_error, the estimated relative error of its output; depth has none.
    """

    zeros: dict[str, dict[str, int]]
    measures: dict[str, dict[str, float]]

    def sparsity(self, block: str, linear: str, numel: int) -> Fraction:
        """Return the exact share of zeros of a linear.

        Args:
            block: Full name of the block.
            linear: Name of the linear within the block.
            numel: Number of weights of the linear.
        """
        return Fraction(self.zeros[block][linear], numel)

    def as_json(self) -> dict[str, Any]:
        """Return the content for a file."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any] | None) -> Self | None:
        """Make quotas from the content of a file; None stays None."""
        return None if content is None else cls(**content)


def quotas_of(
    trainer: Trainer,
    module: PrunableModule,
    settings: PruningSettings,
    plan: Plan,
    placement: Placement,
    processes: Processes,
    spill: Spill | None = None,
) -> Quotas | None:
    """Compute the quotas of a model that is still dense.

    Args:
        trainer: Trainer of the run.
        module: Module of the run.
        settings: Settings of the run.
        plan: Plan of the first round.
        placement: Placement of the blocks.
        processes: Processes of the run.
        spill: Files of a streamed run, as in `make_room`.

    Returns:
        Quotas, the same in all processes; None if all linears lose the same share.

    Raises:
        ValueError: If calibration data are not finite; names block and linear.
    """
    if isinstance(settings.allocation, UniformAllocation):
        return None
    blocks = module.blocks
    linears = {block: {name: module.linears(blocks[block])[name] for name in names} for block, names in plan.items() if names}
    if isinstance(settings.allocation, DepthAllocation):
        return processes.first_of(lambda: _targets(settings, plan, module, linears, {}, {}))
    rank_zero_info(f"Allocation {settings.allocation.short}: one pass of the calibration data through the dense model.")
    with isolate_rng():  # dataloaders draw from it
        unit = isinstance(settings.allocation, ErrorAllocation)
        norms, written = _dense_pass(trainer, module, linears, placement, spill, unit)
    processes.sum([*(found.sums()["square_norm"] for found in norms.values()), written])

    def read() -> dict[str, Any]:
        mine = list(linears)[processes.rank :: processes.size]
        return {block: _read_block(settings, module, block, linears[block], norms) for block in mine}

    read_off = {block: value for part in processes.gather(processes.together(read)) for block, value in part.items()}
    shares = dict(zip(blocks, (written[:, 0] / written[:, 1]).tolist(), strict=True))
    return processes.first_of(lambda: _targets(settings, plan, module, linears, read_off, shares))


def _dense_pass(
    trainer: Trainer, module: PrunableModule, linears: Linears, placement: Placement, spill: Spill | None, unit: bool
) -> tuple[dict[nn.Module, OutputStatistics], Tensor]:
    """Pass the calibration data through the dense model.

    Returns:
        Module -> norms of its inputs (with `unit`, of tokens scaled to length 1); and for each block the sum of `written_share`
        and the number of tokens, (blocks, 2).
    """
    norms = {linear.module: OutputStatistics(linear.in_features) for found in linears.values() for linear in found.values()}
    stream = module.block_stream()
    written = torch.zeros(len(stream.blocks), 2, dtype=module.metric_dtype, device=module.device)
    batches = islice(trainer.train_dataloader, trainer.num_training_batches)
    groups = [list(batches)] if module.streams else ([batch] for batch in batches)
    with torch.no_grad(), placement.passing(), trainer.precision_plugin.forward_context():
        for group in groups:
            positions = []
            for key, batch in enumerate(trainer.strategy.batch_to_device(batch) for batch in group):
                positions.append(module.sample_positions(batch))
                stream.capture(key, lambda batch=batch: module.calibration_forward(batch))
                if module.streams and key == 0:
                    make_room([stream], len(group), module.device, spill)
            for index, block in enumerate(module.blocks):
                with module.reading(block):
                    for key, samples in enumerate(positions):
                        before = stream.hidden(key)
                        with _summing(norms, samples, unit):
                            stream.advance(key, index)
                        written[index] += _written(before, stream.hidden(key))
            stream.clear()
    return norms, written


def _written(before: Tensor, after: Tensor) -> Tensor:
    """Return the sum of `written_share` and the number of tokens, (2,); a block that changes the shape writes everything."""
    tokens = torch.tensor(float(before[..., 0].numel()), device=before.device)
    return torch.stack([written_share(before, after) if before.shape == after.shape else tokens, tokens])


@contextmanager
def _summing(norms: Mapping[nn.Module, OutputStatistics], positions: Tensor, unit: bool) -> Iterator[None]:
    def add(linear: nn.Module, args: tuple[Tensor] | tuple[Tensor, Routing], _: Tensor) -> None:
        if len(args) > 1:
            x, lengths = args[1].by_sample(args[0], len(positions))
        else:
            x, lengths = by_sample(PrunableLinear(linear).tokens_in(args[0]), positions), None
        norms[linear].update(unit_tokens(x) if unit else x, positions, lengths)

    handles = [linear.register_forward_hook(add) for linear in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read_block(
    settings: PruningSettings,
    module: PrunableModule,
    block: str,
    linears: Mapping[str, PrunableLinear],
    norms: Mapping[nn.Module, OutputStatistics],
) -> float | list[float]:
    with module.reading(block):
        return _read(settings, block, linears, norms)


def _read(
    settings: PruningSettings, block: str, linears: Mapping[str, PrunableLinear], norms: Mapping[nn.Module, OutputStatistics]
) -> float | list[float]:
    """Return what the allocation reads off a block: its outlier ratio, or the mean of the error curves of its linears."""
    found = []
    for name, linear in linears.items():
        try:
            norms[linear.module].check_finite("inputs")
        except ValueError as error:
            raise ValueError(f"{block}.{name}: {error}") from error
        square_norm = norms[linear.module].square_norm
        if isinstance(settings.allocation, OwlAllocation):
            found.append(linear.weight.to(square_norm.device, torch.float32).abs().mul_(square_norm.sqrt()))
        else:
            found.append(error_curve(linear.weight, square_norm))
    if isinstance(settings.allocation, OwlAllocation):
        return outlier_ratio_of_scores(found, settings.allocation.threshold)
    return torch.stack(found).mean(0).tolist()


def _targets(
    settings: PruningSettings,
    plan: Plan,
    module: PrunableModule,
    linears: Linears,
    read_off: Mapping[str, Any],
    written: Mapping[str, float],
) -> Quotas:
    """Make quotas from what was read off all blocks; nothing is, for a depth allocation."""
    sizes = {block: {name: linear.weight.numel() for name, linear in found.items()} for block, found in linears.items()}
    block_sizes, read = [sum(found.values()) for found in sizes.values()], [read_off.get(block) for block in sizes]
    if isinstance(settings.allocation, DepthAllocation):
        shares = depth_sparsities(block_sizes, settings.sparsity, settings.allocation.slope)
        measures = [{} for _ in sizes]
    elif isinstance(settings.allocation, OwlAllocation):
        shares = owl_sparsities(read, block_sizes, settings.sparsity, settings.allocation.spread)
        measures = [{"outlier_ratio": ratio} for ratio in read]
    else:
        read = [[written[block] * error for error in curve] for block, curve in zip(sizes, read, strict=True)]
        shares = equal_slopes(read, block_sizes, settings.sparsity, *bounds(settings.sparsity))
        measures = [
            {"written_share": written[block], "expected_error": curve[round(share * GRID)]}
            for block, curve, share in zip(sizes, read, shares, strict=True)
        ]
    entries = [
        (share, size, _unit(settings, module, plan[block][name], name, linears[block][name]))
        for (block, found), share in zip(sizes.items(), shares, strict=True)
        for name, size in found.items()
    ]
    numbers = iter(whole_numbers(*zip(*entries, strict=True), zeros_wanted(sum(block_sizes), settings.sparsity)))
    zeros = {block: {name: next(numbers) for name in found} for block, found in sizes.items()}
    return Quotas(
        zeros,
        {
            block: {"sparsity": sum(zeros[block].values()) / size} | measure
            for block, size, measure in zip(sizes, block_sizes, measures, strict=True)
        },
    )


def _unit(settings: PruningSettings, module: PrunableModule, method: str, name: str, linear: PrunableLinear) -> int:
    """Return the unit of a linear: its number of zeros is a multiple of it."""
    return linear.out_features if rows_lose_alike(settings, module, method, name) else 1

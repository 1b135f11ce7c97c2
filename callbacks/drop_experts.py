"""DropExperts: removes whole experts of a mixture by what they contribute (REAP), and saves the smaller model.

score      one pass of the calibration data through the model; functional.pruning.experts has the formula
cut        the experts with the smallest scores go, equally many in every layer, with their rows of the router
save       a plain checkpoint with fewer experts, which transformers loads and BlockwisePruning can prune further
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from typing_extensions import override

from callbacks.base.model_card import CardContent
from callbacks.base.validation import validate_within_fit
from callbacks.blockwise.exchange import processes_of
from callbacks.blockwise.placement import DEFAULT_WINDOWS
from callbacks.save_model import SaveModel
from functional.pruning.experts import kept_experts
from lightning_modules.base.prunable import PrunableModule
from lightning_modules.parts.block_stream import replaced_forwards
from lightning_modules.parts.experts import Routing, experts_of, matrices_of, routed_forwards
from lightning_modules.parts.fewer_experts import check_smaller, cut_experts, renumber
from utilities.contract import data_of
from utilities.distributed import Processes
from utilities.reporting import print_table, shown_path


class DropExperts(SaveModel):
    """Remove experts from every layer of a mixture, and save the model.

    Args:
        share: Share of the experts of a layer that go, in (0, 1); rounded down.
        output_dir: Directory of the smaller model; `model` in the log directory when None.
        push_to_hub: Repository on the Hugging Face hub, as for `SaveModel`.

    Raises:
        ValueError: If `share` is out of range.
    """

    def __init__(self, share: float, output_dir: str | None = None, push_to_hub: str | None = None) -> None:
        super().__init__(output_dir, push_to_hub)
        if not 0 < share < 1:
            raise ValueError(f"Argument `share` expected to be a share of the experts in (0, 1) but got {share}.")
        self.share = share
        self.kept: dict[str, list[int]] = {}
        """Experts, by their full name -> numbers of those that stay, once the run has ended."""
        self.scores: dict[str, list[float]] = {}
        """Experts -> score of each."""
        self.metrics: dict[str, dict[str, float]] = {}
        """Metrics with all experts and with those that stay."""
        self._sums: dict[str, Tensor] = {}
        """Experts -> sum of g · ‖f(x)‖ and number of tokens of each, (2, experts), float64."""
        self._layers: dict[str, tuple[nn.Module, str]] = {}
        """Full name of experts -> their block and their name within it."""
        self._processes = Processes()
        self._watching = ExitStack()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if pl_module.streams:
            raise ValueError(
                "Argument `stream` = True expected fit with BlockwisePruning but got DropExperts, which scores and cuts the "
                "experts of all layers in memory. Leave `stream` out, on a machine that holds the model."
            )
        self._processes = processes_of(trainer)
        trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, Checkpoint)]
        trainer.num_sanity_val_steps = 0  # the whole model is validated before anything goes
        pl_module.arm(lambda batch, _: pl_module.calibration_forward(batch))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        blocks = pl_module.blocks
        self._layers = {f"{name}.{path}": (block, path) for name, block in blocks.items() for path in experts_of(block)}
        _check_layers(self.share, pl_module, self._layers)
        trainer.fit_loop.max_epochs = 1
        trainer.check_val_every_n_epoch = 2  # validation is ours: before and after
        data = data_of(trainer)
        data.begin_calibration(None if data.facts().batch_size is not None else DEFAULT_WINDOWS)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        pl_module.eval()
        self.metrics["all experts"] = validate_within_fit(trainer)
        forwards = {}
        for name, (block, path) in self._layers.items():
            experts = block.get_submodule(path)
            forwards |= routed_forwards(block)
            self._sums[name] = torch.zeros(2, len(experts.down_proj), dtype=pl_module.metric_dtype, device=pl_module.device)
            self._watching.enter_context(_scoring(experts, self._sums[name]))
        self._watching.enter_context(replaced_forwards(forwards))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        self._watching.close()
        self._processes.sum(self._sums.values())
        with torch.no_grad():
            self._cut(pl_module)
        self.metrics["experts dropped"] = validate_within_fit(trainer)

    def _cut(self, module: PrunableModule) -> None:
        groups = getattr(module.model.config, "n_group", None) or 1
        before = after = 0
        for name, (block, path) in self._layers.items():
            total, tokens = self._sums[name]
            scores = total / tokens.clamp_min(1)
            kept = kept_experts(scores, self.share, groups)
            before, after = len(scores), len(kept)
            self.scores[name], self.kept[name] = scores.tolist(), kept.tolist()
            cut_experts(block, path, kept)
        renumber(module.model, before, after)

    @override
    def content(self, trainer: Trainer, pl_module: PrunableModule, metrics: dict[str, float]) -> CardContent:
        before, after = len(next(iter(self.scores.values()))), len(next(iter(self.kept.values())))
        return CardContent(
            title=f"{after} of {before} experts",
            summary=(
                f"{before - after} of the {before} experts of every layer were removed after training, those with the smallest "
                "mean of the router's factor times the norm of the expert's output (REAP). It loads as the whole model does."
            ),
            settings={"experts": {"share": self.share, "kept": self.kept}},
            metrics=self.metrics,
            tags=("pruned", "reap"),
        )

    @override
    def announce(self, pl_module: PrunableModule, target: Any) -> None:
        before, after = self.metrics["all experts"], self.metrics["experts dropped"]
        rows = [(name, f"{value:.4g} all experts -> {after[name]:.4g}") for name, value in before.items()]
        counts = len(next(iter(self.scores.values()))), len(next(iter(self.kept.values())))
        rows.append(("experts", f"{counts[1]} of {counts[0]} in each of {len(self.kept)} layers"))
        rows.append(("smaller model", shown_path(target)))
        print_table("DropExperts", rows)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not isinstance(pl_module, PrunableModule):
            return
        self._watching.close()
        pl_module.disarm()
        data_of(trainer).end_calibration()


@contextmanager
def _scoring(experts: nn.Module, sums: Tensor) -> Iterator[None]:
    """Add g · ‖f(x)‖ of every routed token, and their number, to the sums of their experts."""
    given: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        chosen, factors = (*args[1:], *kwargs.values())
        given[:] = [(chosen, factors)]

    def add(expert: int) -> Callable[[nn.Module, tuple[Tensor, Routing], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, Routing], output: Tensor) -> None:
            chosen, factors = given[0]
            index, slot = (chosen == expert).nonzero().unbind(1)
            sums[0, expert] += (output.double().norm(dim=1) * factors[index, slot].double()).sum().to(sums)
            sums[1, expert] += len(index)

        return hook

    handles = [experts.register_forward_pre_hook(note, with_kwargs=True)]
    handles += [down.register_forward_hook(add(expert)) for expert, (_, down) in enumerate(matrices_of(experts))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_layers(share: float, module: PrunableModule, layers: dict[str, tuple[nn.Module, str]]) -> None:
    """Check that there are experts, that some go, and that the router still finds as many as it chooses."""
    if not layers:
        raise ValueError(f"DropExperts needs a mixture of experts, but {type(module.model).__name__} has none that are known.")
    config = module.model.config
    groups = getattr(config, "n_group", None) or 1
    counts = {len(block.get_submodule(path).down_proj) for block, path in layers.values()}
    if len(counts) > 1:
        raise ValueError(f"DropExperts needs layers of equally many experts, but this model's have {sorted(counts)}.")
    (count,) = counts
    left = count - groups * int(count // groups * share + 1e-9)
    least = (getattr(config, "num_experts_per_tok", 1) * groups) // (getattr(config, "topk_group", None) or groups)
    least = max(least, 2 * groups) if groups > 1 else least  # a router ranks groups by their two best experts
    if not least <= left < count:
        raise ValueError(
            f"Argument `share` = {share:g} leaves {left} of {count} experts"
            + (f" in {groups} groups" if groups > 1 else "")
            + f"; expected at least {least}, which the router chooses from, and less than {count}. Choose another share."
        )
    check_smaller(module.model, module.architecture.blocks, torch.arange(left))

"""LoRA: recovers a pruned model with low-rank adapters (peft) while its own weights are frozen.

    python train.py fit --config configs/recover/smollm2_lora.yaml

An adapter adds Δ = B A · alpha / r to a weight W, and Δ has no zeros. There are two ways to deal with that:

- `merge: masked` trains and finally merges Δ only where W is not zero. The result is as sparse as W, and merging changes no
  output. Masking only after training costs quality: SmolLM2-135M at 60 % lost a fifth of what 24 steps had gained.
- `merge: none` trains Δ as usual and writes it beside W in peft's format. W is sparse, W + Δ is not.
"""

import math
import tempfile
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from callbacks.base.model_card import CARD, CardContent, share_of_zeros, sparse_tags
from callbacks.base.sparsity import apply_zeros, linear_weights, share_of, zeros_of
from callbacks.base.validation import validate_within_fit
from callbacks.keep_sparsity import KeepSparsity
from callbacks.save_model import SaveModel, training_settings
from lightning_modules.base.prunable import PrunableModule
from utilities.distributed import need_whole_weights
from utilities.extras import require
from utilities.files import move_files
from utilities.reporting import log_scalars, print_table


class LoRA(SaveModel):
    """Train adapters on the prunable linears, then write the model. Needs the extra `lora`.

    Args:
        r: Rank of the adapters.
        alpha: Scale of the adapters: they add B A · alpha / r.
        linears: Linears that get an adapter, by their names in ARCHITECTURES such as self_attn.q_proj; all when None.
        merge: masked: adapters are trained and merged where weights are not zero. none: they are not masked, and written apart.
        output_dir: Directory of the model; `model` in the log directory when None.
        push_to_hub: Repository on the Hugging Face hub, owner/name, to which the directory is uploaded; see `SaveModel`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        r: int = 8,
        alpha: float = 16,
        linears: list[str] | None = None,
        merge: Literal["masked", "none"] = "masked",
        output_dir: str | None = None,
        push_to_hub: str | None = None,
    ) -> None:
        super().__init__(output_dir, push_to_hub)
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"Argument `r` expected to be a positive integer but got {r}.")
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"Argument `alpha` expected to be a finite number above 0 but got {alpha}.")
        if merge not in ("masked", "none"):
            raise ValueError(f"Argument `merge` expected to be masked or none but got {merge!r}.")
        self.r, self.alpha, self.linears, self.merge = r, alpha, linears, merge
        self.metrics: dict[str, dict[str, float]] = {}
        """Metrics of the model as it was loaded (pruned), with its adapters (trained), and with them merged (merged)."""
        self._sparsity = 0.0
        self._adapted: Any = None

    @override
    def setup(self, trainer: Trainer, pl_module: PrunableModule, stage: str) -> None:
        """Add the adapters before a checkpoint is read and the optimizer made, so earlier than Lightning makes the model."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        require("lora", "peft")
        need_whole_weights(trainer, type(self).__name__)
        for other in trainer.callbacks:
            if other is not self and isinstance(other, (KeepSparsity, SaveModel)):
                raise ValueError(
                    f"LoRA keeps the zeros and writes the model itself: leave {type(other).__name__} out of trainer.callbacks."
                )
        pl_module.configure_model()
        known = pl_module.architecture.linears
        if unknown := sorted(set(self.linears or ()) - set(known)):
            raise ValueError(f"Argument `linears` expected to be some of {', '.join(known)} but got {', '.join(unknown)}.")
        self._sparsity = share_of(zeros_of(linear_weights(pl_module)))
        self._adapted = self._with_adapters(pl_module)
        if self.merge == "masked":
            for layer in _layers(pl_module).values():
                layer.register_forward_hook(_without_zeros)

    def _with_adapters(self, pl_module: PrunableModule) -> Any:
        """Wrap the module's model with peft, which changes it in place: linears get adapters, everything else is frozen."""
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            target_modules=list(self.linears or pl_module.architecture.linears),
        )
        return get_peft_model(pl_module.model, settings)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        trained, total = self._adapted.get_nb_trainable_parameters()
        becomes = {
            "masked": "Adapters are trained, and merged in the end, where weights are not zero",
            "none": "Adapters are written beside the weights in the end; where they are added no weight is zero",
        }
        rank_zero_info(
            f"LoRA: {trained:,} of {total:,} parameters are trained. {self._sparsity:.4%} of the weights of the prunable "
            f"linears are zero. {becomes[self.merge]}."
        )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        if not trainer.global_step:  # else a resumed run
            self.metrics["pruned"] = self._validate(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        self.metrics["trained"] = self._validate(trainer)
        if self.merge == "masked":
            zeros = {name: layer.get_base_layer().weight == 0 for name, layer in _layers(pl_module).items()}
            self._adapted.merge_and_unload(safe_merge=True)
            apply_zeros({name: pl_module.model.get_submodule(name).weight for name in zeros}, zeros)
            self.metrics["merged"] = self._validate(trainer)
            log_scalars(trainer.loggers, {f"merged/{k}": v for k, v in self.metrics["merged"].items()}, trainer.global_step)

    def _validate(self, trainer: Trainer) -> dict[str, float]:
        """Measure metrics on held-out data, without the checkpoints that follow a validation within training."""
        callbacks, trainer.callbacks = trainer.callbacks, [c for c in trainer.callbacks if not isinstance(c, Checkpoint)]
        try:
            found = validate_within_fit(trainer)
        finally:
            trainer.callbacks = callbacks
        return {name: value for name, value in found.items() if not name.startswith("train/")}

    @override
    def content(self, trainer: Trainer, pl_module: PrunableModule, metrics: dict[str, float]) -> CardContent:
        merged = share_of_zeros(pl_module) if self.merge == "masked" else None
        summary = {
            "masked": "Low-rank adapters were trained where the weights of a pruned model are not zero, and merged.",
            "none": "A pruned model as it was, and low-rank adapters beside it. Where they are added, no weight is zero.",
        }
        settings = {name: getattr(self, name) for name in ("r", "alpha", "linears", "merge")}
        return CardContent(
            title=self._title,
            summary=summary[self.merge],
            settings={"lora": settings, **training_settings(trainer)},
            metrics=self.metrics,
            sparsity={"pruned": self._sparsity} | ({} if merged is None else {"merged": merged}),
            tags=(*sparse_tags(self._sparsity), "lora"),
            library="peft" if self.merge == "none" else None,
        )

    @property
    def _title(self) -> str:
        return f"LoRA, r = {self.r}, alpha = {self.alpha:g}"

    @override
    def announce(self, pl_module: PrunableModule, target: Path) -> None:
        super().announce(pl_module, target)
        rows = [
            (name, " -> ".join(f"{values[name]:.4g} {state}" for state, values in self.metrics.items() if name in values))
            for name in self.metrics["trained"]
        ]
        if self.merge == "masked":
            share = share_of(zeros_of(linear_weights(pl_module)))
            rows.append(("sparsity", f"{self._sparsity:.4%} of the prunable linears -> {share:.4%} with the adapters merged"))
        else:
            rows.append(("sparsity", f"{self._sparsity:.4%} of the prunable linears; none where adapters are added"))
        print_table(self._title, [*rows, ("model", str(target))])

    @override
    def write(self, pl_module: PrunableModule, target: Path) -> None:
        """Write the model. With `merge: none`, write the pruned model, and its adapters in peft's format."""
        if self.merge == "masked":
            super().write(pl_module, target)
            return
        from peft import PeftModel

        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            self._adapted.save_pretrained(scratch)
            Path(scratch, CARD).unlink(missing_ok=True)  # a form to be filled in
            self._adapted.unload()
            super().write(pl_module, target)
            move_files(Path(scratch), target)
        self._adapted = PeftModel.from_pretrained(pl_module.model, target)  # as before: the module goes on with its adapters


def _layers(pl_module: PrunableModule) -> dict[str, Any]:
    """Return the linears that have adapters, by full name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in pl_module.model.named_modules() if isinstance(module, LoraLayer)}


def _without_zeros(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Subtract from a linear's output what its adapter adds where the weight is zero."""
    (adapter,) = layer.active_adapters
    added = layer.get_delta_weight(adapter).masked_fill(layer.get_base_layer().weight != 0, 0)
    return output - nn.functional.linear(inputs[0], added.to(inputs[0].dtype)).to(output.dtype)

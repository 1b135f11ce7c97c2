"""KeepSparsity: trains a pruned model further while its zeros stay zeros.

    python train.py fit --config configs/recover/smollm2_full.yaml

The zeros of the prunable linears when `fit` starts are the mask. It is applied after every step of every optimizer. So
gradients, momentum and weight decay cannot move a masked weight: it is exactly 0 whenever the model runs or is saved.
"""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from callbacks.base.sparsity import LEAST_SPARSITY, linear_weights, prunable_linears, share_of, zeros_of
from lightning_modules.base.prunable import PrunableModule
from utilities.distributed import need_whole_weights


class KeepSparsity(Callback):
    """Keep the zeros of a PrunableModule's linears while it trains as usual. Takes no arguments.

    A checkpoint holds the mask, in one bit for each weight. A resumed run takes it from there, since training may have
    brought further weights to 0 by chance. In memory the mask takes a byte for each weight.
    """

    def __init__(self) -> None:
        self.zeros: dict[str, Tensor] = {}
        """Full name of a linear -> (O, I), True where the weight stays 0."""
        self._stored: dict[str, dict[str, Any]] | None = None
        self._hooks: list[Any] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, PrunableModule):
            raise TypeError(f"KeepSparsity needs a PrunableModule such as CausalLM but got {type(pl_module).__name__}.")
        need_whole_weights(trainer, type(self).__name__)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        if pl_module.calibration_step is not None:
            raise ValueError("KeepSparsity keeps zeros while a model trains, but this run prunes. Leave one of the two out.")
        weights = linear_weights(pl_module)
        self.zeros = zeros_of(weights) if self._stored is None else self._restored(weights)
        self._stored = None
        share = share_of(self.zeros)
        if share < LEAST_SPARSITY:
            raise ValueError(
                f"KeepSparsity expected a pruned model, but {share:.4%} of the weights of its prunable linears are zero. Give "
                "the directory of a pruned model as model.model_name_or_path, or leave the callback out."
            )
        rank_zero_info(f"KeepSparsity: {share:.4%} of the weights of {len(weights)} linears are zero and stay zero.")
        self._hooks = [optimizer.register_step_post_hook(lambda *_: self._clear(pl_module)) for optimizer in trainer.optimizers]

    def _clear(self, pl_module: PrunableModule) -> None:
        for name, linear in prunable_linears(pl_module).items():
            linear.clear(self.zeros[name])

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        pl_module.log("train/sparsity", share_of(zeros_of(linear_weights(pl_module))))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: PrunableModule) -> None:
        for name, weight in linear_weights(pl_module).items():
            if weight[self.zeros[name]].any():
                raise RuntimeError(
                    f"Weights of {name} that were zero are not any more: something other than an optimizer has changed them "
                    "after the last step. Leave out the other callbacks that write weights."
                )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            name: {"shape": list(mask.shape), "bits": torch.from_numpy(np.packbits(mask.cpu().numpy()))}
            for name, mask in self.zeros.items()
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stored = state_dict

    def _restored(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the mask of a checkpoint."""
        shapes = {name: list(weight.shape) for name, weight in weights.items()}
        if shapes != {name: stored["shape"] for name, stored in self._stored.items()}:
            raise ValueError("Argument `ckpt_path`: its checkpoint holds the mask of another model. Give one of this model.")
        found = {}
        for name, weight in weights.items():
            bits = np.unpackbits(self._stored[name]["bits"].cpu().numpy(), count=weight.numel())
            found[name] = torch.from_numpy(bits).bool().view(weight.shape).to(weight.device)
        return found

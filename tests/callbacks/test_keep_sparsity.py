"""KeepSparsity: zeros are exactly 0 after every step, whatever the optimizer, the precision and the interruption."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy

from callbacks import BlockwisePruning, KeepSparsity, SaveModel
from callbacks.base.sparsity import linear_weights, share_of, zeros_of
from lightning_modules import CausalLM
from tests.helpers.launchers import go
from tests.helpers.recovery_runs import LEARNING_RATE, Crash, RecoveryRun, loaded, prune_two_of_four, short_windows
from tests.helpers.tiny import quiet, tiny_images, tiny_vit
from utilities.distributed import need_whole_weights


@pytest.fixture
def text(text_file, pruned):
    """50 batches an epoch, so 50 steps."""
    return short_windows(pruned, text_file, num_calibration=100, seed=0)


class Watch(Callback):
    """After every batch: whether a weight of the mask is not 0, and how many others have moved."""

    def __init__(self, zeros):
        self.zeros, self.steps, self.lost = zeros, 0, 0

    def on_fit_start(self, trainer, pl_module):
        self.before = {name: weight.clone() for name, weight in linear_weights(pl_module).items()}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps += 1
        weights = linear_weights(pl_module)
        self.lost += sum(int((weights[name][mask] != 0).sum()) for name, mask in self.zeros.items())
        self.moved = min(float((weights[name] != self.before[name])[~mask].float().mean()) for name, mask in self.zeros.items())


def masks_of(directory):
    return zeros_of(linear_weights(loaded(directory)))


class Momentum(CausalLM):
    """SGD whose momentum and weight decay would move every weight at every step."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.99, weight_decay=0.1, nesterov=True)


@pytest.mark.parametrize(
    ("cls", "precision"), [(CausalLM, "32-true"), (CausalLM, "bf16-true"), (CausalLM, "bf16-mixed"), (Momentum, "32-true")]
)
def test_zeros_are_kept_at_every_step_and_in_the_saved_model(cls, precision, pruned, text, tmp_path):
    zeros = masks_of(pruned)
    watch, module = Watch(zeros), cls(pruned, learning_rate=LEARNING_RATE)
    trainer = quiet(tmp_path, KeepSparsity(), watch, SaveModel(str(tmp_path / "model")), precision=precision)
    trainer.fit(module, text)
    assert (watch.steps, watch.lost) == (50, 0) and watch.moved > 0.5
    assert share_of(zeros) == 0.5 and float(trainer.callback_metrics["train/sparsity"]) == pytest.approx(0.5, abs=0.01)

    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert saved.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    for name, mask in zeros.items():
        weight = saved.get_parameter(f"{name}.weight")
        assert not weight[mask].any() and (weight[~mask] != 0).float().mean() > 0.99
        assert (weight.view(weight.shape[0], -1, 4) == 0).sum(-1).min() == 2  # the pattern


def test_without_it_they_are_lost(pruned, text, tmp_path):
    watch = Watch(masks_of(pruned))
    quiet(tmp_path, watch).fit(CausalLM(pruned, learning_rate=LEARNING_RATE), text)
    assert watch.lost > 50 * 1000


class ZeroByChance(Callback):
    """What rounding does now and then: a weight of each linear that is not pruned is 0 for a step."""

    def __init__(self, zeros):
        self.free = {name: torch.nonzero(~mask)[0] for name, mask in zeros.items()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (0, 19):
            for name, weight in linear_weights(pl_module).items():
                weight[tuple(self.free[name])] = 0


def test_resumed_run_ends_as_an_uninterrupted_one(pruned, text, tmp_path):
    """The checkpoint holds weights that are 0 by chance; a mask read off them would freeze these."""
    zeros, found, sizes = masks_of(pruned), {}, {"max_epochs": 2, "limit_train_batches": 20}
    for name, more in (("whole", ()), ("cut", (Crash(),))):
        module = CausalLM(pruned, learning_rate=LEARNING_RATE)
        checkpoint = ModelCheckpoint(tmp_path / name, "last")
        callbacks = (KeepSparsity(), ZeroByChance(zeros), checkpoint, *more)
        with pytest.raises(RuntimeError, match="power cut") if more else nullcontext():
            quiet(tmp_path, *callbacks, enable_checkpointing=True, **sizes).fit(module, text)
        found[name] = linear_weights(module)
    last = tmp_path / "cut/last.ckpt"
    stored = torch.load(last, weights_only=True)
    assert stored["global_step"] == 20
    name, mask = next(iter(zeros.items()))
    assert (stored["state_dict"][f"model.{name}.weight"] == 0).sum() == mask.sum() + 1
    state = stored["callbacks"]["KeepSparsity"]
    assert sum(part["bits"].numel() for part in state.values()) == sum(mask.numel() for mask in zeros.values()) / 8

    module, keep = CausalLM(pruned, learning_rate=LEARNING_RATE), KeepSparsity()
    quiet(tmp_path, keep, **sizes).fit(module, text, ckpt_path=last, weights_only=True)
    assert all(torch.equal(keep.zeros[name], mask) for name, mask in zeros.items())
    for name, weight in linear_weights(module).items():
        torch.testing.assert_close(weight, found["whole"][name], rtol=0, atol=0)


def test_fused_projections_of_a_vision_transformer(tmp_path):
    class Trained(type(tiny_vit())):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    module = tiny_vit()
    module.__class__ = Trained
    prune_two_of_four(module)
    zeros = zeros_of(linear_weights(module))
    assert {"blocks.0.attn.qkv.q", "blocks.2.mlp.fc2"} <= set(zeros)
    watch = Watch(zeros)
    loader = torch.utils.data.DataLoader(tiny_images(20, 0), batch_size=5)
    quiet(tmp_path, KeepSparsity(), watch, max_epochs=2).fit(module, loader)
    assert (watch.steps, watch.lost) == (8, 0) and watch.moved > 0.9


def test_two_processes_end_with_the_same_zeros(pruned, text_file, tmp_path):
    log = tmp_path / "log"
    assert go(RecoveryRun(pruned, text_file, str(tmp_path)), log=log) == [0, 0], log.read_text()[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert first["steps"] == 8
    before = linear_weights(loaded(pruned))
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]) and torch.equal(weight, saved.get_parameter(f"{name}.weight"))
        assert torch.equal(weight == 0, before[name] == 0) and not torch.equal(weight, before[name])


def test_nothing_is_held_after_fit(pruned, text, tmp_path):
    module = CausalLM(pruned, learning_rate=LEARNING_RATE)
    trainer = quiet(tmp_path, KeepSparsity(), limit_train_batches=1)
    trainer.fit(module, text)
    weight = linear_weights(module)["model.layers.0.self_attn.q_proj"]
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.optimizers[0].step()
    assert (weight == 0).float().mean() < 0.01


def test_what_a_user_is_told(tiny_model, pruned, text, tmp_path):
    with pytest.raises(ValueError, match=r"expected a pruned model, but 0.0000% of .* Give the directory of a pruned"):
        quiet(tmp_path, KeepSparsity()).fit(CausalLM(tiny_model("llama")), text)
    with pytest.raises(ValueError, match=r"but this run prunes\. Leave one of the two out"):
        quiet(tmp_path, BlockwisePruning(sparsity=0.5), KeepSparsity()).fit(CausalLM(pruned), text)
    with pytest.raises(RuntimeError, match=r"Weights of model\.layers\.0\.self_attn\.q_proj that were zero are not any more"):
        quiet(tmp_path, Fill(), KeepSparsity(), limit_train_batches=1).fit(CausalLM(pruned), text)
    with pytest.raises(TypeError, match="needs a PrunableModule such as CausalLM but got BoringModel"):
        from lightning.pytorch.demos.boring_classes import BoringModel

        quiet(tmp_path, KeepSparsity()).fit(BoringModel())
    with pytest.raises(ValueError, match=r"`trainer.strategy` expected auto .* with KeepSparsity, .* got FSDPStrategy"):
        need_whole_weights(SimpleNamespace(strategy=FSDPStrategy()), "KeepSparsity")
    other = KeepSparsity()
    other.load_state_dict({"elsewhere": {"shape": [2, 4], "bits": torch.zeros(1, dtype=torch.uint8)}})
    with pytest.raises(ValueError, match="`ckpt_path`: its checkpoint holds the mask of another model"):
        quiet(tmp_path, other).fit(CausalLM(pruned), text)


class Fill(Callback):
    def on_train_end(self, trainer, pl_module):
        for weight in linear_weights(pl_module).values():
            weight.fill_(1)

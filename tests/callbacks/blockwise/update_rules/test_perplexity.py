"""The perplexity rule: one run with each projection held, and the best of them stays."""

import copy
import json

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import FixedRule
from callbacks.blockwise.update_rules import ROLES
from callbacks.blockwise.update_rules.perplexity import Rounds
from datamodules import TextDataModule
from lightning_modules.parts.architectures import PrunableLinear
from tests.helpers.rule_cases import SEQ_LEN, on_models


@on_models()
def test_perplexity_rule_ends_with_its_best_run_bit_by_bit(case):
    alone, losses = {}, {}
    for role in ROLES:
        module, callback = case.fit(update_rule=FixedRule(role))
        alone[role], losses[role] = module.model.state_dict(), callback.metrics["pruned"]["val/loss"]
    module, callback = case.fit(update_rule="perplexity")
    best = min(losses, key=losses.get)
    assert {role: callback.metrics[f"hold_{role}"]["val/loss"] for role in ROLES} == pytest.approx(losses)
    assert all(torch.equal(value, alone[best][name]) for name, value in module.model.state_dict().items())
    assert callback.metrics["pruned"]["val/loss"] == losses[best]
    assert {record.choice for record in callback.records} == {best} and len(callback.records) == 3
    report = json.loads((callback.output_path / "pruning.json").read_text())
    assert report["settings"]["update_rule"]["class_path"] == "PerplexityRule" and report["settings"]["held"] == best


@on_models("llama")
def test_perplexity_rule_says_so_and_needs_held_out_text(case, caplog):
    with caplog.at_level("INFO"):
        case.fit(update_rule="perplexity", logger=TensorBoardLogger(case.tmp_path, name="run"))
    assert "pruning 3 times, with q, k, v held" in caplog.text
    events = EventAccumulator(str(case.tmp_path / "run" / "version_0")).Reload()
    for role in ROLES:
        assert [e.step for e in events.Scalars(f"hold_{role}/block/relative_error")] == [0, 1, 2]
        assert [e.step for e in events.Scalars(f"hold_{role}/val/loss")] == [3]
    module = case.module()
    before = copy.deepcopy(module.model.state_dict())
    case.data = TextDataModule(case.directory, case.data.hparams.source, seq_len=SEQ_LEN, num_calibration=4, num_heldout=0)
    with pytest.raises(ValueError, match="chooses by val/loss on held-out data, but there is none"):
        case.fit(module, update_rule="perplexity")
    assert all(torch.equal(value, before[name]) for name, value in module.model.state_dict().items())


def test_rounds_follow_weights_that_move():
    """A block that goes to another device and back, as with `offload`, has its weights in other memory."""
    module = torch.nn.Linear(4, 6)
    linears = {"q": PrunableLinear(module, slice(0, 2)), "v": PrunableLinear(module, slice(2, 6))}
    dense = module.weight.detach().clone()
    rounds = Rounds(linears, "val/loss")
    for held, loss in (("q", 2.0), ("k", 0.5), ("v", 3.0)):
        module.weight.data = module.weight.detach().clone()  # a move
        rounds.restart()
        assert torch.equal(module.weight, dense)
        module.weight.data = dense * loss
        rounds.add(held, {"val/loss": loss}, [])
    module.weight.data = module.weight.detach().clone()
    assert rounds.finish().held == "k" and torch.equal(module.weight, dense * 0.5)

"""Looking at attention: measures are those of the whole models, and the model is left as it was."""

import pytest
import torch

from callbacks import Diagnostics, FixedRule
from tests.helpers.rule_cases import attention_outputs, attention_probabilities, divergence_by_hand, on_models


@on_models("llama", "vit")
def test_measures_are_those_of_the_whole_models(case):
    """KL and RMSE of the last run by whole forward passes of the dense and the pruned model."""
    module, callback = case.fit(diagnostics=Diagnostics(attention=True), update_rule=FixedRule("v"))
    dense, samples = case.module(), case.samples()[:4]  # the default number of windows
    module.eval()
    for index, record in enumerate(callback.records):
        one, other = (attention_outputs(m, index, samples) for m in (module, dense))
        assert record.attention["rmse"] == pytest.approx((one - other).square().mean().sqrt().item(), rel=1e-3)
        if case.name != "vit":
            by_hand = divergence_by_hand(module, dense, index, samples[:1])
            assert record.attention["kl"] == pytest.approx(by_hand, rel=1e-3, abs=1e-6)
            entropy = torch.special.entr(attention_probabilities(module, index, samples[:1])).sum(-1).mean().item()
            assert record.attention["entropy_pruned"] == pytest.approx(entropy, rel=1e-3)
        assert record.candidates == [] and record.choice == "v"


@on_models()
@pytest.mark.parametrize("rule", ["attention", "perplexity"])
def test_nothing_of_the_models_state_differs_afterwards(case, rule):
    module = case.module()
    module.train()
    module.model.train(True)
    state, rng = state_of(module), torch.get_rng_state()
    case.fit(module, update_rule=rule)
    assert state_of(module) == state and torch.equal(torch.get_rng_state(), rng)


@on_models("llama", "vit")
@pytest.mark.parametrize("place", ["output_error", "leave", "divergence"])
def test_nor_after_an_error(case, place, monkeypatch):
    module = case.module()
    state = state_of(module)
    weight = module.linears(next(iter(module.blocks.values())))[module.architecture.projections["q"]].weight.clone()

    def fail(*args, **kwargs):
        raise KeyError("on purpose")

    monkeypatch.setattr(f"callbacks.blockwise.update_rules.probe.AttentionProbe.{place}", fail)
    with pytest.raises(KeyError, match="on purpose"):
        case.fit(module)
    assert state_of(module) == state
    if place != "leave":  # the error came while candidates were looked at: the dense weights are back
        after = module.linears(next(iter(module.blocks.values())))[module.architecture.projections["q"]].weight
        assert torch.equal(after, weight)


def state_of(module):
    """Everything but weights that could have been changed: modes, attention forms, hooks, shadowed methods."""
    config = getattr(module.model, "config", None)
    return (
        [child.training for child in module.modules()],
        getattr(config, "_attn_implementation", None),
        getattr(config, "use_cache", None),
        [getattr(child, "fused_attn", None) for child in module.modules()],
        [(len(child._forward_hooks), len(child._forward_pre_hooks), "forward" in vars(child)) for child in module.modules()],
        [parameter.requires_grad for parameter in module.parameters()],
    )

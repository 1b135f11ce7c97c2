"""Update rules end to end, against searches that recompute everything with whole forward passes of the model."""

import copy
import itertools
import math

import pytest
import torch

from callbacks import AttentionRule
from callbacks.blockwise.update_rules import ROLES
from callbacks.blockwise.update_rules.attention import SHARES, descend
from functional.pruning import InputStatistics, OutputStatistics, prune_linear
from functional.pruning.attention import outlier_ratio
from tests.helpers.rule_cases import RULE_WINDOWS, attention_outputs, divergence_by_hand, on_models


def statistics(module, block, samples):
    """Statistics of the linears of a block, one whole forward a sample."""
    linears = module.linears(block)
    pairs = {name: (InputStatistics(x.in_features), OutputStatistics(x.out_features)) for name, x in linears.items()}
    for n, sample in enumerate(samples):
        hooks = []
        for name, linear in linears.items():

            def add(_, args, output, pair=pairs[name], rows=linear.rows, n=n):
                pair[0].update(args[0].reshape(1, -1, args[0].shape[-1]), n)
                pair[1].update(output[..., rows].reshape(1, len(output.reshape(-1, output.shape[-1])), -1), n)

            hooks.append(linear.module.register_forward_hook(add))
        with torch.no_grad():
            module.calibration_forward(sample)
        for hook in hooks:
            hook.remove()
    return pairs


def states_by_hand(module, name, linear, pair, partial):
    """Weight of a projection in every state, and its error Σ‖(W − Ŵ)x‖²."""
    arguments = {"sparsity": 0.6, "scale": float(pair[0].num_tokens / pair[0].num_samples)}
    updated, held = (prune_linear(linear.weight, *pair, method=m, **arguments) for m in ("d2_sparsegpt", "d2_wanda"))
    weights = {"updated": updated.weight}
    if partial:
        kept = linear.weight * updated.mask
        weights |= {state: kept + share * (updated.weight - kept) for state, share in SHARES.items()}
    weights["held"] = held.weight
    gram = pair[0].gram.double()
    dense = linear.weight.double()
    return {state: (w, ((dense - w) @ gram * (dense - w)).sum().item()) for state, w in weights.items()}


def search_by_hand(case, records, candidates, objective, reference, rho=1.0):
    """Every candidate of every block with whole forward passes; asserts the callback's choice and figures, then follows it."""
    module, dense = case.module(), case.module()
    samples = case.samples()
    looked_at = samples[:RULE_WINDOWS]
    chosen = []
    for index, block in enumerate(module.blocks.values()):
        linears, projections = module.linears(block), module.architecture.projections
        pairs = statistics(module, block, samples)
        other = dense if reference == "model" else copy.deepcopy(module)
        target = attention_outputs(other, index, looked_at)
        options = {
            role: states_by_hand(module, projections[role], linears[projections[role]], pairs[projections[role]],
                                 candidates == "partial")
            for role in ROLES
        }  # fmt: skip
        before = {role: linears[projections[role]].weight.clone() for role in ROLES}
        record = records[index]
        listed = {tuple(c["state"].values()): c for c in record.candidates}
        scores = {}
        for states in itertools.product(*options.values()):
            if candidates == "single" and states.count("held") > 1:
                continue
            for role, state in zip(ROLES, states, strict=True):
                linears[projections[role]].weight.copy_(options[role][state][0])
            output = attention_outputs(module, index, looked_at)
            error = ((output - target).square().sum() / target.square().sum()).item()
            reconstruction = sum(options[role][state][1] for role, state in zip(ROLES, states, strict=True))
            kl = divergence_by_hand(module, other, index, looked_at) if objective == "divergence" else math.nan
            scores[states] = (error, reconstruction, kl)
        for role in ROLES:
            linears[projections[role]].weight.copy_(before[role])
        base = scores["updated", "updated", "updated"]

        def score(states, scores=scores, base=base):
            error, reconstruction, kl = scores[states]
            return error if objective == "output" else reconstruction / base[1] + rho * kl / base[2]

        if candidates != "partial":
            assert set(listed) == set(scores), "every candidate is in the record"
        for states, candidate in listed.items():
            assert candidate["output_error"] == pytest.approx(scores[states][0], rel=1e-2, abs=1e-6)
            assert candidate["reconstruction"] == pytest.approx(scores[states][1], rel=1e-2)
            assert candidate["score"] == pytest.approx(score(states), rel=1e-2, abs=1e-6)
        best = min(listed.values(), key=lambda candidate: candidate["score"])
        picked = tuple(best["state"].values())
        assert best["name"] == record.choice
        if candidates == "partial":  # a descent: of one projection neither a neighbour nor an end is better
            names = list(options["q"])
            for i, at in enumerate(names.index(state) for state in picked):
                for other_state in {names[0], names[-1], *names[max(at - 1, 0) : at + 2]}:
                    assert score(picked) <= score((*picked[:i], other_state, *picked[i + 1 :])) * (1 + 1e-3)
        else:
            assert score(picked) <= min(map(score, scores)) * (1 + 1e-3)
        chosen.append(picked)
        follow(module, linears, projections, options, picked, pairs)
    return module, chosen


def follow(module, linears, projections, options, picked, pairs):
    """Prune the block with the states that were picked."""
    by_name = {projections[role]: options[role][state][0] for role, state in zip(ROLES, picked, strict=True)}
    for name, linear in linears.items():
        weight = by_name.get(name)
        if weight is None:
            scale = pairs[name][0].num_tokens / pairs[name][0].num_samples
            weight = prune_linear(linear.weight, *pairs[name], method="d2_sparsegpt", sparsity=0.6, scale=scale).weight
        linear.weight.copy_(weight)


@on_models()
@pytest.mark.parametrize("reference", ["model", "block"])
def test_attention_rule_picks_what_an_exhaustive_search_picks(case, reference):
    module, callback = case.fit(update_rule=AttentionRule("all", "output", reference, windows=RULE_WINDOWS))
    by_hand, chosen = search_by_hand(case, callback.records, "all", "output", reference)
    for one, other in zip(module.model.parameters(), by_hand.model.parameters(), strict=True):
        assert ((one == 0) == (other == 0)).float().mean() > 0.99
    for record, states in zip(callback.records, chosen, strict=True):
        for role, state in zip(ROLES, states, strict=True):
            name = module.architecture.projections[role]
            assert record.linears[name].method == ("d2_wanda" if state == "held" else "d2_sparsegpt")
            assert record.update_shares[role] == float(state == "updated")


@on_models("opt", "llama", "qwen3")
@pytest.mark.parametrize("rho", [0.5, 20.0])
def test_divergence_objective_is_equation_12(case, rho):
    _, callback = case.fit(
        update_rule=AttentionRule("single", "divergence", "block", rho, RULE_WINDOWS),
    )  # fmt: skip
    search_by_hand(case, callback.records, "single", "divergence", "block", rho)


@on_models("llama", "vit")
def test_partial_candidates_are_a_descent(case):
    _, callback = case.fit(update_rule=AttentionRule(windows=RULE_WINDOWS))
    assert callback.settings.update_rule == AttentionRule(windows=RULE_WINDOWS)
    _, chosen = search_by_hand(case, callback.records, "partial", "output", "model")
    assert len({state for states in chosen for state in states}) > 1, "a case in which nothing is chosen shows nothing"


@on_models("llama")
@pytest.mark.parametrize("target", [0.5, "pruned"])
def test_errors_of_all_states_belong_to_what_the_update_aims_at(case, target, monkeypatch):
    """Rows of the target's difference times the Gram matrix, in float64; the target is the one that the solve has aimed at."""
    seen, states_of = [], AttentionRule.states_of

    def spy(self, updated, held, weight, inputs, aim=None):
        states = states_of(self, updated, held, weight, inputs, aim)
        dense, gram = (weight if aim is None else aim).double(), inputs.gram.double()
        for name, state in states.items():
            error = ((dense - state.weight.double()) @ gram * (dense - state.weight.double())).sum().item()
            assert state.error == pytest.approx(error, rel=1e-2), name
            assert state.norm == pytest.approx((dense @ gram * dense).sum().item(), rel=1e-3), name
        seen.append(aim is not None and not torch.equal(aim, weight))
        return states

    monkeypatch.setattr(AttentionRule, "states_of", spy)
    _, callback = case.fit(update_rule=AttentionRule(windows=RULE_WINDOWS), target=target)
    assert seen == [target == 0.5 and block > 0 for block in range(len(callback.records)) for _ in ROLES]


def test_descent_finds_a_minimum():
    table = {"a": {"x": 3.0, "y": 1.0, "z": 2.0}, "b": {"x": 0.0, "y": 5.0}}

    def score(state):
        return table["a"][state["a"]] + table["b"][state["b"]] + (4.0 if state == {"a": "y", "b": "x"} else 0.0)

    assert descend({role: list(names) for role, names in table.items()}, score) == {"a": "z", "b": "x"}
    valley = {name: float((i - 3) ** 2) for i, name in enumerate("abcdefgh")}
    asked = []
    best = descend({"a": list(valley)}, lambda state: asked.append(state["a"]) or valley[state["a"]])
    assert best == {"a": "d"} and set(asked) == set("abcdeh"), "f and g are beyond the valley"
    flat = descend({"a": ["x", "y"], "b": ["x", "y"]}, lambda state: 1.0)
    assert flat == {"a": "x", "b": "x"}, "ties keep the first"


@on_models()
def test_outlier_rule(case):
    dense = case.module()
    module, callback = case.fit(update_rule="outlier")
    for record, block, before in zip(callback.records, module.blocks.values(), dense.blocks.values(), strict=True):
        ratios = {role: outlier_ratio(dense.linears(before)[dense.architecture.projections[role]].weight) for role in ROLES}
        held = max(ratios, key=ratios.get)
        assert record.choice == held and record.outlier_ratios == pytest.approx(ratios)
        for role in ROLES:
            name = module.architecture.projections[role]
            now, then = module.linears(block)[name].weight, dense.linears(before)[name].weight
            kept = now != 0
            assert torch.equal(now[kept], then[kept]) == (role == held)

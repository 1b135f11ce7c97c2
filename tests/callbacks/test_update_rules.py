"""Update rules end to end, against searches that recompute everything with whole forward passes of the model."""

import copy
import itertools
import json
import math

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from callbacks import BlockwisePruning
from callbacks.update_rules import ROLES, SHARES, descend
from datamodules import TextDataModule
from functional.pruning import InputStatistics, OutputStatistics, prune_linear
from functional.pruning.attention import outlier_ratio
from lightning_modules import CausalLM
from tests.tiny import tiny_images, tiny_vit

SEQ_LEN, WINDOWS, RULE_WINDOWS = 24, 8, 3
MODELS = ("opt", "llama", "qwen3", "vit")


class Case:
    """A tiny model with its data, fit by the callback or walked through by hand."""

    def __init__(self, name, tiny_model, text_file, tmp_path):
        self.name, self.tmp_path = name, tmp_path
        if name == "vit":
            self.make = tiny_vit
            self.loaders = [DataLoader(tiny_images(count, seed), batch_size=3) for seed, count in enumerate((WINDOWS, 5))]
            self.tokens, self.data = 17, None
        else:
            self.directory = tiny_model(name)
            data = TextDataModule(
                self.directory, text_file, seq_len=SEQ_LEN, num_calibration=WINDOWS, num_heldout=4, batch_size=3
            )
            self.tokens, self.data = SEQ_LEN, data

    def module(self):
        if self.name == "vit":
            return tiny_vit().eval()
        module = CausalLM(self.directory)
        module.configure_model()
        return module.eval()

    def fit(self, module=None, logger=False, **arguments):
        module = module or self.module()
        callback = BlockwisePruning(**({"sparsity": 0.6} | arguments))
        trainer = Trainer(
            accelerator="cpu", default_root_dir=self.tmp_path, callbacks=[callback], logger=logger,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        if self.data is None:
            trainer.fit(module, *self.loaders)
        else:
            trainer.fit(module, self.data)
        return module, callback

    def samples(self):
        """Every calibration sample as a batch of one."""
        if self.data is None:
            return [torch.utils.data.default_collate([sample]) for sample in self.loaders[0].dataset]
        self.data.setup("fit")
        return [torch.utils.data.default_collate([sample]) for sample in self.data.train_dataloader().dataset]


@pytest.fixture
def case(request, tiny_model, text_file, tmp_path):
    return Case(request.param, tiny_model, text_file, tmp_path)


def on_models(*names):
    return pytest.mark.parametrize("case", names or MODELS, indirect=True)


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


def attention_outputs(module, index, samples):
    """Output of the attention of one block on every sample, by whole forward passes of the model as it stands."""
    seen = []
    attention = module.attention(list(module.blocks.values())[index])
    hook = attention.register_forward_hook(lambda _, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        for sample in samples:
            module.calibration_forward(sample)
    hook.remove()
    return torch.cat([x.double() for x in seen])


def attention_probabilities(module, index, samples):
    """Of language models, from transformers itself."""
    module.model.set_attn_implementation("eager")
    with torch.no_grad():
        result = [
            module.model(input_ids=sample["input_ids"], use_cache=False, output_attentions=True).attentions[index]
            for sample in samples
        ]
    module.model.set_attn_implementation("sdpa")
    return torch.cat(result).double()


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


def divergence_by_hand(module, other, index, samples):
    pruned, dense = (attention_probabilities(m, index, samples) for m in (module, other))
    return (pruned * (pruned.clamp_min(1e-300) / dense.clamp_min(1e-300)).log()).sum(-1).mean().item()


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
    module, callback = case.fit(
        update_rule="attention", candidates="all", objective="output", reference=reference, rule_windows=RULE_WINDOWS
    )
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
        update_rule="attention", candidates="single", objective="divergence", rho=rho, reference="block",
        rule_windows=RULE_WINDOWS,
    )  # fmt: skip
    search_by_hand(case, callback.records, "single", "divergence", "block", rho)


@on_models("llama", "vit")
def test_partial_candidates_are_a_descent(case):
    _, callback = case.fit(rule_windows=RULE_WINDOWS)  # the default rule
    assert callback.settings.rule == "attention"
    _, chosen = search_by_hand(case, callback.records, "partial", "output", "model")
    assert len({state for states in chosen for state in states}) > 1, "a case in which nothing is chosen shows nothing"


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


@on_models()
def test_perplexity_rule_ends_with_its_best_run_bit_by_bit(case):
    alone, losses = {}, {}
    for role in ROLES:
        module, callback = case.fit(non_updated=role)
        alone[role], losses[role] = module.model.state_dict(), callback.metrics["pruned"]["val/loss"]
    module, callback = case.fit(update_rule="perplexity")
    best = min(losses, key=losses.get)
    assert {role: callback.metrics[f"hold_{role}"]["val/loss"] for role in ROLES} == pytest.approx(losses)
    assert all(torch.equal(value, alone[best][name]) for name, value in module.model.state_dict().items())
    assert callback.metrics["pruned"]["val/loss"] == losses[best]
    assert {record.choice for record in callback.records} == {best} and len(callback.records) == 3
    report = json.loads((callback._output / "pruning.json").read_text())
    assert report["settings"]["update_rule"] == "perplexity" and report["settings"]["non_updated"] == best


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

    monkeypatch.setattr(f"callbacks.attention_probe.AttentionProbe.{place}", fail)
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


@on_models("llama")
def test_record_and_tensorboard(case):
    case.fit(logger=TensorBoardLogger(case.tmp_path, name="run"), attention_maps=[1])
    report = json.loads((case.tmp_path / "run" / "version_0" / "pruned" / "pruning.json").read_text())
    events = EventAccumulator(str(case.tmp_path / "run" / "version_0"), size_guidance={"images": 0}).Reload()
    measures = ["rmse", "relative_error", "kl"]
    measures += [f"{m}_{s}" for m in ("entropy", "top_1%_mass", "top_5%_mass") for s in ("dense", "pruned")]
    for name in measures:
        values = [event.value for event in events.Scalars(f"attention/{name}")]
        assert values == pytest.approx([block["attention"][name] for block in report["blocks"]], rel=1e-5), name
    for role in ROLES:
        shares = [block["update_shares"][role] for block in report["blocks"]]
        assert [event.value for event in events.Scalars(f"update_share/{role}")] == pytest.approx(shares)
    assert [event.step for event in events.Images("attention_map")] == [1]
    for block in report["blocks"]:
        best = min(block["candidates"], key=lambda candidate: candidate["score"])
        assert block["choice"] == best["name"]
        # what was measured once the whole block was pruned is what the rule saw of its choice
        assert block["attention"]["relative_error"] != pytest.approx(best["output_error"], rel=1e-6)
    assert report["settings"]["rule_windows"] == 4 and "heads" not in report


@on_models("llama", "vit")
def test_measures_are_those_of_the_whole_models(case):
    """KL and RMSE of the last run by whole forward passes of the dense and the pruned model."""
    module, callback = case.fit(log_attention=True, non_updated="v", rule_windows=RULE_WINDOWS)
    dense, samples = case.module(), case.samples()[:RULE_WINDOWS]
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


@on_models("llama")
def test_rule_source_is_another_text(case, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"w{2 + (7 * i * i) % 90}" for i in range(2000)))
    _, first = case.fit()
    _, second = case.fit(rule_source=str(other))
    scores = [[c["score"] for c in callback.records[0].candidates] for callback in (first, second)]
    assert scores[0][0] != pytest.approx(scores[1][0], rel=1e-3)
    with pytest.raises(ValueError, match=r"Argument `rule_source`: .* does not exist"):
        case.fit(rule_source=str(tmp_path / "nowhere.txt"))


@on_models("vit")
def test_rule_source_needs_a_data_module_that_reads_it(case):
    with pytest.raises(ValueError, match="`rule_source` needs a data module that reads it, but NoneType has no"):
        case.fit(rule_source="pydoc")


@on_models("llama")
def test_batch_size_of_the_data_does_not_matter_to_the_rule(case):
    _, first = case.fit(rule_windows=5)
    case.data = TextDataModule(
        case.directory, case.data.hparams.source, seq_len=SEQ_LEN, num_calibration=WINDOWS, num_heldout=4, batch_size=8
    )
    _, second = case.fit(rule_windows=5)
    assert [record.choice for record in first.records] == [record.choice for record in second.records]


@on_models("llama")
def test_ignored_projections_are_left_out_of_the_choice(case):
    _, callback = case.fit(ignore=["*.k_proj", "model.layers.1.self_attn.*"])
    assert [sorted(record.update_shares) for record in callback.records] == [["q", "v"], [], ["q", "v"]]
    assert callback.records[1].attention["rmse"] > 0, "its input is that of the pruned blocks"


@on_models("llama")
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_other_precisions(case, precision):
    callback = BlockwisePruning(sparsity=0.5)
    trainer = Trainer(
        accelerator="cpu", default_root_dir=case.tmp_path, callbacks=[callback], logger=False, precision=precision,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(case.module(), case.data)
    assert all(0 < record.attention["relative_error"] < 10 for record in callback.records)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"update_rule": "entropy"},
            "`update_rule` expected to be one of fixed, outlier, .* but got 'entropy'",
        ),
        (
            {"update_rule": "attention", "non_updated": "v"},
            "`non_updated` = 'v' belongs to update_rule fixed, but",
        ),
        ({"method": "wanda", "update_rule": "outlier"}, "`update_rule` = 'outlier' belongs to method d2prune"),
        ({"candidates": "pairs"}, "`candidates` expected to be one of single, all, partial but got 'pairs'"),
        ({"objective": "kl"}, "`objective` expected to be one of output, divergence but got 'kl'"),
        ({"reference": "dense"}, "`reference` expected to be one of model, block but got 'dense'"),
        ({"rule_windows": 0}, "`rule_windows` expected to be a positive integer but got 0"),
        ({"rho": -1.0}, "`rho` expected to be a number of at least 0 but got -1"),
    ],
)
def test_wrong_settings_fail_when_written(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockwisePruning(sparsity=0.5, **arguments)


@on_models("llama")
def test_wrong_blocks_of_attention_maps(case):
    with pytest.raises(ValueError, match=r"`attention_maps` expected to name some of 3 blocks, got \[3\]"):
        case.fit(attention_maps=[3])

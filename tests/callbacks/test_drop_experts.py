"""DropExperts: scores by hand, a smaller checkpoint that transformers loads and that is pruned further, refusals."""

import pytest
import torch
import transformers

from callbacks import BlockwisePruning, DropExperts
from datamodules import TextDataModule
from lightning_modules import CausalLM
from lightning_modules.parts.experts import experts_of
from tests.helpers.tiny import MIXTURES, make_mixture, make_model, make_tokenizer, quiet

SHARE = {"deepseek_v3": 0.25}


def data_of(tiny_model, text):
    return TextDataModule(tiny_model("llama"), str(text), seq_len=20, num_calibration=16, num_heldout=4, batch_size=4)


def drop(family, data, folder, **settings):
    make_mixture(family).save_pretrained(folder / "dense")
    make_tokenizer("llama").save_pretrained(folder / "dense")
    callback = DropExperts(**{"share": SHARE.get(family, 0.5)} | settings, output_dir=str(folder / "fewer"))
    module = CausalLM(str(folder / "dense"))
    quiet(folder, callback, max_epochs=None).fit(module, data)
    return module.eval(), callback


@torch.no_grad()
def scores_by_hand(model, batches):
    """Mean of the router's factor times the norm of the expert's output, for each expert of each layer."""
    layers = [experts for block in model.model.layers for experts in experts_of(block).values()]
    found = []
    for experts in layers:
        seen = []
        handle = experts.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args))
        for batch in batches:
            model(input_ids=batch["input_ids"], use_cache=False)
        handle.remove()
        hidden, chosen, factors = (torch.cat(parts) for parts in zip(*seen, strict=True))
        scores = []
        for expert in range(len(experts.down_proj)):
            token, slot = (chosen == expert).nonzero().unbind(1)
            alone = experts(hidden[token], torch.full((len(token), 1), expert), torch.ones(len(token), 1))
            scores.append(float((alone.norm(dim=1) * factors[token, slot]).mean()) if len(token) else 0.0)
        found.append(scores)
    return found


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_with_the_smallest_scores_go(family, tiny_model, text_file, tmp_path):
    data = data_of(tiny_model, text_file)
    module, callback = drop(family, data, tmp_path)
    dense, share = make_mixture(family), SHARE.get(family, 0.5)
    expected = scores_by_hand(dense, list(data.train_dataloader()))
    assert [pytest.approx(scores, rel=1e-3, abs=1e-6) for scores in callback.scores.values()] == expected
    for scores, kept in zip(callback.scores.values(), callback.kept.values(), strict=True):
        assert len(kept) == len(scores) * (1 - share) and kept == sorted(kept)
        if family != "deepseek_v3":  # which loses equally many of each group
            assert min(scores[expert] for expert in kept) >= max(s for e, s in enumerate(scores) if e not in kept)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fewer").eval()
    ids = torch.arange(2, 42).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, module(ids))
    size = sum(value.numel() for value in again.parameters())
    gone = sum(experts.down_proj[0].numel() + experts.gate_up_proj[0].numel() for experts in experts_in(dense))
    assert size <= sum(value.numel() for value in dense.parameters()) - gone
    for before, after, kept in zip(experts_in(dense), experts_in(again), callback.kept.values(), strict=True):
        assert torch.equal(before.down_proj[kept], after.down_proj) and torch.equal(
            before.gate_up_proj[kept], after.gate_up_proj
        )
    assert {"all experts", "experts dropped"} == set(callback.metrics)
    assert callback.metrics["experts dropped"]["val/perplexity"] > 1
    card = (tmp_path / "fewer" / "README.md").read_text(encoding="utf-8")
    assert f"{len(kept)} of {len(scores)} experts" in card


def experts_in(model):
    return [experts for block in model.model.layers for experts in experts_of(block).values()]


def test_what_is_left_is_pruned_further(tiny_model, text_file, tmp_path):
    data = data_of(tiny_model, text_file)
    drop("qwen3_moe", data, tmp_path)
    callback = BlockwisePruning(sparsity=0.5, method="wanda", output_dir=str(tmp_path / "pruned"))
    quiet(tmp_path, callback, max_epochs=None).fit(CausalLM(str(tmp_path / "fewer")), data)
    assert all(len(record.expert_tokens) == 3 and record.sparsity == 0.5 for record in callback.records)


@pytest.mark.parametrize(
    ("family", "share", "message"),
    [
        ("mixtral", 0.9, r"`share` = 0.9 leaves 1 of 4 experts; expected at least 2, which the router chooses from"),
        ("mixtral", 0.1, r"`share` = 0.1 leaves 4 of 4 experts; expected at least 2.* and less than 4"),
        ("deepseek_v3", 0.75, r"`share` = 0.75 leaves 2 of 8 experts in 2 groups; expected at least 4"),
    ],
)
def test_shares_that_do_not_fit(family, share, message, tiny_model, text_file, tmp_path):
    with pytest.raises(ValueError, match=message):
        drop(family, data_of(tiny_model, text_file), tmp_path, share=share)
    assert not (tmp_path / "fewer").exists()


def test_models_without_experts_and_bad_shares_are_refused(tiny_model, text_file, tmp_path):
    with pytest.raises(ValueError, match=r"DropExperts needs a mixture of experts, but LlamaForCausalLM has none"):
        quiet(tmp_path, DropExperts(0.5, str(tmp_path / "fewer")), max_epochs=None).fit(
            CausalLM(make_model("llama")), data_of(tiny_model, text_file)
        )
    for share in (0, 1, -0.5):
        with pytest.raises(ValueError, match=r"`share` expected to be a share of the experts in \(0, 1\) but got"):
            DropExperts(share)

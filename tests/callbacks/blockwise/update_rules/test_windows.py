"""Which windows an update rule looks at: those of another text if asked, and as many whatever the batch size."""

import pytest

from callbacks import AttentionRule
from datamodules import TextDataModule
from tests.helpers.rule_cases import SEQ_LEN, WINDOWS, on_models


@on_models("llama")
def test_rule_source_is_another_text(case, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"w{2 + (7 * i * i) % 90}" for i in range(2000)))
    _, first = case.fit()
    _, second = case.fit(update_rule=AttentionRule(source=str(other)))
    scores = [[c["score"] for c in callback.records[0].candidates] for callback in (first, second)]
    assert scores[0][0] != pytest.approx(scores[1][0], rel=1e-3)
    with pytest.raises(ValueError, match=r"Argument `update_rule.source`: .* does not exist"):
        case.fit(update_rule=AttentionRule(source=str(tmp_path / "nowhere.txt")))


@on_models("vit")
def test_rule_source_needs_a_data_module_that_reads_it(case):
    with pytest.raises(ValueError, match=r"`update_rule.source` needs a data module that reads it.* plain dataloaders"):
        case.fit(update_rule=AttentionRule(source="pydoc"))


@on_models("llama")
def test_batch_size_of_the_data_does_not_matter_to_the_rule(case):
    _, first = case.fit(update_rule=AttentionRule(windows=5))
    case.data = TextDataModule(
        case.directory, case.data.hparams.source, seq_len=SEQ_LEN, num_calibration=WINDOWS, num_heldout=4, batch_size=8
    )
    _, second = case.fit(update_rule=AttentionRule(windows=5))
    assert [record.choice for record in first.records] == [record.choice for record in second.records]

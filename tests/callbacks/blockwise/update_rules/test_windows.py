"""Which windows an update rule looks at: those of another text if asked, and as many whatever the batch size."""

import pytest

from datamodules import TextDataModule
from tests.helpers.rule_cases import SEQ_LEN, WINDOWS, on_models


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

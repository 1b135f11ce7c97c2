"""What is recorded and logged of attention, block by block."""

import json

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import BlockwisePruning, Diagnostics
from callbacks.blockwise.update_rules import ROLES
from tests.helpers.rule_cases import on_models


@on_models("llama")
def test_record_and_tensorboard(case):
    case.fit(logger=TensorBoardLogger(case.tmp_path, name="run"), diagnostics=Diagnostics(attention_maps=[1]))
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
    assert report["settings"]["update_rule"]["init_args"]["windows"] == 4 and "heads" not in report


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


@on_models("llama")
def test_wrong_blocks_of_attention_maps(case):
    with pytest.raises(ValueError, match=r"`diagnostics.attention_maps` expected to name some of 3 blocks but got \[3\]"):
        case.fit(diagnostics=Diagnostics(attention_maps=[3]))

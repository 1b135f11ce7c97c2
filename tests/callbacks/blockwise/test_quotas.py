"""Allocation in whole runs: exact sums, every way to run gives the same quotas, and everything says what they are."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import BlockwisePruning, DepthAllocation, ErrorAllocation, FixedRule, JointSolver, OwlAllocation
from datamodules import TextDataModule
from functional.pruning import zeros_wanted
from functional.pruning.allocation import owl_sparsities
from lightning_modules import CausalLM
from tests.helpers.launchers import Fault, PruningRun, VisionRun, go, tiny

KINDS = {"owl": OwlAllocation(2.0), "error": ErrorAllocation(), "depth": DepthAllocation(-0.07)}


def fit(directory, text_file, folder, logger=False, progress=False, **settings):
    callback = BlockwisePruning(output_dir=str(folder / "pruned"), **settings)
    data = TextDataModule(directory, source=text_file, seq_len=24, num_calibration=8, num_heldout=4, batch_size=3)
    trainer = Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=[callback], logger=logger, enable_progress_bar=progress,
        enable_model_summary=False,
    )  # fmt: skip
    module = CausalLM(directory)
    trainer.fit(module, data)
    return module, data, callback


def zeros_of(module, ignored=""):
    """Zeros and weights of the pruned linears, block by block."""
    weights = [
        [linear.weight for name, linear in module.linears(block).items() if not ignored or ignored not in name]
        for block in module.blocks.values()
    ]
    return [(sum(int((w == 0).sum()) for w in found), sum(w.numel() for w in found)) for found in weights]


def naive_norms(directory, data, unit=False):
    """‖X_j‖² of every linear, from forward passes of the whole dense model, window by window, in float64.

    With `unit` of tokens of length 1; and under the names of blocks the share of each token that they write.
    """
    module = CausalLM(directory)
    module.configure_model()
    found = {}
    for block_name, block in module.blocks.items():
        for name, linear in module.linears(block).items():

            def add(_, args, __, key=(block_name, name)):
                x = args[0].double().reshape(-1, args[0].shape[-1])
                x = x / x.norm(dim=1, keepdim=True) if unit else x
                found[key] = found.get(key, 0) + x.square().sum(0)

            linear.module.register_forward_hook(add)

        def compare(_, args, output, key=block_name):
            before, after = args[0].double(), (output[0] if isinstance(output, tuple) else output).double()
            found.setdefault(key, []).append(((after - before).norm(dim=-1) / after.norm(dim=-1)).square().flatten())

        block.register_forward_hook(compare)
    with torch.no_grad():
        for window in torch.cat([batch["input_ids"] for batch in data.train_dataloader()]):
            module.model.eval()(window[None], use_cache=False)
    return module, found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.63},
        {"sparsity": 0.55, "method": "magnitude"},
        {"sparsity": 0.7, "update_rule": "perplexity"},
        {"sparsity": 0.6, "update_rule": "outlier"},
        {"sparsity": 0.5, "update_rule": FixedRule("k"), "ignore": ["*.down_proj"]},
    ],
    ids=str,
)
def test_the_sum_of_zeros_is_exact(kind, settings, tiny_model, text_file, tmp_path):
    module, _, callback = fit(tiny_model("llama"), text_file, tmp_path, allocation=KINDS[kind], **settings)
    counts = zeros_of(module, "down_proj" if "ignore" in settings else "")
    weights = sum(weights for _, weights in counts)
    assert sum(zeros for zeros, _ in counts) == zeros_wanted(weights, settings["sparsity"])
    shares = [record.allocation["sparsity"] for record in callback.records]
    assert shares == pytest.approx([zeros / weights for zeros, weights in counts]) and len(set(shares)) > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("opt", {"method": "wanda"}),
        ("qwen3", {"method": "wanda"}),
        ("llama", {"method": "sparsegpt", "solver": JointSolver("row")}),
    ],
)
def test_whole_rows_leave_less_than_one_column_of_a_linear(kind, family, settings, tiny_model, text_file, tmp_path):
    module, _, _ = fit(tiny_model(family), text_file, tmp_path, sparsity=0.57, allocation=KINDS[kind], **settings)
    counts = zeros_of(module)
    missing = zeros_wanted(sum(weights for _, weights in counts), 0.57) - sum(zeros for zeros, _ in counts)
    smallest = min(x.out_features for block in module.blocks.values() for x in module.linears(block).values())
    assert 0 <= missing < smallest
    for block in module.blocks.values():
        for name, linear in module.linears(block).items():
            assert len(set((linear.weight == 0).sum(1).tolist())) == 1, name


def test_owl_is_that_of_the_dense_model(tiny_model, text_file, tmp_path):
    """Outlier ratios and shares from whole forward passes, written out."""
    directory = tiny_model("qwen2")
    _, data, callback = fit(directory, text_file, tmp_path, sparsity=0.6, allocation=OwlAllocation(3.0, 0.1))
    module, norms = naive_norms(directory, data)
    ratios, sizes = [], []
    for block_name, block in module.blocks.items():
        scores = torch.cat(
            [(x.weight.double().abs() * norms[block_name, name].sqrt()).flatten() for name, x in module.linears(block).items()]
        )
        ratios.append((scores > 3 * scores.mean()).double().mean().item())
        sizes.append(scores.numel())
    assert [record.allocation["outlier_ratio"] for record in callback.records] == pytest.approx(ratios, rel=1e-3)
    expected = owl_sparsities(ratios, sizes, 0.6, 0.1)
    assert [record.allocation["sparsity"] for record in callback.records] == pytest.approx(expected, abs=2e-3)
    assert max(expected) - min(expected) == pytest.approx(0.2)


def test_expected_error_is_that_of_the_masks(tiny_model, text_file, tmp_path):
    """What `error` expects of a block: what it writes, times the mean share of W² ‖X_j‖² that masks of whole matrices take."""
    directory = tiny_model("llama")
    _, data, callback = fit(directory, text_file, tmp_path, sparsity=0.6, allocation="error")
    module, norms = naive_norms(directory, data, unit=True)
    for (block_name, block), record in zip(module.blocks.items(), callback.records, strict=True):
        errors = []
        for name, linear in module.linears(block).items():
            scores = (linear.weight.double().square() * norms[block_name, name]).flatten().sort().values
            errors.append(scores[: round(record.allocation["sparsity"] * len(scores))].sum() / scores.sum())
        written = torch.cat(norms[block_name]).mean().item()
        assert record.allocation["written_share"] == pytest.approx(written, rel=1e-4)
        assert record.allocation["expected_error"] == pytest.approx(written * (sum(errors) / len(errors)).item(), rel=2e-2)


def test_depth_is_linear_and_needs_no_data(tiny_model, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("callbacks.blockwise.quotas._dense_pass", None)
    module, _, callback = fit(tiny_model("llama"), text_file, tmp_path, sparsity=0.6, allocation="depth")
    shares = [zeros / weights for zeros, weights in zeros_of(module)]
    assert shares == pytest.approx([0.7, 0.6, 0.5], abs=2e-3)
    report = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert [block["allocation"] for block in report["blocks"]] == [{"sparsity": share} for share in shares]
    assert report["settings"]["allocation"] == {"class_path": "DepthAllocation", "init_args": {"slope": 0.1}}
    ignored = {"sparsity": 0.6, "ignore": ["*.layers.0.*", "*.layers.2.*"]}
    _, _, callback = fit(tiny_model("llama"), text_file, tmp_path / "one", allocation="depth", **ignored)
    assert [record.allocation.get("sparsity") for record in callback.records] == [None, pytest.approx(0.6, abs=2e-3), None]


def test_everything_says_what_the_quotas_are(tiny_model, text_file, tmp_path, capsys):
    logger = TensorBoardLogger(tmp_path, name="run")
    settings = {"sparsity": 0.6, "allocation": OwlAllocation(2.0)}
    _, _, callback = fit(tiny_model("llama"), text_file, tmp_path, logger, progress=True, **settings)
    shares = [record.allocation["sparsity"] for record in callback.records]
    printed = capsys.readouterr().out
    assert f"target={shares[-1]:.4f}" in printed and f"{min(shares):.2%} to {max(shares):.2%} of a block" in printed
    report = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert [block["allocation"]["sparsity"] for block in report["blocks"]] == shares
    assert report["settings"]["allocation"]["init_args"]["threshold"] == 2.0
    events = EventAccumulator(logger.log_dir).Reload()
    for tag in ("allocation/sparsity", "allocation/outlier_ratio"):
        assert [event.step for event in events.Scalars(tag)] == [0, 1, 2]
    assert [event.value for event in events.Scalars("allocation/sparsity")] == pytest.approx(shares)


def test_uniform_has_no_quotas(tiny_model, text_file, tmp_path):
    _, _, callback = fit(tiny_model("llama"), text_file, tmp_path, sparsity=0.6)
    assert not any(record.allocation for record in callback.records)


@pytest.mark.parametrize("kind", KINDS)
def test_offload_changes_no_bit(kind, tiny_model, text_file, tmp_path):
    found = [
        fit(tiny_model("llama"), text_file, tmp_path / str(offload), sparsity=0.6, allocation=kind, offload=offload)[0]
        for offload in (True, False)
    ]
    pairs = zip(*(module.model.state_dict().values() for module in found), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_bad_numbers_are_named_before_any_weight_moves(tiny_model, text_file, tmp_path):
    class Broken(CausalLM):
        def configure_model(self):
            super().configure_model()
            with torch.no_grad():
                self.blocks["model.layers.1"].get_submodule("input_layernorm").weight[0] = torch.inf

    module = Broken(tiny_model("llama"))
    callback = BlockwisePruning(sparsity=0.6, allocation="owl", output_dir=str(tmp_path / "pruned"))
    data = TextDataModule(tiny_model("llama"), source=text_file, seq_len=24, num_calibration=8, num_heldout=0, batch_size=3)
    trainer = Trainer(
        accelerator="cpu", default_root_dir=tmp_path, callbacks=[callback], logger=False, enable_progress_bar=False
    )
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.q_proj: Argument `inputs` holds NaN or Inf"):
        trainer.fit(module, data)
    assert callback.records == []


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("allocation")
    model, text = tiny(folder)
    data = {"num_calibration": 8, "num_heldout": 4}
    return PruningRun(model, text, str(folder / "pruned"), settings={"sparsity": 0.6}, data=data)


def report_of(run):
    return json.loads((Path(run.output) / "pruning.json").read_text())


@pytest.mark.parametrize(("kind", "solver"), [("owl", "obs"), ("error", "admm"), ("depth", "obs")])
def test_processes_and_resume_give_the_same_bits(kind, solver, tiny_run, tmp_path):
    settings = tiny_run.settings | {"allocation": kind, "solver": solver}
    alone = replace(tiny_run, settings=settings, output=str(tmp_path / "alone"))
    both = replace(alone, processes=2, output=str(tmp_path / "both"))
    killed = replace(alone, output=str(tmp_path / "killed"))
    assert go(alone) == [0] and go(both) == [0, 0] and both.weights == alone.weights
    assert go(killed, {0: Fault("before a file is renamed", 3)})[0] < 0 and len(list(killed.state.glob("*.safetensors"))) == 1
    assert go(killed) == [0] and killed.weights == alone.weights
    quotas = [[block["allocation"] for block in report_of(run)["blocks"]] for run in (alone, both, killed)]
    assert quotas[0] == quotas[1] == quotas[2] and quotas[0][0] != quotas[0][1]


def test_a_resumed_run_reads_its_quotas(tiny_run, tmp_path):
    """They are not computed anew: the statistics of calibration inputs are those of the pruning itself."""
    settings = tiny_run.settings | {"allocation": "owl"}
    run = replace(tiny_run, settings=settings, output=str(tmp_path / "pruned"))
    log = tmp_path / "log"
    assert go(run, {0: Fault("model saved")}, log)[0] < 0 and "one pass of the calibration data" in log.read_text()
    log.unlink()
    assert go(run, log=log) == [0] and "one pass of the calibration data" not in log.read_text()


def test_vision_transformer_with_fused_projections(tmp_path):
    settings = {"sparsity": 0.6, "allocation": "error"}
    runs = [
        VisionRun("", "", str(tmp_path / str(n)), n, settings=settings, data={"num_calibration": 32, "num_heldout": 8})
        for n in (1, 2)
    ]
    for run in runs:
        assert go(run) == [0] * run.processes
        weights = {name: w for name, w in load(run.weights).items() if "blocks" in name and w.ndim == 2}
        numel = sum(w.numel() for w in weights.values())
        assert sum(int((w == 0).sum()) for w in weights.values()) == zeros_wanted(numel, 0.6)
    quotas = [[block["allocation"] for block in report_of(run)["blocks"]] for run in runs]
    assert quotas[0] == quotas[1] and quotas[0][0]["sparsity"] != quotas[0][1]["sparsity"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.95, "allocation": "owl"}, r"`allocation.spread` expected to be at most 0.05 in .* 0.95.*got 0.08"),
        ({"sparsity": 0.05, "allocation": "depth"}, r"`allocation.slope` expected to be at most 0.05 in .* 0.05.*got 0.1"),
        ({"sparsity": 0.7, "allocation": DepthAllocation(-0.4)}, r"`allocation.slope` expected to be at most 0.3 .*got -0.4"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockwisePruning(**arguments)

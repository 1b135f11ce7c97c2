"""Pruning with several processes gives what one gives, or says why not. Real processes on gloo."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load

from callbacks import AttentionRule, Diagnostics, FixedRule, Score
from callbacks.blockwise.exchange import owners_of, processes_of
from callbacks.blockwise.statistics import StatisticsCollector
from lightning_modules.parts.architectures import PrunableLinear
from tests.helpers.launchers import PruningRun, VisionRun, go, quiet_trainer, tiny
from utilities.distributed import Processes

OFFICIAL = {
    "sparsity": 0.5,
    "update_rule": FixedRule("k"),
    "score": Score(activation_norm="official"),
    "diagnostics": Diagnostics(histograms=True),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family -> directory and text."""
    found = {}
    for family in ("llama", "opt"):
        folder = tmp_path_factory.mktemp(family)
        found[family] = tiny(folder, family)
    return found


@pytest.fixture(scope="module")
def one_process(models, tmp_path_factory):
    """The run of one process with the same model and settings."""
    made = {}

    def run_of(run: PruningRun) -> PruningRun:
        key = (run.model, str(run.settings), str(run.data))
        if key not in made:
            made[key] = replace(run, processes=1, nodes=1, output=str(tmp_path_factory.mktemp("one") / "pruned"))
            assert go(made[key]) == [0]
        return made[key]

    return run_of


def report_of(run: PruningRun) -> dict:
    return json.loads((Path(run.output) / "pruning.json").read_text())


JOINT = {"method": "d2_sparsegpt", "solver": "joint", "sparsity": 0.6, "allocation": "error"}


@pytest.mark.parametrize(
    ("family", "processes", "settings", "data"),
    [
        ("llama", 2, {"sparsity": 0.5}, {}),
        ("llama", 3, {"pattern": "2:4", "update_rule": AttentionRule("all", "divergence")}, {}),
        ("llama", 2, {"sparsity": 0.5, "update_rule": "perplexity"}, {"num_calibration": 7, "batch_size": 1}),
        # More windows than the first process has:
        ("llama", 2, {"sparsity": 0.5, "update_rule": AttentionRule(windows=12)}, {"batch_size": 4}),
        ("opt", 2, OFFICIAL, {}),
        ("opt", 4, {"method": "wanda", "sparsity": 0.5, "ignore": ["*.fc2"]}, {"num_calibration": 5, "num_heldout": 4}),
    ],
)
def test_same_result_as_one_process(family, processes, settings, data, models, one_process, tmp_path):
    model, text = models[family]
    run = PruningRun(model, text, str(tmp_path / "pruned"), processes, settings=settings, data=data)
    alone, log = one_process(run), tmp_path / "log"
    assert go(run, log=log) == [0] * processes, log.read_text()[-3000:]
    found, expected = load(run.weights), load(alone.weights)
    kept = [torch.cat([(weights[name] != 0).flatten() for name in expected]) for weights in (found, expected)]
    assert (kept[0] == kept[1]).double().mean() >= 0.9999
    for name, weight in expected.items():
        assert (found[name] - weight).norm() <= 1e-5 * weight.norm(), name
    report, other = report_of(run), report_of(alone)
    assert [block["choice"] for block in report["blocks"]] == [block["choice"] for block in other["blocks"]]
    assert [list(block["linears"]) for block in report["blocks"]] == [list(block["linears"]) for block in other["blocks"]]
    assert report["calibration"] == other["calibration"] and report["processes"] == processes
    for state, metrics in other["metrics"].items():
        for name, value in metrics.items():
            assert report["metrics"][state][name] == pytest.approx(value, rel=1e-6 if state == "dense" else 1e-4)
    for block, same in zip(report["blocks"], other["blocks"], strict=True):
        for name, linear in same["linears"].items():
            assert block["linears"][name]["error"] == pytest.approx(linear["error"], rel=1e-3)
        assert block["attention"].keys() == same["attention"].keys()


@pytest.mark.parametrize(
    "settings",
    [{"sparsity": 0.5}, {"pattern": "2:4", "update_rule": FixedRule("none")}, JOINT, JOINT | {"target": "pruned"}],
)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_same_batches_give_the_same_bits(family, settings, models, one_process, tmp_path):
    """However they are shared out: sums are float64, so that their order leaves no trace in float32."""
    data = {"num_calibration": 8, "batch_size": 2, "num_heldout": 4}
    runs = [PruningRun(*models[family], str(tmp_path / str(n)), n, settings=settings, data=data) for n in (2, 4)]
    alone = one_process(replace(runs[0], processes=1))
    for run in runs:
        assert go(run) == [0] * run.processes
        assert run.weights == alone.weights
    assert [block["candidates"] for block in report_of(runs[0])["blocks"]] == [
        b["candidates"] for b in report_of(alone)["blocks"]
    ]


def test_vision_transformer_with_fused_projections(tmp_path):
    runs = [VisionRun("", "", str(tmp_path / str(processes)), processes) for processes in (1, 2)]
    for run in runs:
        assert go(run) == [0] * run.processes
    alone, both = (load(run.weights) for run in runs)
    assert all(((both[name] != 0) == (weight != 0)).all() for name, weight in alone.items())
    found, expected = (torch.cat([weights[name].flatten() for name in alone]) for weights in (both, alone))
    assert (found - expected).norm() <= 1e-5 * expected.norm()  # of single linears less: random attention gives a poor Hessian
    reports = [report_of(run) for run in runs]
    assert reports[0]["metrics"]["pruned"].keys() == reports[1]["metrics"]["pruned"].keys()
    for name, value in reports[0]["metrics"]["dense"].items():
        assert reports[1]["metrics"]["dense"][name] == pytest.approx(value, rel=0 if "top" in name else 1e-6), name


def test_weighted_class_tokens_give_the_same_bits(tmp_path):
    settings = {"method": "sparsegpt", "solver": "joint", "sparsity": 0.6, "class_token_weight": 16.0, "allocation": "depth"}
    data = {"num_calibration": 32, "num_heldout": 8}
    runs = [VisionRun("", "", str(tmp_path / str(n)), n, settings=settings, data=data) for n in (1, 2)]
    for run in runs:
        assert go(run) == [0] * run.processes
    assert runs[0].weights == runs[1].weights


def test_two_nodes_of_one_process(models, one_process, tmp_path):
    run = PruningRun(*models["llama"], str(tmp_path / "pruned"), processes=2, nodes=2)
    one_node = replace(run, nodes=1, output=str(tmp_path / "one_node"))
    assert go(run) == [0, 0] and go(one_node) == [0, 0] and run.weights == one_node.weights


def test_more_processes_than_windows(models, tmp_path):
    log = tmp_path / "log"
    run = PruningRun(*models["llama"], str(tmp_path / "pruned"), processes=3, data={"num_calibration": 2})
    assert go(run, log=log) == [1, 1, 1] and run.weights is None
    assert "`num_calibration` gives 2 samples, but 3 processes expected at least one each" in log.read_text()


@dataclass(frozen=True)
class OneFails(PruningRun):
    """One of the processes cannot solve a block."""

    rank: int = 1

    def work(self):
        import os

        import callbacks.blockwise.block_solver

        original, calls = callbacks.blockwise.block_solver.solve, []

        def solve(*args):
            calls.append(args)
            if int(os.environ["RANK"]) == self.rank and len(calls) == 3:
                raise ValueError("this Hessian is not to my taste")
            return original(*args)

        callbacks.blockwise.block_solver.solve = solve
        super().work()


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_fails_and_all_say_why(rank, models, tmp_path):
    log = tmp_path / "log"
    run = OneFails(*models["llama"], str(tmp_path / "pruned"), processes=2, rank=rank)
    assert go(run, log=log) == [1, 1]
    printed = log.read_text()
    assert f"Process {rank} of 2 failed, so this one stops too: ValueError: this Hessian is not to my taste" in printed
    assert run.weights is None


@dataclass(frozen=True)
class OtherWeights(PruningRun):
    """The processes start from other weights."""

    def work(self):
        import os

        from lightning_modules.causal_lm import CausalLM

        original = CausalLM.configure_model

        def changed(module):
            original(module)
            with torch.no_grad():
                next(module.model.parameters()).add_(float(os.environ["RANK"]))

        CausalLM.configure_model = changed
        super().work()


def test_processes_that_start_from_other_weights_are_found_out(models, tmp_path):
    log = tmp_path / "log"
    assert go(OtherWeights(*models["llama"], str(tmp_path / "pruned"), processes=2), log=log) == [1, 1]
    assert "The model: processes 1 of 2 hold other bits than process 0" in log.read_text()


@dataclass(frozen=True)
class Repeating(PruningRun):
    """The user's own dataloader, which Lightning shares out with repetition."""

    def work(self):
        from callbacks import BlockwisePruning
        from datamodules import TextDataModule
        from lightning_modules import CausalLM

        data = TextDataModule(self.model, source=self.text, seq_len=16, num_calibration=13, num_heldout=0)
        data.setup("fit")
        trainer = quiet_trainer(self, Path(self.output).parent, callbacks=[BlockwisePruning(**self.settings)])
        trainer.fit(CausalLM(self.model), data.train_dataloader())


def test_samples_that_reach_two_processes_are_refused(models, tmp_path):
    log = tmp_path / "log"
    assert go(Repeating(*models["llama"], str(tmp_path / "pruned"), processes=2), log=log) == [1, 1]
    assert "Some calibration samples reach several processes" in log.read_text()


@dataclass(frozen=True)
class Validation:
    """`validate` of a language model or of an image classifier."""

    model: str
    text: str
    output: str
    processes: int = 1
    nodes: int = 1
    stage: str = "validate"

    def work(self):
        from datamodules import ImageDataModule, TextDataModule
        from lightning_modules import CausalLM, ImageClassifier

        if self.model == "vit":
            sizes = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
            module = ImageClassifier("deit_tiny_patch16_224", model_args=sizes)
            data = ImageDataModule("digits", batch_size=50, num_heldout=37, crop_pct=1.0)
        else:
            module = CausalLM(self.model)
            data = TextDataModule(
                self.model, source=self.text, test_source=self.text, seq_len=16, num_calibration=1, num_heldout=7, batch_size=2
            )
        trainer = quiet_trainer(self, Path(self.output).parent)
        (metrics, *more) = getattr(trainer, self.stage)(module, datamodule=data, verbose=False)
        if trainer.is_global_zero:
            Path(self.output).write_text(json.dumps([metrics, *more]))


@pytest.mark.parametrize(("model", "stage"), [("llama", "validate"), ("llama", "test"), ("vit", "validate")])
def test_validation_of_several_processes_is_that_of_one(model, stage, models, tmp_path):
    directory, text = models.get(model, (model, ""))
    values = {}
    for processes in (1, 2, 3):
        output = tmp_path / f"{processes}.json"
        assert go(Validation(directory, text, str(output), processes, stage=stage)) == [0] * processes
        values[processes] = {name: value for part in json.loads(output.read_text()) for name, value in part.items()}
    assert values[1].keys() == values[2].keys() == values[3].keys() and len(values[1]) >= 2
    for name, value in values[1].items():
        tolerance = 0 if "accuracy" in name or "top" in name else 1e-6
        assert values[2][name] == pytest.approx(value, rel=tolerance) and values[3][name] == pytest.approx(value, rel=tolerance)


def test_owners_share_the_work():
    sizes = {"q": (64, 64), "k": (64, 32), "v": (64, 32), "o": (64, 64), "gate": (64, 256), "up": (64, 256), "down": (256, 64)}
    linears = {name: PrunableLinear(torch.nn.Linear(*size), slice(0, size[1])) for name, size in sizes.items()}
    collector = StatisticsCollector(linears)
    x, wide = torch.randn(2, 3, 64), torch.randn(2, 3, 256)
    with collector.collecting(torch.tensor([0, 1])):
        for name, linear in linears.items():
            linear.module({"o": x * 2, "gate": (y := x + 1), "up": y if name == "up" else x, "down": wide}.get(name, x))
    groups = collector.siblings()
    assert {leader: names for leader, names in groups.items()} != {}
    owners = owners_of(collector, 2)
    assert owners["q"] == owners["k"] == owners["v"] and owners["down"] == 0  # most work, so first, to the first
    assert {owners[name] for name in ("q", "o", "gate")} == {1}  # all the rest together is less
    pinned = owners_of(collector, 2, first=["k"])
    assert pinned["q"] == pinned["k"] == pinned["v"] == 0 and pinned["down"] == 1
    assert set(owners_of(collector, 1).values()) == {0}


def test_one_process_has_nothing_to_tell():
    alone = Processes()
    assert alone.is_first and alone.gather(3) == [3] and alone.from_first("x") == "x"
    tensor = torch.ones(2)
    assert alone.send(tensor, 0) is tensor
    with pytest.raises(KeyError):
        alone.together(lambda: {}["missing"])


def test_other_strategies_are_refused():
    trainer = Trainer(accelerator="cpu", strategy="ddp_find_unused_parameters_true", devices=2, logger=False)
    assert processes_of(trainer).size == 2
    trainer.strategy.__class__ = type("FSDPStrategy", (trainer.strategy.__class__,), {})
    with pytest.raises(
        ValueError, match=r"`trainer.strategy` expected auto .* or ddp with BlockwisePruning,.* got FSDPStrategy"
    ):
        processes_of(trainer)

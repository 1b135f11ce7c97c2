"""Wrong configurations, each as a user would write it, and what the user is told before anything is written or a weight moves.

A message names the argument, what it got, and what it accepts or what to do next.
"""

import hashlib
import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

import lightning_modules
from tests.helpers.tiny import make_tokenizer, make_unprunable, tiny_config
from train import main
from utilities.failures import failures_in_one_sentence

ROOT = Path(__file__).parents[1]
LINES = 3
"""Of everything that is printed, what was loaded before included."""
VIT = {"img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 10}
PRUNE = "--trainer.callbacks."
NO_CALLBACKS = ["--trainer.callbacks", "null"]
OUTLIER, OBS = [PRUNE + "update_rule", "OutlierRule"], [PRUNE + "solver", "ObsSolver"]
ATTENTION = [PRUNE + "update_rule", "AttentionRule"]
DIVERGENCE = [*ATTENTION, PRUNE + "update_rule.objective", "divergence"]
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI.s args", "ignore:.*Jsonargparse", "ignore:.*is deprecated")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the user has: two models, broken ones, text, a folder and a file of other things."""
    import transformers

    work = tmp_path_factory.mktemp("user")
    for family in ("opt", "llama"):
        transformers.AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(work / family)
        make_tokenizer(family).save_pretrained(work / family)
    (work / "words.txt").write_text(" ".join(f"w{i % 90 + 2}" for i in range(4000)))
    shutil.copytree(work / "llama", work / "unknown")
    (work / "unknown/config.json").write_text(json.dumps({"model_type": "nosuch"}))
    make_unprunable().save_pretrained(work / "rwkv")
    for name in ("no_weights", "cut"):
        shutil.copytree(work / "llama", work / name)
    (work / "no_weights/model.safetensors").unlink()
    weights = work / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (work / "no_tokenizer").mkdir()
    shutil.copy(work / "llama/config.json", work / "no_tokenizer")
    (work / "theirs").mkdir()
    (work / "theirs/thesis.txt").write_text("a year's work")
    (work / "file").write_text("not a directory")
    (work / "bad.ckpt").write_text("not a checkpoint")
    for name, content in configs().items():
        (work / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return work


def configs():
    """The shipped configs, small, without logs."""
    names = {"llama": "published", "graph": "csg2l/karate", "vit": "deit/digits", "prune_vit": "deit/prune_digits"}
    found = {name: yaml.safe_load((ROOT / f"configs/{path}.yaml").read_text()) for name, path in names.items()}
    for name, content in found.items():
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        quiet["default_root_dir"] = "run"
        content["trainer"] |= quiet | {"max_epochs": 1}
        if name in ("graph", "vit"):
            content["trainer"]["callbacks"] = []
    text = {"source": "words.txt", "seq_len": 24, "num_calibration": 8, "num_heldout": 4}
    found["llama"]["data"]["init_args"] |= text
    found["llama"]["model"]["init_args"]["model_name_or_path"] = "./llama"
    found["opt"] = yaml.safe_load(yaml.safe_dump(found["llama"]))
    found["opt"]["model"]["init_args"]["model_name_or_path"] = "./opt"
    found["unquoted"] = yaml.safe_load(yaml.safe_dump(found["llama"]))
    (pruning,) = (part for part in found["unquoted"]["trainer"]["callbacks"] if part["class_path"].endswith("BlockwisePruning"))
    pruning["init_args"] |= {"sparsity": None, "pattern": yaml.safe_load("2:4")}
    found["vit"]["model"]["init_args"]["model_args"] = VIT
    found["prune_vit"]["model"]["init_args"] |= {"model_name_or_path": "deit_tiny_patch16_224", "model_args": VIT}
    found["prune_vit"]["trainer"]["callbacks"] = found["prune_vit"]["trainer"]["callbacks"][-1:]
    return found


PRUNING = [
    ("llama", [PRUNE + "sparsity", "1.5"], r"`sparsity` expected to be a share of zeros in \[0, 1\) but got 1.5"),
    ("llama", [PRUNE + "sparsity", "half"], "`trainer.callbacks.sparsity` expected a number or null but got 'half'"),
    (
        "unquoted",
        [],
        "`trainer.callbacks.pattern` expected a text or null but got '124'. Write \"2:4\" in quotes if this was meant",
    ),
    ("predict llama", ["--model.compressed", "124"], "2:4, unstructured but got '124'. Write \"2:4\" in quotes if this"),
    ("predict llama", ["--model.compressed", "123"], r"2:4, unstructured but got '123'\.$"),
    ("llama", [PRUNE + "pattern", "2:4"], "Arguments `sparsity`.* and `pattern`.*got sparsity=0.5 and pattern='2:4'"),
    ("llama", [PRUNE + "sparsity", "null"], "Arguments `sparsity`.* and `pattern`.*got sparsity=None and pattern=None"),
    (
        "llama",
        [PRUNE + "sparsity", "null", PRUNE + "pattern", "4:2"],
        "`pattern` expected to be N:M.*such as '2:4', but got '4:2'",
    ),
    (
        "llama",
        [PRUNE + "sparsity", "null", PRUNE + "pattern", "3:7"],
        "q_proj: Argument `pattern`: 3:7 needs .*groups of 7, but in_features is 32. Choose an M that divides it",
    ),
    (
        "llama",
        [PRUNE + "method", "sparse"],
        "`trainer.callbacks.method` expected one of d2prune, magnitude, .* but got 'sparse'",
    ),
    (
        "llama",
        [PRUNE + "method", "wanda", PRUNE + "update_rule", "outlier"],
        "`update_rule` belongs to method d2prune, but `method` is 'wanda'. Leave",
    ),
    (
        "llama",
        [PRUNE + "class_token_weight", "16"],
        "`class_token_weight` = 16 needs a model with class tokens, but LlamaForCausalLM has none. Leave it out, or set it to",
    ),
    ("prune_vit", [PRUNE + "class_token_weight", ".inf"], "`class_token_weight` expected to be a positive number but got inf"),
    (
        "llama",
        [PRUNE + "allocation", "DepthAllocation", PRUNE + "allocation.slope", "-0.6"],
        "`allocation.slope` expected to be at most 0.5 in magnitude at a sparsity of 0.5.*got -0.6",
    ),
    (
        "llama",
        [PRUNE + "non_updated", "q"],
        r"`trainer.callbacks.non_updated` has moved: .*update_rule.held \(FixedRule\)` now",
    ),
    ("llama", [*OUTLIER, PRUNE + "update_rule.held", "q"], "`trainer.callbacks.update_rule.held` belongs to FixedRule: give"),
    ("llama", [*OBS, PRUNE + "solver.damping", "3"], r"`damping` expected to be in \[0, 1\] but got 3.0"),
    ("llama", [*OBS, PRUNE + "solver.block_size", "0"], "`block_size` expected to be an integer of at least 1 but got 0"),
    ("llama", [PRUNE + "scale", "-1"], "`trainer.callbacks.scale` has moved: it is `trainer.callbacks.score.scale` now"),
    ("llama", [PRUNE + "score.scale", "-1"], "`scale` expected to be auto or a positive number but got -1"),
    ("llama", [PRUNE + "score.lambda1", ".nan"], "`score.lambda1` expected to be a finite number but got nan"),
    ("llama", [PRUNE + "score.lambda2", ".inf"], "`score.lambda2` expected to be a finite number but got inf"),
    ("llama", [*DIVERGENCE, PRUNE + "update_rule.rho", "-1"], "`rho` expected to be a number of at least 0 but got -1"),
    ("llama", [*ATTENTION, PRUNE + "update_rule.windows", "0"], "`windows` expected to be an integer of at least 1 but got 0"),
    (
        "llama",
        [PRUNE + "diagnostics.attention_maps", "[9]"],
        r"`diagnostics.attention_maps` expected to name some of 3 blocks but got \[9\]",
    ),
    (
        "llama",
        [PRUNE + "ignore", "[head]"],
        "`ignore`: 'head' matches no linear. Names look like 'model.layers.0.self_attn.q_proj'",
    ),
    (
        "llama",
        ["--model.sparse24", "true"],
        r"`model.sparse24` has moved: it is `model.compressed \(2:4 in place of true\)` now",
    ),
    ("llama", ["--model.compressed", "3:4"], "`model.compressed` expected one of none, auto, 2:4, unstructured but got '3:4'"),
    ("llama", [PRUNE + "ignore", "['*']"], r"`ignore` = \['\*'\] leaves no linear to prune"),
    (
        "llama",
        [*ATTENTION, PRUNE + "update_rule.source", "nowhere.txt"],
        "`update_rule.source`: .*'nowhere.txt' does not exist.*Accepted are",
    ),
    ("llama", [PRUNE + "output_dir", "theirs"], "`output_dir` = '.*theirs' exists and holds no pruning.json.*Choose another"),
    ("llama", [PRUNE + "output_dir", "file/x"], r"`output_dir` = '.*file/x' cannot be written \(File exists\). Choose another"),
    ("llama", [PRUNE + "output_dir", "/proc/x"], r"`output_dir` = '/proc/x' cannot be written .*make '/proc' writable"),
    (
        "llama",
        [PRUNE + "push_to_hub", "models/me/pruned"],
        "`push_to_hub` expected owner/name of a repository .* but got 'models/me/pruned'. Correct it",
    ),
    ("llama", [PRUNE + "push_to_hub", "pruned"], "`push_to_hub` expected owner/name .* but got 'pruned'. Correct it"),
    (
        "llama",
        [PRUNE + "push_to_hub", "me/pruned"],
        "`push_to_hub` = 'me/pruned' needs the hub, but HF_HUB_OFFLINE is set. Unset",
    ),
    (
        "llama",
        ["--model.model_name_or_path", "./rwkv", "--data.tokenizer", "./llama"],
        "'rwkv' is not in ARCHITECTURES, and could not be discovered: 'rwkv.blocks' .*Add an entry to",
    ),
    ("llama", ["--trainer.limit_train_batches", "0"], "limit_train_batches=0"),
    (
        "llama",
        ["--trainer.accumulate_grad_batches", "2"],
        "`trainer.accumulate_grad_batches` = 2 belongs to training.*Leave it out",
    ),
    (
        "graph",
        ["--trainer.callbacks", "callbacks.BlockwisePruning", PRUNE + "sparsity", "0.5"],
        "needs a PrunableModule such as",
    ),
    (
        "prune_vit",
        ["--data.num_heldout", "0"],
        r"`update_rule` = perplexity chooses by heldout/loss on held-out data, but there is none. Hold some",
    ),
    ("prune_vit", ["--data.num_calibration", "9999"], "`num_calibration` = 9999 .* expected at most 1438 images.*lower one"),
]
TEXT_AND_LANGUAGE = [
    ("llama", ["--data.seq_len", "1"], "`seq_len` expected to be an integer of at least 2 but got 1"),
    ("llama", ["--data.batch_size", "0"], "`batch_size` expected to be an integer of at least 1 but got 0"),
    ("llama", ["--data.num_calibration", "0"], "`num_calibration` expected to be an integer of at least 1 but got 0"),
    ("llama", ["--data.num_workers", "-1"], "`num_workers` expected to be an integer of at least 0 but got -1"),
    ("llama", ["--data.sampling", "documents"], "`data.sampling` expected one of joined, document but got 'documents'"),
    (
        "llama",
        ["--data.sampling", "document", *NO_CALLBACKS],
        "`sampling` is 'document', but 1 documents are too few.*Give more",
    ),
    ("llama", ["--data.source", "nowhere.txt"], r"'nowhere.txt' does not exist[\s\S]*Accepted are[\s\S]*<file>"),
    ("validate llama", ["--model.model_name_or_path", "./nowhere"], "'./nowhere' is not an existing directory. Give a hub id"),
    (
        "llama",
        ["--data.seq_len", "2000", *NO_CALLBACKS],
        "`source` expected at least 10000 tokens, .* but got 4000; give more text",
    ),
    ("llama", ["--data.tokenizer", "./nowhere", *NO_CALLBACKS], "'./nowhere' is not an existing directory. Give a hub id"),
    (
        "validate llama",
        ["--model.model_name_or_path", "./no_tokenizer", *NO_CALLBACKS],
        "`tokenizer`: the directory './no_tokenizer' holds no tokenizer",
    ),
    ("validate llama", ["--data.num_heldout", "0", *NO_CALLBACKS], "`num_heldout` is 0: .*Set it to 1 or more"),
    ("test llama", ["--data.test_source", "nowhere.txt", *NO_CALLBACKS], r"'nowhere.txt' does not exist[\s\S]*Accepted are"),
    (
        "opt",
        ["--data.seq_len", "100"],
        r"`seq_len` expected to be at most 64, the positions that ./opt has learned, but got 100",
    ),
    ("predict opt", NO_CALLBACKS, r"`seq_len` / 2 \+ `max_new_tokens` expected to be at most 64.* got 76. Lower data.seq_len"),
    ("llama", ["--model.learning_rate", "-1"], "`learning_rate` expected to be at least 0 but got -1"),
    ("predict llama", ["--model.max_new_tokens", "0"], "`max_new_tokens` expected to be at least 1 but got 0"),
    ("llama", ["--model.dtype", "int8"], "`model.dtype` expected one of auto, float32, bfloat16, float16 but got 'int8'"),
    (
        "validate llama",
        ["--model.attn_implementation", "flash", *NO_CALLBACKS],
        r"attn_implementation=.flash.. is not supported[\s\S]*eager",
    ),
    ("validate llama", ["--model.model_name_or_path", "a.gguf", *NO_CALLBACKS], "'a.gguf': there is no file.*Give an existing"),
    (
        "validate llama",
        ["--model.model_name_or_path", "package://nothing/a.gguf", *NO_CALLBACKS],
        "no installed Python package 'nothing'. Install it",
    ),
    *(
        ("validate llama", ["--model.model_name_or_path", path, "--data.tokenizer", "./llama", *NO_CALLBACKS], message)
        for path, message in (
            (
                "nowhere/model",
                r"`model_name_or_path`: no model could be loaded from 'nowhere/model'[\s\S]*a connection or a filled",
            ),
            ("./theirs", r"`model_name_or_path`: no model could be loaded from './theirs'[\s\S]*Give a hub id"),
            ("./unknown", r"`model_name_or_path`: .* from './unknown'[\s\S]*`nosuch`[\s\S]*Give a hub id"),
            (
                "./no_weights",
                r"`model_name_or_path`: .* from './no_weights'[\s\S]*no file named model.safetensors[\s\S]*weights",
            ),
            ("./cut", r"`model_name_or_path`: .* from './cut'[\s\S]*header[\s\S]*weights"),
        )
    ),
]
GRAPHS = [
    *(
        ("graph", [f"--model.{name}", value], message)
        for name, value, message in (
            ("view.mix", "3", r"`view.mix` expected to be in \[0, 1\] but got 3"),
            ("view.rank", "0", "`view.rank` expected to be an integer of at least 1 but got 0"),
            ("view.diffusion_steps", "2", "`view.diffusion_steps` belongs to base diffused, .* is 'regularized'. Leave it out"),
            ("view.edges", "0.1", "`model.view.edges` belongs to DropView: give `--model.view DropView` before it"),
            ("contrast.temperature", "0", "`contrast.temperature` expected to be above 0 but got 0"),
            ("contrast.beta", "-1", "`contrast.beta` expected to be at least 0 and finite but got -1"),
            ("contrast", "{weight: 0, form: hsan}", "`contrast.form` expected a `contrast.weight` above 0, .*Leave it out, or"),
            (
                "contrast",
                "{beta: 0, reweight: positives}",
                "`contrast.reweight` = 'positives' expected a `contrast.beta`",
            ),
            ("contrast.form", "hsam", "`model.contrast.form` expected one of hsan, negatives, multi_positive but got 'hsam'"),
            ("pseudo_labels", "clustered", "`pseudo_labels` expected predicted with `supervised` = True but got clustered. L"),
            ("rank", "5", r"`model.rank` has moved: it is `model.view.rank \(SvdView\)` now"),
            ("drop_edges", "0.1", r"`model.drop_edges` has moved: it is `model.view.edges \(DropView\)` now"),
            ("contrast_weight", "1", "`model.contrast_weight` has moved: it is `model.contrast.weight` now"),
            (
                "pseudo_weight",
                "1",
                r"`model.pseudo_weight` has moved: it is .*pseudo_labels.weight \(PredictedLabels\)` now",
            ),
            (
                "cluster_every",
                "2",
                r"`model.cluster_every` has moved: it is .*pseudo_labels.every \(ClusteredLabels\)` now",
            ),
            ("dropout", "2", r"`dropout` expected to be in \[0, 1\] but got 2"),
            ("num_layers", "1", "`num_layers` expected to be an integer of at least 2 but got 1"),
            ("learning_rate", "-1", "`learning_rate` expected to be at least 0 and finite but got -1"),
            ("weight_decay", ".nan", "`weight_decay` expected to be at least 0 and finite but got nan"),
            ("view", "svg", "`model.view` expected one of svd, knn, drop or the path of a class but got 'svg'"),
            ("supervised", "maybe", "`model.supervised` expected true or false but got 'maybe'"),
            ("encoder", "gcnn", "`encoder` expected to be one of gcn, gat.* or a class's path, but got 'gcnn'"),
            ("encoder", "torch.nn.No", "`encoder` expected to be one of gcn, gat.* but got 'torch.nn.No'.*no attribute 'No'"),
            ("encoder_args", "{headz: 3}", "`encoder_args` expected .*'gcn' but got {'headz': 3}.*Leave out"),
        )
    ),
    (
        "graph",
        ["--model.supervised", "false", "--model.fusion", "concat"],
        "`fusion` = 'concat' joins the logits of both views, but .*there are none. Leave it out",
    ),
    (
        "graph",
        ["--model.supervised", "false", "--model.contrast.weight", "0"],
        "`contrast.weight` expected to be above 0 with `supervised` = False but got 0.*Raise it",
    ),
    (
        "graph",
        ["--model.pseudo_labels", "PredictedLabels", "--model.pseudo_labels.beta", ".inf"],
        "`pseudo_labels.beta` expected to be finite but got inf; 0 weighs all nodes alike",
    ),
    (
        "graph",
        ["--model.pseudo_labels", "PredictedLabels", "--model.pseudo_labels.every", "2"],
        "`model.pseudo_labels.every` belongs to ClusteredLabels: give `--model.pseudo_labels ClusteredLabels` before it",
    ),
    (
        "graph",
        ["--model", "lightning_modules.NodeClassifier", "--model.local_view", "PurifiedView", "--model.local_view.rank", "0"],
        "`local_view.rank` expected to be an integer of at least 1 but got 0",
    ),
    *(
        ("graph", [f"--data.{name}", value], message)
        for name, value, message in (
            ("source", "coraa", "`source` expected to be digits, wine.* but got 'coraa'; choose one"),
            ("source", "nowhere.npz", "`source` expected a .npz file with .* but got 'nowhere.npz'.*check it"),
            ("num_val", "1000", "`num_val` = 1000 .*expected to need at most 30 nodes.*lower it"),
            ("labels_per_class", "500", "`labels_per_class` expected to be at most 1, .* but got 500; lower it"),
            ("fold", "3", "`fold` expected to be below 1, .* but got 3; lower it"),
            ("edge_noise", "100", "`edge_noise` expected to add at most 483 edges.*use at most 6.192"),
            ("edge_attack", "random", "`data.edge_attack` expected one of dice, prbcd or null but got 'random'"),
            (
                "attack_share",
                "0.1",
                "`attack_share` belongs to an attack, but `edge_attack` is null. Leave it out, or give one",
            ),
            ("attack_surrogate", "gcn", "`attack_surrogate` belongs to edge_attack prbcd, but `edge_attack` is null. Leave"),
            (
                "drop_dissimilar",
                "0",
                "`drop_dissimilar` expected features that are words, but those of karate are not; leave",
            ),
            ("fanout", "[]", r"`fanout` expected to be a list of integers but got \[\]; give one for each hop"),
            ("batch_size", "0", "`batch_size` expected to be an integer of at least 1 but got 0; null takes the whole graph"),
        )
    ),
    (
        "graph",
        ["--data.edge_attack", "dice", "--data.attack_share", "20"],
        r"`attack_share` expected to delete at most \d+ edges within classes and add at most \d+ .*; lower it",
    ),
    (
        "graph",
        ["--trainer.callbacks", "callbacks.GraphMonitor", PRUNE + "every_n_epochs", "0"],
        "`every_n_epochs` expected to be at",
    ),
    (
        "graph",
        ["--trainer.callbacks", "EMAWeightAveraging"],
        "`trainer.callbacks` expected AverageWeights for a graph module but got EMAWeightAveraging, .*Give callbacks.Aver",
    ),
    (
        "graph",
        ["--trainer.callbacks", "callbacks.SaveModel"],
        "SaveModel needs a module with a `save`, such as CausalLM, but got",
    ),
    ("graph", ["--data", "datamodules.TextDataModule"], "`tokenizer` is null, and the model names none. Give a hub id"),
]
IMAGES = [
    ("vit", ["--model.model_name_or_path", "deit_tinny"], "`model_name_or_path` = 'deit_tinny' is neither .*Near: deit"),
    ("vit", ["--model.model_name_or_path", "./nowhere"], "'./nowhere' is not an existing directory. Give a name of timm"),
    ("vit", ["--model.checkpoint", "w.pth"], "`checkpoint` expected to be an existing .safetensors file but got 'w.pth'"),
    ("vit", ["--model.model_args", "{colour: 1}"], "`model_args` = {'colour': 1}: .*'colour'"),
    ("vit", ["--model.warmup", "1"], r"`warmup` expected to be in \[0, 1\) but got 1"),
    ("vit", ["--model.weight_decay", "-1"], "`weight_decay` expected to be at least 0 but got -1"),
    ("vit", ["--model.mixup", "-1"], "`mixup` expected to be at least 0 but got -1"),
    ("vit", ["--data.root", "nowhere"], "`root` expected digits, a folder .* but got 'nowhere', which does not exist; check"),
    (
        "vit",
        ["--data.image_size", "9"],
        "`image_size` expected to be 8, that of deit_tiny_patch16_224, but got 9. Leave it out",
    ),
    ("vit", ["--data.crop_pct", "2"], r"`crop_pct` expected to be in \(0, 1\] but got 2"),
    ("vit", ["--data.mean", "[1, 2]"], r"`mean` expected a number for R, G and B but got \[1.0, 2.0\]; null takes the model's"),
    ("vit", ["--data.classes", "nowhere.txt"], "`classes` expected imagenet, or a text file .* but got 'nowhere.txt'.*check"),
    ("vit", ["--data.augmentation", "{flip: 1}"], "`augmentation` expected arguments of .* got 'flip'; accepted are .*hflip"),
    ("vit", ["--data.on_corrupt", "drop"], "`data.on_corrupt` expected one of error, skip but got 'drop'"),
    (
        "vit",
        ["--model.model_args", json.dumps(VIT | {"num_classes": 7})],
        "`classes` is null, .*10 of 'digits', but the model has 7.*Give data.classes",
    ),
    (
        "vit",
        ["--trainer.callbacks", "callbacks.SaveModel", PRUNE + "output_dir", "file"],
        "`output_dir` = 'file' is a file. Give a",
    ),
    (
        "vit",
        ["--trainer.callbacks", "callbacks.SaveModel", PRUNE + "output_dir", "/proc/x"],
        "`output_dir` = '/proc/x' cannot be",
    ),
]
COMMAND_LINE = [
    (
        "llama",
        [PRUNE + "sparsty", "0.5"],
        "Unknown setting `trainer.callbacks.sparsty` of BlockwisePruning. Did you mean `sparsity`",
    ),
    ("llama", ["--model.model_name", "x"], "Unknown setting `model.model_name` of CausalLM. Did you mean `model_name_or_path`"),
    ("llama", ["--data.seqlen", "24"], "Unknown setting `data.seqlen` of TextDataModule. Did you mean `seq_len`"),
    ("llama", ["--trainer.epochs", "24"], "Unknown setting `--trainer.epochs`. Did you mean `--trainer.m.._epochs`"),
    (
        "llama",
        ["--model", "lightning_modules.CausalLLM"],
        "`model`: lightning_modules has no 'CausalLLM'. Did you mean `CausalLM`",
    ),
    ("llama", ["--data", "datamodules.TextData"], "`data`: datamodules has no 'TextData'. Did you mean `TextDataModule`"),
    ("llama", ["--trainer.callbacks", "callbacks.Blockwise"], "callbacks has no 'Blockwise'. Did you mean `BlockwisePruning`"),
    ("llama", ["--config", "nowhere.yaml"], "The config file '.*nowhere.yaml' does not exist. Check its path"),
    ("train llama", [], r"invalid choice: 'train' \(choose from '?fit"),
    ("graph", ["--trainer.max_epochs", "-5"], "`max_epochs` must be a non-negative integer or -1. You passed in -5"),
    ("graph", ["--trainer.accelerator", "gpuu"], "`accelerator='gpuu'`. Available names are: .*cpu"),
    ("graph", ["--trainer.strategy", "ddpp"], "`strategy='ddpp'`.*Example choices: auto, ddp"),
    ("graph", ["--trainer.precision", "8"], "`trainer.precision` expected one of .*bf16-true.* but got '8'"),
    ("graph", ["--trainer.devices", "0"], r"devices='0'\)` value is not a valid input using cpu"),
    ("test graph", ["--ckpt_path", "nowhere.ckpt"], "Checkpoint file not found: nowhere.ckpt"),
    (
        "test graph",
        ["--ckpt_path", "bad.ckpt"],
        "`ckpt_path` expected a checkpoint of Lightning but 'bad.ckpt' could not be read",
    ),
]
ALL = [*PRUNING, *TEXT_AND_LANGUAGE, *GRAPHS, *IMAGES, *COMMAND_LINE]


def snapshot(folder):
    """All but the folder of the run, which holds the config that any run writes."""
    return {
        path: path.is_dir() or hashlib.sha256(path.read_bytes()).digest()
        for path in folder.rglob("*")
        if path.relative_to(folder).parts[0] != "run"
    }


@pytest.fixture
def made(monkeypatch):
    """Every module that was made, with the weights that it had then."""
    found = []
    for name in ("CausalLM", "ImageClassifier", "CSG2L"):
        cls = getattr(lightning_modules, name)

        def configure(module, original=cls.configure_model):
            original(module)
            found.append((module, {key: value.clone() for key, value in module.state_dict().items()}))

        monkeypatch.setattr(cls, "configure_model", configure)
    return found


@pytest.mark.parametrize(("config", "arguments", "message"), ALL, ids=[" ".join([row[0], *row[1]])[:90] for row in ALL])
def test_what_a_user_is_told(config, arguments, message, folder, made, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    shutil.rmtree("run", ignore_errors=True)
    before = snapshot(folder)
    command, _, name = config.rpartition(" ")
    with pytest.raises(SystemExit) as ended, failures_in_one_sentence():
        main([command or "fit", "--config", f"{name}.yaml", *arguments])
    printed = "".join(capfd.readouterr())
    assert ended.value.code in (1, 2) and re.search(message, printed), printed
    assert len(printed.strip().split("\n")) <= LINES, printed  # a progress bar rewrites its line
    assert snapshot(folder) == before
    assert not [path for path in (folder / "run").rglob("*") if path.suffix in (".safetensors", ".ckpt")]
    for module, weights in made:
        assert all(torch.equal(value, weights[key]) for key, value in module.state_dict().items())


def test_rotary_models_may_see_more_than_they_were_trained_with(folder, monkeypatch):
    """Only a warning, and none where the rotation is stretched."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    arguments = ["validate", "--config", "llama.yaml", "--data.seq_len", "100", *NO_CALLBACKS]
    with pytest.warns(UserWarning, match="`seq_len` = 100 is more than the 64 positions with which ./llama was trained"):
        main(arguments)
    shutil.copytree("llama", "stretched", dirs_exist_ok=True)
    content = json.loads(Path("stretched/config.json").read_text())
    content["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    Path("stretched/config.json").write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*positions with which")
        main([*arguments, "--model.model_name_or_path", "./stretched"])

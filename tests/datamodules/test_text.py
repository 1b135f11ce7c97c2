"""TextDataModule: what is held out stays out, draws depend on the seed alone, a stage prepares what it needs.

The tokenizer is a small byte-level BPE trained here on the standard library's documentation; nothing is downloaded.
Documents carry marks such as <17>, so that a decoded window tells which documents it was cut from.
"""

import json
import re
import sys
from collections import Counter

import pytest
import torch
import yaml
from lightning import LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.cli import LightningCLI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from datamodules import TextDataModule, text
from datamodules.text import load_tokenizer
from datamodules.text_sources import read_pydoc
from tests.helpers.tiny import quiet


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    """A tokenizer that prepends <s> unless told not to, with a maximum length that every stream exceeds."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(read_pydoc(), trainer)
    path = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", add_bos_token=True, model_max_length=100)
    fast.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path):
    return AutoTokenizer.from_pretrained(tokenizer_path)


@pytest.fixture
def make(tokenizer_path):
    """A data module with small numbers."""

    def make(**options):
        defaults = {"seq_len": 16, "num_calibration": 12, "num_heldout": 3, "batch_size": 5, "seed": 1}
        return TextDataModule(**{"tokenizer": tokenizer_path, **defaults, **options})

    return make


@pytest.fixture
def marked(tmp_path):
    """A function that writes documents, document i being a number of times its mark, and returns the path."""

    def write(lengths):
        path = tmp_path / "marked.jsonl"
        path.write_text("".join(json.dumps({"text": f"<{i}> " * n}) + "\n" for i, n in enumerate(lengths)))
        return str(path)

    return write


def windows_of(loader):
    batches = list(loader)
    assert torch.equal(torch.cat([batch["index"] for batch in batches]), torch.arange(len(loader.dataset)))
    return torch.cat([batch["input_ids"] for batch in batches])


def marks(tokenizer, windows):
    return {int(mark) for window in windows for mark in re.findall(r"<(\d+)>", tokenizer.decode(window))}


# The split


def test_no_document_is_in_both_parts(make, marked, tokenizer):
    data = make(source=marked([20] * 40), num_calibration=400, num_heldout=12)
    data.setup("fit")
    calibration = marks(tokenizer, windows_of(data.train_dataloader()))
    heldout = marks(tokenizer, windows_of(data.val_dataloader()))
    assert not calibration & heldout
    assert len(heldout) >= 2 and len(calibration | heldout) > 35
    assert heldout != set(range(40 - len(heldout), 40))  # shuffled, not the last ones of the file


@pytest.mark.parametrize("name", ["one.txt", "nine.jsonl", "rows.jsonl"])
def test_few_documents_or_a_running_text_are_cut_before_their_end(make, tokenizer, tmp_path, name):
    topics = read_pydoc()
    documents = {"one.txt": topics[:1], "nine.jsonl": topics[:9], "rows.jsonl": ["", "= Title =", ""] * 50}[name]
    path = tmp_path / name
    path.write_text(documents[0] if name == "one.txt" else "".join(json.dumps({"text": d}) + "\n" for d in documents))
    stream = tokenizer("\n\n".join(documents), add_special_tokens=False)["input_ids"]
    data = make(source=str(path), num_calibration=500)
    data.setup("fit")
    assert windows_of(data.val_dataloader()).flatten().tolist() == stream[-48:]
    calibration = {tuple(window) for window in windows_of(data.train_dataloader()).tolist()}
    possible = {tuple(stream[start : start + 16]) for start in range(len(stream) - 48 - 16 + 1)}
    assert calibration <= possible and len(calibration) > min(len(possible) / 4, 400)


# Windows


def test_held_out_windows_are_consecutive_text_without_special_tokens(make, tokenizer):
    data = make(num_heldout=20)
    data.setup("fit")
    windows = windows_of(data.val_dataloader())
    assert windows.shape == (20, 16) and windows.dtype == torch.int64
    held_text = tokenizer.decode(windows.flatten())
    assert any(held_text[:200] in document for document in read_pydoc())  # begins with a topic, goes on in it
    everything = torch.cat([windows.flatten(), windows_of(data.train_dataloader()).flatten()])
    assert tokenizer.bos_token_id not in everything
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id  # this tokenizer would have added it


def test_each_document_window_lies_in_one_long_document(make, marked, tokenizer):
    data = make(source=marked([2, 30] * 20), sampling="document", num_calibration=60)  # 20 long, 60 windows: redrawn
    data.setup("fit")
    windows = windows_of(data.train_dataloader())
    found = [marks(tokenizer, window[None]) for window in windows]
    assert windows.shape == (60, 16) and all(len(documents) == 1 for documents in found)
    assert all(i % 2 == 1 for (i,) in found)
    assert max(Counter(i for (i,) in found).values()) < 20
    assert not set.union(*found) & marks(tokenizer, windows_of(data.val_dataloader()))


# Stages


def test_a_stage_prepares_what_it_needs_and_leaves_the_rest(make, monkeypatch):
    data = make()
    data.setup("validate")
    heldout = windows_of(data.val_dataloader())
    assert set(data._windows) == {"heldout"}
    data.setup("fit")
    assert set(data._windows) == {"heldout", "calibration"}
    calibration = windows_of(data.train_dataloader())
    monkeypatch.setattr(text, "read_documents", lambda *_: pytest.fail("read again"))
    data.setup("fit")
    data.setup("validate")
    data.setup("predict")
    assert torch.equal(windows_of(data.val_dataloader()), heldout)
    assert torch.equal(windows_of(data.predict_dataloader()), heldout)
    assert torch.equal(windows_of(data.train_dataloader()), calibration)


@pytest.mark.parametrize(("sampling", "topics"), [("joined", 79), ("joined", 5), ("document", 79)])
def test_held_out_windows_do_not_depend_on_the_stage(make, tmp_path, sampling, topics):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in read_pydoc()[:topics]))
    parts = {}
    for stage in ["fit", "validate", "predict", "test"]:
        data = make(source=str(path), sampling=sampling)
        data.setup(stage)
        parts[stage] = windows_of(data.test_dataloader() if stage == "test" else data.val_dataloader())
    assert torch.equal(parts["fit"], parts["validate"]) and torch.equal(parts["fit"], parts["predict"])
    assert torch.equal(parts["test"][:3], parts["fit"])  # without `test_source` the whole held-out part is tested on
    assert len(parts["test"]) == 3 if topics == 5 else len(parts["test"]) > 3


def test_test_source_is_read_alone_and_whole(make, tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text(read_pydoc()[0])
    (tmp_path / "u.txt").write_text(read_pydoc()[1])
    data = make(source="not there", test_source=[str(tmp_path / "t.txt"), str(tmp_path / "u.txt")], num_heldout=0)
    data.setup("test")
    stream = tokenizer(read_pydoc()[0] + "\n\n" + read_pydoc()[1], add_special_tokens=False)["input_ids"]
    windows = windows_of(data.test_dataloader())
    assert len(windows) == len(stream) // 16
    assert windows.flatten().tolist() == stream[: len(stream) // 16 * 16]


def test_nothing_held_out(make):
    data = make(num_heldout=0)
    data.setup("fit")
    assert data.val_dataloader() == [] and data.predict_dataloader() == []
    assert len(windows_of(data.train_dataloader())) == 12
    with pytest.raises(ValueError, match=r"`test_source` is null and `num_heldout` is 0"):
        data.setup("test")


def test_loaders_keep_the_order_and_the_last_batch(make):
    data = make(num_workers=0)
    data.setup("fit")
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, SequentialSampler)
    assert [batch["input_ids"].shape for batch in loader] == [(5, 16), (5, 16), (2, 16)]
    assert [batch["index"].tolist() for batch in loader] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert next(iter(loader))["index"].dtype == torch.int64


def test_each_part_is_announced_once(make, caplog):
    data = make()
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        data.setup("fit")
        data.setup("validate")
        data.setup("fit")
    lines = [record.message for record in caplog.records if record.message.startswith("Text, ")]
    assert len(lines) == 1
    assert re.match(
        r"Text, 16 tokens a window: calibration 12 windows of [\d,]{6,} calibration tokens; "
        r"heldout 3 windows of [\d,]+ held-out tokens \(\d of \d+ documents\)$",
        lines[0],
    )


# Seeds


@pytest.mark.parametrize("sampling", ["joined", "document"])
def test_the_seed_decides_and_the_global_random_state_does_not(make, marked, sampling):
    source = marked([30] * 40)

    def cut(seed):
        data = make(source=source, sampling=sampling, seed=seed)
        data.setup("fit")
        return windows_of(data.train_dataloader()), data._windows["heldout"]

    torch.manual_seed(5)
    first = cut(3)
    torch.manual_seed(6)
    again, other = cut(3), cut(4)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    data = make(source=source, sampling=sampling)
    data.setup("fit")
    data.setup("test")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_a_seed_it_is_that_of_seed_everything_at_the_first_stage(make, marked, monkeypatch):
    source = marked([30] * 40)

    def calibration(data):
        data.setup("fit")
        return data._windows["calibration"]

    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # for its removal at the end of the test
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert torch.equal(calibration(make(source=source, seed=None)), calibration(make(source=source, seed=0)))
    seed_everything(7, verbose=False)
    assert torch.equal(calibration(make(source=source, seed=None)), calibration(make(source=source, seed=7)))
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    data = make(source=source, seed=None)
    data.setup("validate")
    monkeypatch.setenv("PL_GLOBAL_SEED", "9")  # the split must not move between two stages
    assert torch.equal(calibration(data), calibration(make(source=source, seed=8)))


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "random"}, r"`sampling` expected joined or document but got 'random'"),
        ({"seq_len": 1}, r"`seq_len` expected to be an integer of at least 2 but got 1"),
        ({"seq_len": 16.0}, r"`seq_len` expected to be an integer of at least 2 but got 16\.0"),
        ({"num_calibration": 0}, r"`num_calibration` expected to be an integer of at least 1 but got 0"),
        ({"num_heldout": -1}, r"`num_heldout` expected to be an integer of at least 0 but got -1"),
        ({"batch_size": True}, r"`batch_size` expected to be an integer of at least 1 but got True"),
        ({"num_workers": -2}, r"`num_workers` expected to be an integer of at least 0 but got -2"),
        ({"seed": -1}, r"`seed` expected to be an integer of at least 0 but got -1"),
        ({"source": []}, r"`source` expected a text source or a list of them but got \[\]"),
        ({"source": ["pydoc", ""]}, r"`source` expected a text source"),
        ({"test_source": 3}, r"`test_source` expected a text source or a list of them but got 3"),
        ({"text_field": ""}, r"`text_field` expected the name of a field"),
    ],
)
def test_wrong_values_are_refused_at_once(make, options, message):
    with pytest.raises(ValueError, match=f"Argument {message}"):
        make(**options)


def test_too_little_text_says_how_much_there_is_and_how_much_is_needed(make, tmp_path, tokenizer):
    (tmp_path / "x.txt").write_text("a few words")
    found = len(tokenizer("a few words", add_special_tokens=False)["input_ids"])
    with pytest.raises(
        ValueError, match=rf"`source` expected at least 64 tokens, .* but got {found}; give more text, or lower"
    ):
        make(source=str(tmp_path / "x.txt")).setup("fit")
    with pytest.raises(ValueError, match=rf"`test_source` expected at least 16 tokens, .* but got {found}; give more text"):
        make(test_source=str(tmp_path / "x.txt")).setup("test")
    with pytest.raises(ValueError, match=r"at least 16000000 tokens, for the held-out windows, but got \d{6};"):
        make(num_heldout=1_000_000).setup("validate")


def test_all_held_out_leaves_nothing_to_calibrate_on(make, marked, tokenizer):
    path = marked([4] * 12)
    text_of_all = "\n\n".join(f"<{i}> " * 4 for i in range(12))
    total = len(tokenizer(text_of_all, add_special_tokens=False)["input_ids"])
    with pytest.raises(ValueError, match=r"at least 16 tokens, for one window, but got \d+; give more text"):
        make(source=path, num_heldout=total // 16).setup("fit")


def test_too_few_documents_to_hold_some_out(make, marked):
    data = make(source=marked([30] * 9), sampling="document")
    with pytest.raises(ValueError, match=r"9 documents are too few .*at least 10.*`num_heldout: 0`"):
        data.setup("fit")
    data = make(source=marked([30] * 9), sampling="document", num_heldout=0)
    data.setup("fit")
    assert len(data._windows["calibration"]) == 12


def test_tokenizers_that_cannot_be_loaded(make, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"`tokenizer` is null, and the model names none. Give a hub id, a local directory, a \.gguf file"
    ):
        make(tokenizer=None).setup("fit")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(ValueError, match=r"the directory '.*' holds no tokenizer \(tokenizer.json or tokenizer.model\)"):
        load_tokenizer(str(tmp_path))
    for path in [str(tmp_path / "cut.gguf"), "no-such-owner/model"]:
        with pytest.raises(ValueError, match=r"(?s)`tokenizer`: none could be loaded from '.*Give a hub id"):
            load_tokenizer(path)
    with pytest.raises(ValueError, match=r"`stage` expected one of fit, validate, test, predict but got 'train'"):
        make().setup("train")


# In Lightning


class Recorder(LightningModule):
    """Notes the indices that arrive."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.seen = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"] += batch["index"].tolist()

    def validation_step(self, batch, batch_idx):
        self.seen["val"] += batch["index"].tolist()

    def test_step(self, batch, batch_idx):
        self.seen["test"] += batch["index"].tolist()

    def predict_step(self, batch, batch_idx):
        self.seen["predict"] += batch["index"].tolist()

    def configure_optimizers(self):
        return None


@pytest.mark.parametrize("num_heldout", [3, 0])
def test_all_stages_of_a_trainer(make, tmp_path, num_heldout):
    data, module = make(num_heldout=num_heldout, num_calibration=7, test_source="pydoc", seq_len=512), Recorder()
    trainer = quiet(tmp_path, max_epochs=2)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    heldout = list(range(num_heldout))
    assert module.seen["train"] == list(range(7)) * 2 and module.seen["val"] == heldout * 2
    assert module.seen["test"] == list(range(len(data.test_dataloader().dataset))) and len(module.seen["test"]) > 100
    if num_heldout:
        trainer.predict(module, data, return_predictions=False)
        assert module.seen["predict"] == heldout


def test_every_argument_survives_yaml_to_object_to_yaml(tmp_path, monkeypatch):
    arguments = {
        "tokenizer": "package://some_package/model.gguf",
        "source": ["pydoc", "Salesforce/wikitext:wikitext-2-raw-v1:train[:10%]"],
        "test_source": "hf://datasets/allenai/c4/en/c4-validation.00000-of-00008.json.gz",
        "sampling": "document",
        "seq_len": 64,
        "num_calibration": 3,
        "num_heldout": 0,
        "batch_size": 2,
        "num_workers": 1,
        "seed": 11,
        "text_field": "content",
        "self_file": None,
    }

    config = {"data": {"class_path": "datamodules.TextDataModule", "init_args": arguments}}
    (tmp_path / "written.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def load(*args):
        options = {"subclass_mode_data": True, "run": False, "save_config_callback": None, "args": list(args)}
        cli = LightningCLI(Recorder, LightningDataModule, **options)
        assert isinstance(cli.datamodule, TextDataModule)
        hparams = {name: value for name, value in cli.datamodule.hparams.items() if not name.startswith("_")}
        return hparams, cli.parser.dump(cli.config)

    hparams, dumped = load(f"--config={tmp_path / 'written.yaml'}")
    assert hparams == arguments
    (tmp_path / "dumped.yaml").write_text(dumped)
    assert load(f"--config={tmp_path / 'dumped.yaml'}") == (arguments, dumped)
    assert load("--data=datamodules.TextDataModule")[0] == dict(TextDataModule().hparams)

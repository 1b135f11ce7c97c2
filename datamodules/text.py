"""Text for pruning language models: calibration windows, held-out windows, test windows.

Documents are joined by a blank line and tokenised without special tokens, as in SparseGPT, and cut into windows of
`seq_len` tokens. Held-out text is never calibrated on. How it is chosen depends on the number of documents:

- at least 10 documents: the documents are shuffled, and those at the end of that order, until they hold enough tokens,
  are held out whole. Inside a part the documents keep the order of the source.
- fewer documents, or a blank one among them (WikiText has the lines of a running text as rows, empty lines included, so
  their order carries meaning): the last tokens of the joined text are held out.

With `source: self` the model writes all windows itself, before its first batch (datamodules/text_self.py).

Every draw comes from one generator, seeded with `seed`. The global random state is neither used nor changed.
"""

import os
from collections.abc import Sequence
from typing import Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Generator, Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from datamodules.shards import in_order
from datamodules.text_self import SELF, SelfWindows, check_self
from datamodules.text_sources import read_documents
from datamodules.text_windows import (
    SEPARATOR,
    Windows,
    consecutive_windows,
    draw_from_documents,
    draw_from_stream,
    split_by_document,
    split_by_position,
)
from utilities.checks import check_integer
from utilities.contract import CalibrationData, DataFacts, model_of
from utilities.hub import has_tokenizer, resolve_model_path

MIN_DOCUMENTS_TO_SPLIT = 10
PARTS_OF_STAGE = {
    "fit": ("calibration", "heldout"),
    "validate": ("heldout",),
    "test": ("test",),
    "predict": ("heldout",),
}

AUTO_BATCH_SIZE = 8


class TextDataModule(LightningDataModule, CalibrationData):
    """Windows of text: calibration for `fit`, held-out for `validate` and `predict`, consecutive test text for `test`.

    A batch is ``{"input_ids": LongTensor (batch, seq_len), "index": LongTensor (batch,)}``; `index` is the position of
    the window in its part, from 0, in whichever process it is.

    Args:
        tokenizer: A hub id, a local directory, a .gguf file, or package://<python package>/<file>; null takes the model's. From
            Python also a tokenizer of transformers.
        source: Text of calibration and held-out windows: pydoc (the prose of CPython's documentation), a file, a
            directory, hf://datasets/<repo>/<file>, <repo>:<config>:<split>, or a list of these; or self, text that the model
            samples from itself when `fit` starts.
        test_source: Text of the test windows, in the same forms; null tests on the whole held-out part of `source`.
        sampling: How calibration windows are drawn. joined: at random from the joined text (WikiText style). document:
            each from one random document longer than `seq_len` (C4 style).
        seq_len: Number of tokens in a window.
        num_calibration: Number of calibration windows.
        num_heldout: Number of held-out windows; 0 holds nothing out, and there is no validation then.
        batch_size: Number of windows in a batch. auto: as many calibration windows as suit a pruning run on its device, and 8
            elsewhere.
        num_workers: Number of worker processes of each dataloader.
        seed: Seed of the split and of the draws; null takes that of `seed_everything`, else 0.
        text_field: Name of the JSON field or the parquet or dataset column that holds the text.
        self_file: File (.safetensors) of the windows that `source: self` has written: `fit` writes it if it is not there, and
            reads it if it is; other stages read it.
    """

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        source: str | list[str] = "pydoc",
        test_source: str | list[str] | None = None,
        sampling: Literal["joined", "document"] = "joined",
        seq_len: int = 2048,
        num_calibration: int = 128,
        num_heldout: int = 16,
        batch_size: int | Literal["auto"] = 8,
        num_workers: int = 0,
        seed: int | None = None,
        text_field: str = "text",
        self_file: str | None = None,
    ) -> None:
        super().__init__()
        _check_source("source", source)
        if test_source is not None:
            _check_source("test_source", test_source)
        if sampling not in ("joined", "document"):
            raise ValueError(
                f"Argument `sampling` expected joined or document but got {sampling!r}; joined draws from the whole text."
            )
        check_integer("seq_len", seq_len, 2)  # the first token of a window is never predicted
        check_integer("num_calibration", num_calibration, 1)
        check_integer("num_heldout", num_heldout, 0)
        if batch_size != "auto":
            check_integer("batch_size", batch_size, 1)
        check_integer("num_workers", num_workers, 0)
        if seed is not None:
            check_integer("seed", seed, 0)
        if not isinstance(text_field, str) or not text_field:
            raise ValueError(f"Argument `text_field` expected the name of a field or column but got {text_field!r}; give one.")
        check_self(source, test_source, sampling, self_file)
        given = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
        self.save_hyperparameters(ignore=["tokenizer"] if given is not None else [])
        self._windows: dict[str, Tensor] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = given
        self._seed = seed
        self._calibration_batch_size: int | None = None
        self._self = SelfWindows(self_file, seq_len, num_calibration, num_heldout, test_source is None)

    def facts(self) -> DataFacts:
        """Return the length of the windows, numbers, settings, and the tokenizer once it is loaded."""
        options = self.hparams
        size = None if options.batch_size == "auto" else options.batch_size
        return DataFacts(
            tokens=options.seq_len,
            num_calibration=options.num_calibration,
            batch_size=size,
            settings=dict(options),
            seed=self._seed,
            tokenizer=self._tokenizer,
        )

    def begin_calibration(self, batch_size: int | None) -> None:
        """Use batches of this size for calibration windows, where the settings leave it open."""
        self._calibration_batch_size = batch_size

    def end_calibration(self) -> None:
        """Return to the batch size of the settings."""
        self._calibration_batch_size = None

    def setup(self, stage: str) -> None:
        """Cut the windows that the stage needs and that no earlier stage has cut.

        Raises:
            ValueError: If the tokenizer or the text cannot be loaded, or the text is too short for the windows asked for.
        """
        if stage not in PARTS_OF_STAGE:
            raise ValueError(
                f"Argument `stage` expected one of {', '.join(PARTS_OF_STAGE)} but got {stage!r}; give one of them."
            )
        if stage in ("validate", "predict") and self.hparams.num_heldout == 0:
            raise ValueError("Argument `num_heldout` is 0: there is no held-out text. Set it to 1 or more.")
        missing = [part for part in PARTS_OF_STAGE[stage] if part not in self._windows]
        if not missing:
            return
        if self._seed is None:  # kept from here on: another seed in a later stage would move the split
            self._seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        if self._tokenizer is None:
            self._tokenizer = self._find_tokenizer()
        if self.hparams.source == SELF and not (stage == "test" and self.hparams.test_source is not None):
            self._self.check(stage)
            return
        cut = self._cut(missing)
        self._windows |= {part: windows for part, (windows, _) in cut.items()}
        parts = [f"{part} {len(windows)} windows of {origin}" for part, (windows, origin) in cut.items()]
        rank_zero_info(f"Text, {self.hparams.seq_len} tokens a window: {'; '.join(parts)}")

    def _written(self, part: str) -> Tensor:
        """Return the windows of a part, which are read or written now if they come from the model."""
        if part not in self._windows:
            drawn = {"seed": self._seed, "vocabulary": len(self._tokenizer)}
            self._windows |= self._self.windows(self.trainer, drawn)
        return self._windows[part]

    def _find_tokenizer(self) -> PreTrainedTokenizerBase:
        """Find the tokenizer: that of the settings or, without one, the model's."""
        found = self.hparams.get("tokenizer") or model_of(self.trainer).tokenizer
        return found if isinstance(found, PreTrainedTokenizerBase) else load_tokenizer(found)

    def _cut(self, parts: Sequence[str]) -> dict[str, tuple[Tensor, str]]:
        """Return the windows (number, seq_len) of each part asked for, and what they were cut from, in words."""
        options, cut = self.hparams, {}
        if parts == ["test"] and options.test_source is not None:
            documents = self._documents("test_source")
            tokens = self._tokenise(SEPARATOR.join(documents))
            return {"test": (consecutive_windows(tokens, options.seq_len, "test_source"), f"{len(tokens):,} tokens")}
        if parts == ["test"] and options.num_heldout == 0:
            raise ValueError("Argument `test_source` is null and `num_heldout` is 0: there is no text to test on.")

        generator = Generator().manual_seed(self._seed)
        documents = self._documents("source")
        calibration, heldout, rule = self._split(documents, generator)
        origin = f"{len(heldout):,} held-out tokens ({rule})"
        if "test" in parts:
            cut["test"] = consecutive_windows(heldout, options.seq_len, "source"), origin
        if "calibration" in parts:
            cut["calibration"] = self._draw(documents, calibration, generator)
        if "heldout" in parts:
            size = options.num_heldout * options.seq_len
            cut["heldout"] = heldout[:size].view(options.num_heldout, options.seq_len), origin
        return cut

    def _documents(self, argument: str) -> Sequence[str]:
        try:
            return read_documents(self.hparams[argument], self.hparams.text_field)
        except ValueError as error:
            raise ValueError(f"Argument `{argument}`: {error}") from error

    def _split(self, documents: Sequence[str], generator: Generator) -> tuple[list[int] | Tensor, Tensor, str]:
        """Return what is left for calibration (document indices or, of a cut text, tokens), held-out tokens, and the rule."""
        options = self.hparams
        needed = options.num_heldout * options.seq_len
        enough = len(documents) >= MIN_DOCUMENTS_TO_SPLIT
        if options.sampling == "document" and needed and not enough:
            raise ValueError(
                f"Argument `sampling` is 'document', but {len(documents)} documents are too few to hold some out (at "
                f"least {MIN_DOCUMENTS_TO_SPLIT}). Give more documents, or set `sampling: joined` or `num_heldout: 0`."
            )
        if options.sampling == "document" or (enough and all(document.strip() for document in documents)):
            order, heldout = split_by_document(documents, self._tokenise, needed, generator)
            return order, heldout, f"{len(documents) - len(order)} of {len(documents)} documents"
        tokens = self._tokenise(SEPARATOR.join(documents))
        return *split_by_position(tokens, needed, options.seq_len), "the end of the text"

    def _draw(self, documents: Sequence[str], part: list[int] | Tensor, generator: Generator) -> tuple[Tensor, str]:
        """Draw calibration windows from what `_split` left for calibration."""
        seq_len, number = self.hparams.seq_len, self.hparams.num_calibration
        if self.hparams.sampling == "document":
            windows = draw_from_documents(documents, part, self._tokenise, seq_len, number, generator)
            return windows, f"{len(part):,} documents"
        if not isinstance(part, Tensor):
            part = self._tokenise(SEPARATOR.join(documents[index] for index in sorted(part)))
        return draw_from_stream(part, seq_len, number, generator), f"{len(part):,} calibration tokens"

    def _tokenise(self, text: str) -> Tensor:
        options = {"add_special_tokens": False, "verbose": False, "return_attention_mask": False}
        return torch.tensor(self._tokenizer(text, **options)["input_ids"], dtype=torch.long)

    def train_dataloader(self) -> DataLoader:
        """Return calibration windows in order; a window has the same index in every epoch."""
        return self._dataloader("calibration")

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return held-out windows; no dataloader if nothing is held out."""
        return self._dataloader("heldout") if self.hparams.num_heldout else []

    def test_dataloader(self) -> DataLoader:
        """Return consecutive windows of the test text."""
        return self._dataloader("test")

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return held-out windows. Lightning distributes them over the processes, so it knows which process predicts which."""
        if not self.hparams.num_heldout:
            return []
        windows = Windows(self._written("heldout"))
        return DataLoader(windows, batch_size=self._batch_size("heldout"), num_workers=self.hparams.num_workers)

    def rule_dataloader(self, source: str | list[str], number: int) -> DataLoader:
        """Draw random windows from another text with the same seed, for an update rule to look at.

        Args:
            source: Text, in the same forms as the setting `source`.
            number: Number of windows.

        Raises:
            ValueError: If the text cannot be read or is shorter than one window.
        """
        _check_source("update_rule.source", source)
        try:
            documents = read_documents(source, self.hparams.text_field)
        except ValueError as error:
            raise ValueError(f"Argument `update_rule.source`: {error}") from error
        tokens, generator = self._tokenise(SEPARATOR.join(documents)), Generator().manual_seed(self._seed)
        windows = draw_from_stream(tokens, self.hparams.seq_len, number, generator, "update_rule.source")
        return DataLoader(Windows(windows), batch_size=self._batch_size("rule"))

    def _dataloader(self, part: str) -> DataLoader:
        """Make a dataloader of windows in order; with several processes, each gets its own part of them."""
        argument = {"calibration": "num_calibration", "heldout": "num_heldout", "test": "test_source"}[part]
        windows, workers = Windows(self._written(part)), self.hparams.num_workers
        return in_order(windows, argument, self.trainer, self._batch_size(part), num_workers=workers)

    def _batch_size(self, part: str) -> int:
        if self.hparams.batch_size != "auto":
            return self.hparams.batch_size
        return (self._calibration_batch_size if part == "calibration" else None) or AUTO_BATCH_SIZE


def load_tokenizer(path: str | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        path: A hub id, a directory, a .gguf file, or package://<python package>/<file>.

    Raises:
        ValueError: If `path` is None or there is no tokenizer to be loaded from it.
    """
    accepted = "a hub id, a local directory, a .gguf file, or package://<python package>/<file>"
    if path is None:
        raise ValueError(
            f"Argument `tokenizer` is null, and the model names none. Give {accepted}, normally that of the model."
        )
    name, options = resolve_model_path(path)
    if not has_tokenizer(name, options):
        raise ValueError(
            f"Argument `tokenizer`: the directory {path!r} holds no tokenizer (tokenizer.json or tokenizer.model). Save it "
            "there with `tokenizer.save_pretrained`, or give another as data.tokenizer."
        )
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # transformers, the hub client and the GGUF reader share no base class below this one
        raise ValueError(
            f"Argument `tokenizer`: none could be loaded from {path!r} ({type(error).__name__}: {error}). "
            f"Give {accepted} with its tokenizer files; a hub id needs a connection or a filled cache."
        ) from error


def _check_source(name: str, value: object) -> None:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(item, str) and item for item in values):
        raise ValueError(
            f"Argument `{name}` expected a text source or a list of them but got {value!r}; pydoc needs no download."
        )

"""Sources of text: the standard library's prose, local files and folders, Hugging Face datasets.

Start at `read_documents`. A document is a topic, a text file, a JSON line or a row, depending on the source. Whatever is wrong
with a source raises a ValueError that names the file, the line or row, and what to do about it.
"""

import gzip
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from utilities.extras import import_needed
from utilities.safe_load import brief

# Suffix -> kind; a kind is also the name of the builder that `datasets` has for it.
KINDS = {
    ".txt": "text",
    ".raw": "text",
    ".tokens": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
}
ACCEPTED_FILES = ".txt .raw .tokens .md (a document each), .jsonl .json (one object a line), these + .gz, .parquet"
ACCEPTED_SOURCES = f"""Accepted are
  pydoc                            the prose of CPython's own documentation (needs no download)
  <file>                           {ACCEPTED_FILES}
  <directory>                      all such files directly in it, sorted by name
  hf://datasets/<repo>/<file>      one file of a dataset on the Hugging Face hub
  <repo>:<config>:<split>          a dataset on the hub, e.g. Salesforce/wikitext:wikitext-2-raw-v1:validation
or a list of these."""

DATA_EXTRA = "--editable '.[data]'"
"""Package that pip installs for parquet files and hub datasets."""

_HUB_FILE = re.compile(r"hf://datasets/[^/]+/[^/]+/.+")
_HUB_SPLIT = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?):(?P<config>[^:]*):(?P<split>.+)")


def read_documents(source: str | list[str], text_field: str) -> Sequence[str]:
    """Read the documents of one source or of several, in their order.

    Args:
        source: "pydoc", a file, a directory, ``hf://datasets/<repo>/<file>``, ``<repo>:<config>:<split>``, or a list of
            these, whose documents follow one another.
        text_field: Name of the JSON field or the parquet or dataset column that holds the text.

    Returns:
        The documents. Rows of a Hugging Face dataset stay on disk until they are indexed. Documents that are
        blank are kept: WikiText has its empty lines as rows.

    Raises:
        ValueError: If the source is of no accepted form, names a file twice, or cannot be read in its form.
        ModuleNotFoundError: If parquet or a hub dataset is asked for without the extra `data`.
    """
    parts, seen = [], set()
    for item in _expand([source] if isinstance(source, str) else source):
        identity = item.resolve() if isinstance(item, Path) else item  # links are followed to compare, not to read
        if identity in seen:
            raise ValueError(f"Text source {str(item)!r} is given twice. Name it once; held-out text must be new.")
        seen.add(identity)
        parts.append(_read(item, text_field))
    if not parts:
        raise ValueError(f"Text source: the list is empty. {ACCEPTED_SOURCES}")
    return parts[0] if len(parts) == 1 else [document for part in parts for document in part]


def _expand(sources: list[str]) -> list[str | Path]:
    """Replace local paths by files; what is not a path stays a string."""
    items: list[str | Path] = []
    for source in sources:
        path = os.path.expanduser(source)
        if source == "pydoc" or _HUB_FILE.fullmatch(source):
            items.append(source)
        elif os.path.isdir(path):
            items.extend(_files_in(Path(path)))
        elif os.path.isfile(path):
            items.append(Path(path))
        elif os.path.exists(path):
            raise ValueError(f"Text source {source!r} is neither a regular file nor a directory. {ACCEPTED_SOURCES}")
        elif _HUB_SPLIT.fullmatch(source):
            items.append(source)
        else:
            raise ValueError(f"Text source {source!r} does not exist and has no known form. {ACCEPTED_SOURCES}")
    return items


def _files_in(directory: Path) -> list[Path]:
    files = [path for path in sorted(directory.iterdir()) if path.is_file() and _kind(path.name) is not None]
    if not files:
        raise ValueError(f"Text source {str(directory)!r} is a directory without any of {ACCEPTED_FILES}.")
    return files


def _kind(name: str) -> str | None:
    name = name.lower()
    kind = KINDS.get(os.path.splitext(name.removesuffix(".gz"))[1])
    return None if kind == "parquet" and name.endswith(".gz") else kind


def _read(item: str | Path, text_field: str) -> Sequence[str]:
    if item == "pydoc":
        return read_pydoc()
    if isinstance(item, Path):
        return read_file(item, text_field)
    if item.startswith("hf://"):
        return read_hub_file(item, text_field)
    return read_hub_split(item, text_field)


def read_pydoc() -> list[str]:
    """Read the topics of the standard library's documentation, sorted by key. No paragraph is in more than one of them.

    Topics repeat one another (`for` is a section of `compound`). A repeated paragraph stays in the longest topic only;
    otherwise held-out text would also be calibration text. Topics with fewer than 50 words left are dropped: they are
    headings.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept: dict[str, str] = {}
    for key in sorted(topics, key=lambda key: (-len(topics[key]), key)):
        fresh = {" ".join(paragraph.split()): paragraph for paragraph in topics[key].rstrip().split("\n\n")}
        kept[key] = "\n\n".join(paragraph for words, paragraph in fresh.items() if words not in seen)
        seen |= fresh.keys()
    return [kept[key] for key in sorted(kept) if len(kept[key].split()) >= 50]


# Local files


def read_file(path: Path, text_field: str) -> list[str]:
    """Read one local file.

    Returns:
        The whole file as one document for text, one document a line for JSON, one a row for parquet.

    Raises:
        ValueError: If the suffix is unknown, the file is empty, truncated, not UTF-8 or not JSON, or `text_field` is
            missing or no string.
    """
    reader = {"text": _read_text, "json": _read_json_lines, "parquet": _read_parquet}.get(_kind(path.name))
    if reader is None:
        raise ValueError(f"Text file '{path}' has an unknown suffix. Accepted: {ACCEPTED_FILES}.")
    try:
        documents = reader(path, text_field)
    except OSError as error:
        raise ValueError(f"Text file '{path}' cannot be read ({brief(error)}). Check it and its permissions.") from error
    if not any(document.strip() for document in documents):
        raise ValueError(f"Text file '{path}' holds no text. Remove it from the sources or give a file with text.")
    return documents


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    with open(path, "rb") as file:
        if not path.name.lower().endswith(".gz"):
            yield file
            return
        try:
            yield gzip.GzipFile(fileobj=file)
        except ValueError:  # what is inside is wrong
            raise
        except Exception as error:  # BadGzipFile, EOFError, zlib.error
            raise ValueError(f"Text file '{path}' is not intact gzip ({brief(error)}). Copy or download it again.") from error


def _short(value: object, length: int = 300) -> str:
    text = str(value)
    return text if len(text) <= length else f"{text[:length]}..."


def _names(names: Iterable[str]) -> str:
    return _short(sorted(names))


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        byte = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise ValueError(f"{where} is not UTF-8 ({byte}). Convert it, for example with `iconv -t UTF-8`.") from error


def _read_text(path: Path, text_field: str) -> list[str]:
    with _open(path) as stream:
        text = _decode(stream.read(), f"Text file '{path}'")
    return [text.replace("\r\n", "\n")]  # copies of WikiText exist with Windows line ends, which cost one more token a line


def _read_json_lines(path: Path, text_field: str) -> list[str]:
    with _open(path) as stream:
        return [
            _text_of_line(line, text_field, f"Text file '{path}', line {number},")
            for number, line in enumerate(stream, start=1)
            if line.strip()
        ]


def _text_of_line(line: bytes, text_field: str, where: str) -> str:
    text = _decode(line, where)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "Write one JSON object a line, for example with `jq -c '.[]'`."
        raise ValueError(f"{where} is not JSON ({brief(error)}). {hint}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is of type {type(row).__name__}, not a JSON object. Write one JSON object a line.")
    if text_field not in row:
        raise ValueError(f"{where} has no field {text_field!r}; it has {_names(row)}. Set `text_field`.")
    document = row[text_field]
    if not isinstance(document, str):
        kind = type(document).__name__
        raise ValueError(f"{where} field {text_field!r} is of type {kind}, not string. Set `text_field`.")
    try:
        document.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} field {text_field!r} holds half a surrogate pair ({brief(error)}). Remove it.") from error
    return document


def _read_parquet(path: Path, text_field: str) -> list[str]:
    parquet = import_needed("pyarrow.parquet", f"'{path}'", DATA_EXTRA)
    where = f"Text file '{path}'"
    with open(path, "rb") as source, _parquet_explained(where):
        file = parquet.ParquetFile(source)
        schema = file.schema_arrow
    _check_column(schema, text_field, where)
    with open(path, "rb") as source, _parquet_explained(where):
        column = parquet.ParquetFile(source).read(columns=[text_field]).column(text_field)
        column.validate(full=True)
    _check_no_null(column, text_field, where)
    with _parquet_explained(where):
        return column.to_pylist()


@contextmanager
def _parquet_explained(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # pyarrow's own, and OSError, MemoryError, UnicodeDecodeError and OverflowError of damaged bytes
        raise ValueError(f"{where} is not intact parquet ({brief(error)}). Copy or download it again.") from error


# Hugging Face datasets


def read_hub_file(url: str, text_field: str) -> Sequence[str]:
    """Read one file of a hub dataset (``hf://datasets/<repo>/<file>``, or anything `data_files` accepts).

    Returns:
        One document for a text file, one a row for JSON and parquet, read from disk when indexed.

    Raises:
        ValueError: If the suffix is unknown, the file cannot be loaded, or `text_field` is missing or no string.
    """
    kind = _kind(url)
    if kind is None:
        raise ValueError(f"Text source {url!r} has an unknown suffix. Accepted: {ACCEPTED_FILES}.")
    options = {"sample_by": "document"} if kind == "text" else {}
    return _load_column(url, "text" if kind == "text" else text_field, kind, data_files=url, split="train", **options)


def read_hub_split(source: str, text_field: str) -> Sequence[str]:
    """Read ``<repo>:<config>:<split>``; an empty config means the default one, and a split may be a slice.

    Returns:
        One document a row, read from disk when indexed.

    Raises:
        ValueError: If the dataset cannot be loaded, or `text_field` is missing or no string.
    """
    name = _HUB_SPLIT.fullmatch(source)
    return _load_column(source, text_field, name["repo"], name["config"] or None, split=name["split"])


def _load_column(source: str, text_field: str, *arguments: str | None, **options: str) -> Sequence[str]:
    datasets = import_needed("datasets", repr(source), DATA_EXTRA)
    try:
        dataset = datasets.load_dataset(*arguments, **options)
    except Exception as error:  # builders, hub client and HTTP client share no base class below this one
        cause = error.__cause__ or error  # a DatasetGenerationError says nothing itself, only its cause does
        raise ValueError(
            f"Text source {source!r} could not be loaded: {type(cause).__name__}: {cause}. Check its name, config and "
            "split and the connection; without one, give a local file."
        ) from error
    where = f"Text source {source!r}"
    _check_column(dataset.data.schema, text_field, where)
    _check_no_null(dataset.data.column(text_field), text_field, where)
    return dataset[text_field]


def _check_column(schema, text_field: str, where: str) -> None:
    arrow = import_needed("pyarrow", where, DATA_EXTRA)
    if text_field not in schema.names:
        raise ValueError(f"{where} has no column {text_field!r}; it has {_names(schema.names)}. Set `text_field`.")
    kind = schema.field(text_field).type
    if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
        raise ValueError(f"{where} column {text_field!r} is of type {_short(kind)}, not string. Set `text_field` to another.")


def _check_no_null(column, text_field: str, where: str) -> None:
    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise ValueError(f"{where} column {text_field!r} is empty (null) in row {row}. Remove such rows.")

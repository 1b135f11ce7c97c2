"""Reading documents: every accepted form, and every way a source can be wrong. Offline.

The `datasets` branch runs the real library on files written here; only the forms that need the hub are intercepted.
"""

import gzip
import json
import os
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.text_sources import read_documents, read_hub_file, read_hub_split, read_pydoc

TEXTS = ["first document\n\nwith two paragraphs", "", "zweites Dokument: größer", "third"]


def lines(texts, field="text"):
    return "".join(json.dumps({"url": "u", field: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def table_bytes(columns):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    """The same kinds of file that users have; written out of order."""
    path = tmp_path / "corpus"
    path.mkdir()
    (path / "e.txt.gz").write_bytes(gzip.compress(b"packed text"))
    (path / "d.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS)))
    (path / "c.json").write_bytes(lines(TEXTS) + b"\n")
    (path / "b.md").write_bytes("markdown é".encode())
    (path / "a.txt").write_bytes(b"\xef\xbb\xbfplain text\r\nof two lines \n")
    pq.write_table(pa.table({"id": [1, 2, 3, 4], "text": TEXTS}), path / "f.parquet")
    (path / "ignored.csv").write_text("text\nno")
    (path / "nested.txt").mkdir()
    return path


def test_pydoc_is_the_prose_of_the_standard_library():
    from pydoc_data.topics import topics

    documents = read_documents("pydoc", "text")
    assert documents == read_pydoc() and 40 < len(documents) <= len(topics)
    originals = ["".join(topics[key].split()) for key in sorted(topics)]
    paragraphs = ["".join(paragraph.split()) for document in documents for paragraph in document.split("\n\n")]
    assert all(any(paragraph in original for original in originals) for paragraph in paragraphs)
    assert sum(map(len, documents)) > 0.7 * sum(map(len, topics.values()))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", ["plain text\nof two lines \n"]),
        ("b.md", ["markdown é"]),
        ("c.json", TEXTS),
        ("d.jsonl.gz", TEXTS),
        ("e.txt.gz", ["packed text"]),
        ("f.parquet", TEXTS),
    ],
)
def test_each_kind_of_file(folder, name, expected):
    assert read_documents(str(folder / name), "text") == expected


def test_a_directory_is_its_files_in_order_and_a_list_is_concatenated(folder):
    whole = read_documents(str(folder), "text")
    assert whole == ["plain text\nof two lines \n", "markdown é", *TEXTS, *TEXTS, "packed text", *TEXTS]
    parts = [str(folder / "b.md"), str(folder / "a.txt"), "pydoc"]
    assert read_documents(parts, "text") == ["markdown é", "plain text\nof two lines \n", *read_pydoc()]


def test_another_text_field(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(["one"], field="content"))
    assert read_documents(str(path), "content") == ["one"]


def test_home_and_links_into_a_cache_of_blobs(tmp_path, monkeypatch):
    (tmp_path / "5e3f").write_bytes(lines(["one"]))  # the hub's cache keeps files under names without a suffix
    (tmp_path / "x.jsonl").symlink_to(tmp_path / "5e3f")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_documents("~/x.jsonl", "text") == ["one"]


GZIPPED = gzip.compress(lines(TEXTS))
EMPTY_TABLE = table_bytes({"text": pa.array([], pa.string())})
WRONG_FILES = {
    "utf8.txt": (b"caf\xe9", r"utf8\.txt' is not UTF-8 \(byte 0xe9 at offset 3\).*iconv"),
    "utf8.jsonl": (lines(["ok"]) + b'{"text": "caf\xe9"}\n', r"line 2, is not UTF-8"),
    "plain.json.gz": (lines(TEXTS), r"plain\.json\.gz' is not intact gzip.*download"),
    "cut.jsonl.gz": (GZIPPED[:-12], r"cut\.jsonl\.gz' is not intact gzip"),
    "cut.txt.gz": (GZIPPED[:-12], r"cut\.txt\.gz' is not intact gzip"),
    "flipped.txt.gz": (GZIPPED[:20] + bytes([GZIPPED[20] ^ 0xFF]) + GZIPPED[21:], r"is not intact gzip"),
    "pretty.json": (b'[\n  {"text": "a"}\n]\n', r"pretty\.json', line 1, is not JSON .*one JSON object a line"),
    "array.json": (b'[{"text": "a"}]\n', r"line 1, is of type list, not a JSON object"),
    "half.jsonl": (lines(["a"]) + b'{"text": "b', r"line 2, is not JSON"),
    "deep.jsonl": (b"[" * 200_000 + b"\n", r"line 1, is not JSON"),
    "field.jsonl": (lines(["a"]) + b"\n" + lines(["b"], "body"), r"line 3, has no field 'text'; it has \['body', 'u"),
    "number.jsonl": (b'{"text": 3}\n', r"line 1, field 'text' is of type int, not string"),
    "null.jsonl": (b'{"text": null}\n', r"line 1, field 'text' is of type NoneType, not string"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', r"line 1, field 'text' holds half a surrogate pair"),
    "empty.txt": (b"", r"empty\.txt' holds no text"),
    "blank.md": (b" \n\n", r"blank\.md' holds no text"),
    "empty.jsonl": (b"\n", r"empty\.jsonl' holds no text"),
    "empty.txt.gz": (b"", r"empty\.txt\.gz' holds no text"),
    "empty.parquet": (b"", r"empty\.parquet' is not intact parquet"),
    "text.parquet": (b"no parquet at all, but text", r"text\.parquet' is not intact parquet.*download"),
    "rows.parquet": (EMPTY_TABLE, r"rows\.parquet' holds no text"),
    "table.csv": (b"text\na\n", r"table\.csv' has an unknown suffix\. Accepted: \.txt"),
    "table.parquet.gz": (b"", r"unknown suffix"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_file_is_named_with_the_remedy(tmp_path, name):
    content, message = WRONG_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(str(tmp_path / name), "text")


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9, 0.999])
def test_a_truncated_parquet(folder, keep):
    path = folder / "f.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=r"f\.parquet' is not intact parquet"):
        read_documents(str(path), "text")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"body": ["a"]}, r"has no column 'text'; it has \['body'\]"),
        ({"text": [1, 2]}, r"column 'text' is of type int64, not string"),
        ({"text": ["a", "b", None]}, r"column 'text' is empty \(null\) in row 2"),
    ],
)
@pytest.mark.parametrize("through", ["pyarrow", "datasets"])
def test_a_wrong_column(tmp_path, column, message, through):
    path = str(tmp_path / "x.parquet")
    pq.write_table(pa.table(column), path)
    with pytest.raises(ValueError, match=message):
        read_documents(path, "text") if through == "pyarrow" else read_hub_file(path, "text")


def test_a_source_of_no_known_form_lists_all_forms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ["missing.txt", "", "wikitext", "owner/wikitext:", "a:b", "hf://datasets/allenai/c4", "x" * 5000]:
        with pytest.raises(ValueError, match="does not exist and has no known form") as error:
            read_documents(source, "text")
        assert all(form in str(error.value) for form in ["pydoc", "<directory>", "hf://", "<repo>:<config>:<split>"])
    with pytest.raises(ValueError, match="the list is empty"):
        read_documents([], "text")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"'bare' is a directory without any of \.txt"):
        read_documents("bare", "text")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.txt")
    with pytest.raises(ValueError, match="neither a regular file nor a directory"):
        read_documents(str(tmp_path / "x.txt"), "text")


def test_the_same_text_twice_is_refused(folder):
    with pytest.raises(ValueError, match=r"a\.txt' is given twice"):
        read_documents([str(folder / "a.txt"), str(folder / ".." / "corpus" / "a.txt")], "text")
    with pytest.raises(ValueError, match=r"b\.md' is given twice"):
        read_documents([str(folder), str(folder / "b.md")], "text")
    with pytest.raises(ValueError, match="'pydoc' is given twice"):
        read_documents(["pydoc", "pydoc"], "text")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", ["\ufeffplain text\nof two lines \n"]),
        ("e.txt.gz", ["packed text"]),
        ("d.jsonl.gz", TEXTS),
        ("f.parquet", TEXTS),
    ],
)
def test_hub_files_are_read_by_the_builder_of_their_suffix(folder, name, expected):
    documents = read_hub_file(str(folder / name), "text")  # the builders take local paths as they take hf:// addresses
    assert len(documents) == len(expected) and list(documents) == expected and documents[0] == expected[0]


def test_a_hub_address_reaches_load_dataset(monkeypatch):
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        return datasets.Dataset.from_dict({"text": TEXTS, "content": TEXTS[::-1]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    shard = "hf://datasets/allenai/c4/en/c4-train.00000-of-01024.json.gz"
    assert list(read_documents(shard, "text")) == TEXTS
    assert list(read_documents("Salesforce/wikitext:wikitext-2-raw-v1:validation", "text")) == TEXTS
    assert list(read_documents("imdb::train[:10%]", "content")) == TEXTS[::-1]
    assert list(read_documents(["imdb::test", "imdb::train"], "text")) == TEXTS + TEXTS
    assert calls == [
        (("json",), {"data_files": shard, "split": "train"}),
        (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "validation"}),
        (("imdb", None), {"split": "train[:10%]"}),
        (("imdb", None), {"split": "test"}),
        (("imdb", None), {"split": "train"}),
    ]
    with pytest.raises(ValueError, match=r"Text source 'hf://datasets/a/b/c.csv' has an unknown suffix"):
        read_documents("hf://datasets/a/b/c.csv", "text")


def test_a_dataset_folder_in_the_form_of_a_repository(tmp_path, monkeypatch):
    """The real library, from name to rows: a folder is to `load_dataset` what a repository is."""
    (tmp_path / "owner" / "corpus").mkdir(parents=True)
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "owner" / "corpus" / "validation.parquet")
    monkeypatch.chdir(tmp_path)
    assert list(read_hub_split("owner/corpus::validation", "text")) == TEXTS
    assert list(read_hub_split("owner/corpus::validation[1:3]", "text")) == TEXTS[1:3]
    with pytest.raises(ValueError, match=r"'owner/corpus::validation\[0:0\]' could not be loaded: .*no data"):
        read_hub_split("owner/corpus::validation[0:0]", "text")
    with pytest.raises(ValueError, match=r"'owner/corpus::trian' could not be loaded: ValueError: .*split"):
        read_hub_split("owner/corpus::trian", "text")


def test_what_datasets_cannot_load_is_a_value_error(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(["a"]) + b'{"text": "b')
    with pytest.raises(ValueError, match=r"x\.jsonl' could not be loaded: .*JSON") as error:
        read_hub_file(str(path), "text")
    assert "DatasetGenerationError" not in str(error.value)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'no-such-owner/corpus:a:train' could not be loaded: .*give a local file"):
        read_documents("no-such-owner/corpus:a:train", "text")


def test_the_extra_is_named_when_it_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"'imdb::train' needs the package 'datasets': pip .*--editable '\.\[data\]"):
        read_documents("imdb::train", "text")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ModuleNotFoundError, match=r"f\.parquet' needs the package .*pip install --editable '\.\[data\]'"):
        read_documents(str(folder / "f.parquet"), "text")
    assert read_documents(str(folder / "d.jsonl.gz"), "text") == TEXTS


def test_pydoc_topics_do_not_repeat_one_another():
    """Disjoint by topic means little if `for` is a section of `compound`: no 32 words in a row stand in two topics."""
    owner = {}
    for number, topic in enumerate(read_pydoc()):
        words = topic.split()
        for start in range(len(words) - 31):
            run = tuple(words[start : start + 32])
            assert owner.setdefault(run, number) == number, " ".join(run)
    assert len(set(owner.values())) > 40 and len(owner) > 30_000

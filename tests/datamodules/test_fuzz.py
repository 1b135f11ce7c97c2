"""Any bytes in a file of text, images, a graph or classes: a result, or a ValueError in one line that names the file.

Random bytes seldom get past the first check of a format, so most cases are valid files with some bytes changed.
"""

import gzip
import io
import json
import warnings
import zipfile

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from datamodules.graph_files import read_npz
from datamodules.graph_types import Graph
from datamodules.image_classes import read_classes
from datamodules.image_sources import FolderImages
from datamodules.text_sources import read_file

FUZZ = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = ["The first document.", "Ein zweites, mit Umlauten: äöü.", "x" * 300]
HOW = ("flip", "set", "cut", "insert", "delete", "repeat")
EDGES = (b"\x00", b"\xff", b"\xff\xff\xff\x7f", b"\xff" * 8, b"\x00" * 8, b"\n", b'"', b"}", b"\\u0000", b"\\ud800")


def mutated(valid):
    """Strategy: one of some valid contents with one to six changes, or any bytes."""

    def apply(content, changes, edge):
        for how, place, data in changes:
            at = int(place * max(len(content) - 1, 0))
            if how == "flip" and content:
                content = content[:at] + bytes([content[at] ^ (data[0] or 1)]) + content[at + 1 :]
            elif how == "set":
                content = content[:at] + edge + content[at + len(edge) :]
            elif how == "cut":
                content = content[:at]
            elif how == "insert":
                content = content[:at] + data + content[at:]
            elif how == "delete":
                content = content[:at] + content[at + len(data) :]
            elif how == "repeat":
                content = content[:at] + content[max(at - 50, 0) :]
        return content

    change = st.tuples(st.sampled_from(HOW), st.floats(0, 1), st.binary(min_size=1, max_size=8))
    changes = st.lists(change, min_size=1, max_size=6)
    broken = st.builds(apply, st.sampled_from(valid), changes, st.sampled_from(EDGES))
    return st.one_of(broken, broken, broken, st.binary(max_size=300))


def check(read, path, content):
    """Read the file; if that fails, it is as a user should see it."""
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return read(path)
        except ValueError as error:
            message = str(error)
            assert str(path) in message and "\n" not in message and len(message) < 1500, message
            assert message.endswith((".", ";")) or "; " in message, message  # and says what to do
            return None


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet_bytes(**options):
    stream = io.BytesIO()
    table = pyarrow.table({"text": TEXTS, "number": [1, 2, 3], "list": [[1], [], None]})
    parquet.write_table(table, stream, **options)
    return stream.getvalue()


TEXT_FILES = {
    "a.txt": ["\n".join(TEXTS).encode(), "ï»¿\ufeffbom".encode(), "wide".encode("utf-16")],
    "a.txt.gz": [gzip.compress("\n".join(TEXTS).encode(), mtime=0)],
    "a.json": [json.dumps([{"text": TEXTS[0]}], indent=1).encode(), json_lines([{"text": TEXTS[0]}])],
    "a.jsonl": [
        json_lines([{"text": text, "more": [1, {"a": None}]} for text in TEXTS]),
        json_lines([{"text": 1}]),
        b'{"text": "a", "n": ' + b"9" * 5000 + b"}",
        b"[" * 2000,
    ],
    "a.jsonl.gz": [gzip.compress(json_lines([{"text": text} for text in TEXTS]), mtime=0)],
    "a.parquet": [parquet_bytes(), parquet_bytes(compression="gzip"), parquet_bytes(use_dictionary=False, version="1.0")],
}


@pytest.mark.parametrize("name", TEXT_FILES)
def test_text_files(name, tmp_path):
    @FUZZ
    @given(mutated(TEXT_FILES[name]))
    def run(content):
        documents = check(lambda path: read_file(path, "text"), tmp_path / name, content)
        if documents is not None:
            assert all(isinstance(document, str) for document in documents)
            "".join(documents).encode()  # no lone surrogates, which a tokenizer would fail on

    run()


def image_bytes(form, mode="RGB", size=(9, 7), **options):
    stream = io.BytesIO()
    shape = (*size[::-1], len(mode)) if len(mode) > 1 else size[::-1]
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


IMAGES = {
    "png": [image_bytes("PNG"), image_bytes("PNG", "L"), image_bytes("PNG", "RGBA")],
    "jpg": [image_bytes("JPEG"), image_bytes("JPEG", progressive=True), image_bytes("JPEG", "L")],
    "other": [
        image_bytes("WEBP"),
        image_bytes("GIF", "L"),
        image_bytes("BMP"),
        image_bytes("TIFF", compression="tiff_lzw"),
        image_bytes("TIFF"),
        image_bytes("PPM"),
        b"P5 60000 60000 255\n1",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) (w) file\n",
    ],
}


@pytest.mark.parametrize("kind", IMAGES)
def test_image_files(kind, tmp_path):
    (tmp_path / "ant").mkdir()
    path = tmp_path / "ant" / ("x.jpg" if kind == "jpg" else "x.png")
    path.write_bytes(b"")
    source = FolderImages(tmp_path)

    @FUZZ
    @given(mutated(IMAGES[kind]))
    def run(content):
        image = check(lambda _: source.read(0), path, content)
        assert image is None or (image.mode == "RGB" and min(image.size) > 0)

    run()


def test_images_that_claim_to_be_large(tmp_path):
    (tmp_path / "ant").mkdir()
    path = tmp_path / "ant" / "x.png"
    path.write_bytes(b"")
    source, claimed = FolderImages(tmp_path), bytearray(image_bytes("PNG"))
    for width, height in ((2**31 - 1, 2**31 - 1), (2**31 - 1, 1), (0, 5), (12_000, 12_000)):
        claimed[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        assert check(lambda _: source.read(0), path, bytes(claimed)) is None
    assert check(lambda _: source.read(0), path, image_bytes("PNG", "L", (3000, 2))) is None  # resized it would be enormous
    assert check(lambda _: source.read(0), path, image_bytes("PNG", "L", (2000, 2))) is not None


def npz_bytes(compressed=True, **changes):
    arrays = {
        "attr_data": np.ones(6, np.float32),
        "attr_indices": np.array([0, 1, 2, 0, 1, 2]),
        "attr_indptr": np.arange(7),
        "attr_shape": np.array([6, 3]),
        "edge": np.array([[0, 1], [1, 2], [3, 4]]),
        "labels": np.array([0, 1, 0, 1, 0, 1]),
        "train1": np.array([0, 1]),
        "test1": np.array([4, 5]),
    } | changes
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, **arrays)
    return stream.getvalue()


def npy_bytes(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@FUZZ
@given(mutated([npz_bytes(), npz_bytes(compressed=False), npy_bytes(np.arange(5)), b"PK\x05\x06" + b"\0" * 18]))
def test_graph_files(tmp_path, content):
    graph = check(read_npz, tmp_path / "g.npz", content)
    assert graph is None or isinstance(graph, Graph)


ODD_ARRAYS = [
    np.array(5), np.zeros((0, 2)), np.zeros((3, 2, 2), int), np.array(["a", "b"]), np.array([1j]), np.array([np.nan, np.inf]),
    np.array([np.inf] * 6), np.array([2**40, 2**40]), np.array([6, 2**40]), np.array([2**63 + 1], np.uint64), np.array([True]),
    np.array([1e300] * 6), np.zeros(2, [("a", "i4")]), np.array([], int), np.array(["2020-01-01"], "M8[D]"),
]  # fmt: skip
NAMES = [
    "attr_data",
    "attr_indices",
    "attr_indptr",
    "attr_shape",
    "edge",
    "labels",
    "train1",
    "test1",
    "train1٣",
    "train" + "9" * 5000,
]
some_array = st.one_of(st.lists(st.integers(-2, 9), max_size=8).map(np.array), st.sampled_from(ODD_ARRAYS))


@FUZZ
@given(st.dictionaries(st.sampled_from(NAMES), some_array, min_size=1, max_size=4))
def test_graph_files_with_other_arrays(tmp_path, changes):
    graph = check(read_npz, tmp_path / "g.npz", npz_bytes(compressed=False, **changes))
    assert graph is None or (graph.x.isfinite().all() and graph.y.max() < len(graph.y))


def test_graph_file_with_a_member_that_is_no_array(tmp_path):
    stream = io.BytesIO(npz_bytes())
    with zipfile.ZipFile(stream, "a") as file:
        file.writestr("train2", b"no array")
    assert check(read_npz, tmp_path / "g.npz", stream.getvalue()) is None


def test_graph_file_whose_header_lies(tmp_path):
    """Arrays of 2^35 and 2^50 numbers, of which four are there."""
    array = npy_bytes(np.arange(4))
    for count in (2**35, 2**50):
        claim = b"'shape': (%d,), }" % count
        lying = array.replace(b"'shape': (4,), }".ljust(len(claim)), claim)
        assert lying != array and len(lying) == len(array)
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as file:
            file.writestr("labels.npy", lying)
        assert check(read_npz, tmp_path / "g.npz", stream.getvalue()) is None


@FUZZ
@given(
    mutated(
        [b"ant\nbee\ncat\n", b"0\tant\n1\tbee\n2\tcat\tmore\n", b"0\tant\n" + b"9" * 5000 + b"\tbee\n", "٠\tant\n".encode()]
    )
)
def test_class_lists(tmp_path, content):
    names = check(lambda path: read_classes(str(path)), tmp_path / "classes.txt", content)
    assert names is None or (len(names) == len(set(names)) > 0 and all(names))


def test_a_class_list_of_many_equal_lines_is_refused_at_once(tmp_path):
    assert (
        check(
            lambda path: read_classes(str(path)), tmp_path / "classes.txt", b"".join(b"%d\n" % (i // 2) for i in range(10**5))
        )
        is None
    )

"""What TextDataModule cuts from text: the parts of a split have nothing in common, windows are what they claim to be.

A document is a row of numbers here, and each number a token, so that a window tells which documents it was cut from."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.text_windows import (
    consecutive_windows,
    draw_from_documents,
    draw_from_stream,
    split_by_document,
    split_by_position,
)


def words(document):
    """A tokeniser for the functions below it: a number a word."""
    return torch.tensor([int(word) for word in document.split()], dtype=torch.long)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# The split


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=25),
    needed=st.integers(0, 120),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=200)
def test_split_by_document_is_disjoint_and_minimal(lengths, needed, seed):
    documents = [" ".join([str(i)] * n) for i, n in enumerate(lengths)]
    if sum(lengths) < needed:
        with pytest.raises(ValueError, match=rf"at least {needed} tokens, .* but got {sum(lengths)};"):
            split_by_document(documents, words, needed, generator(seed))
        return
    order, tokens = split_by_document(documents, words, needed, generator(seed))
    heldout = set(tokens.tolist())
    assert len(order) == len(set(order)) and not heldout & set(order)
    counts = Counter(tokens.tolist())
    assert all(count == lengths[i] for i, count in counts.items())  # whole documents
    assert len(tokens) >= needed and tokens.tolist() == sorted(tokens.tolist())  # in the order of the source
    assert len(tokens) == 0 or any(len(tokens) - lengths[i] < needed for i in heldout)  # one document too few before


def test_split_by_document_counts_what_the_joint_is_worth():
    """A tokeniser that merges across the joint: apart the documents seem to hold enough."""

    def pairs(document):
        return torch.zeros((len(document.replace("\n\n", "")) + 1) // 2, dtype=torch.long)

    _, tokens = split_by_document(["abc"] * 10, pairs, 4, generator())
    assert len(tokens) == 5  # two documents: 2 + 2 apart, 3 joined; three documents: 5


def test_split_by_position():
    calibration, heldout = split_by_position(torch.arange(10), 4, 6)
    assert calibration.tolist() == [0, 1, 2, 3, 4, 5] and heldout.tolist() == [6, 7, 8, 9]
    calibration, heldout = split_by_position(torch.arange(10), 0, 6)
    assert len(calibration) == 10 and len(heldout) == 0
    with pytest.raises(ValueError, match=r"at least 11 tokens, .* but got 10; give more text, or lower `seq_len`"):
        split_by_position(torch.arange(10), 4, 7)


# Windows


def test_windows_start_anywhere_in_the_stream_to_its_last_token():
    windows = draw_from_stream(torch.arange(10), 8, 200, generator())
    assert windows.shape == (200, 8) and set(windows[:, 0].tolist()) == {0, 1, 2}
    assert torch.equal(windows - windows[:, :1], torch.arange(8).expand(200, 8))
    assert draw_from_stream(torch.arange(8), 8, 2, generator()).tolist() == [list(range(8))] * 2
    with pytest.raises(ValueError, match=r"at least 9 tokens, .* but got 8;"):
        draw_from_stream(torch.arange(8), 9, 1, generator())


def test_consecutive_windows_drop_the_remainder():
    assert consecutive_windows(torch.arange(11), 4, "source").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match=r"`test_source` expected at least 4 tokens, for one test window, but got 3;"):
        consecutive_windows(torch.arange(3), 4, "test_source")


def test_only_drawn_documents_are_tokenised():
    seen = []

    def tokenise(document):
        seen.append(document)
        return words(document)

    documents = [" ".join([str(i)] * 9) for i in range(100_000)]
    order, heldout = split_by_document(documents, tokenise, 40, generator())
    windows = draw_from_documents(documents, order, tokenise, 8, 50, generator())
    assert len(windows) == 50 and len(heldout) == 45
    assert len(seen) == 5 + 1 + 50  # those held out, these joined, and one a window


def test_document_windows_have_random_offsets():
    document = " ".join(map(str, range(30)))
    windows = draw_from_documents([document], [0], words, 10, 300, generator())
    assert set(windows[:, 0].tolist()) == set(range(21))


def test_no_long_document_is_an_error_after_one_pass():
    passes = Counter()

    def tokenise(document):
        passes[document] += 1
        return words(document)

    with pytest.raises(ValueError, match=r"needs a document of 9 tokens, the longest of 3 calibration documents has 8"):
        draw_from_documents(["1 " * 8, "2 " * 5, "3"], [2, 0, 1], tokenise, 8, 4, generator())
    assert set(passes.values()) == {1} and len(passes) == 3

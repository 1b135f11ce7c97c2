"""Folders of images for the tests of data modules."""

import pytest

from tests.helpers.coloured_images import write_folder


@pytest.fixture
def root(tmp_path):
    """Folder of coloured images of three classes, for training and validation."""
    write_folder(tmp_path / "train", {"ant": 9, "bee": 12, "cat": 3})
    write_folder(tmp_path / "val", {"ant": 4, "bee": 2, "cat": 1})
    return tmp_path

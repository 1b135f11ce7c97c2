"""README.md is true: its tables are those of results/, the files and commands that it names exist."""

import re
from pathlib import Path

from benchmarks.tables import TABLES, TEXTS_WITH_TABLES, filled

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_result_files():
    texts = [path.read_text(encoding="utf-8") for path in TEXTS_WITH_TABLES]
    assert all(any(f"<!-- {name} -->" in text for text in texts) for name in TABLES)
    assert [filled(text) for text in texts] == texts, "run `python -m benchmarks.tables`"


def test_files_that_are_named_exist():
    folders = "configs|benchmarks|results|functional|callbacks|lightning_modules|datamodules"
    named = set(re.findall(rf"\b(?:{folders})/[\w./*-]+\w", README))
    assert len(named) > 8
    for path in named:
        assert list(ROOT.glob(path)), path


def test_settings_that_are_named_exist():
    """Every --option of a command and every setting of the tables can be given."""
    from callbacks import BlockwisePruning

    accepted = set(BlockwisePruning.__init__.__annotations__)
    rows = re.search(r"<!-- settings -->(.*?)<!-- /settings -->", README, re.DOTALL)[1]
    listed = set(re.findall(r"^\| `(\w+)`", rows, re.MULTILINE))
    assert listed == accepted - {"return"}

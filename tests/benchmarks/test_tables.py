"""Tables in README.md and docs/ are those of the files in results/."""

from benchmarks.markdown import ROOT
from benchmarks.tables import TABLES, TEXTS_WITH_TABLES, filled


def test_tables_are_those_of_the_result_files():
    texts = [path.read_text(encoding="utf-8") for path in TEXTS_WITH_TABLES]
    assert set(TEXTS_WITH_TABLES) == {ROOT / "README.md", *(ROOT / "docs").rglob("*.md")}
    assert all(any(f"<!-- {name} -->" in text for text in texts) for name in TABLES)
    assert [filled(text) for text in texts] == texts, "run `python -m benchmarks.tables`"

"""benchmarks.headline: the lines of README's figure are the rows of results/."""

from benchmarks.headline import LABELS, draw, lines
from benchmarks.markdown import read


def test_lines_are_the_rows_on_file():
    (row,) = [
        row
        for row in read("joint.csv")
        if (row["study"], row["variant"], row["calibration"], row["target"], row["seed"])
        == ("quality", "joint", "wikitext2-valid", "0.7", "0")
    ]
    found = lines()
    assert list(found) == list(LABELS) and found["joint"][0.7] == float(row["test_perplexity"])
    assert all(len(points) >= 2 for points in found.values())


def test_figure_has_a_line_for_each_method_and_for_the_dense_model():
    (axis,) = draw().axes
    assert [line.get_label() for line in axis.lines] == [*LABELS.values(), "dense model"]
    shown = dict(zip(axis.lines[5].get_xdata(), axis.lines[5].get_ydata(), strict=True))
    assert shown == lines()["joint"]

"""benchmarks.graph_gains: the figure's dots are the numbers of the table in docs/results.md."""

from benchmarks import graph_gains, graph_tables


def test_dots_are_those_of_the_table():
    lines = graph_tables.differences(graph_tables.COMPARED).split("\n")[2:]
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:4]] for line in lines}
    found = graph_tables.robust_accuracies()
    assert len(cells) == 30 == 3 * len(graph_gains.PAIRS)
    for dataset in graph_tables.DATASETS:
        for column, setting in enumerate(graph_gains.SHOWN):
            dots = graph_gains.points(found, dataset, setting)
            for (one, other), dot in zip(graph_gains.PAIRS, dots, strict=True):
                assert cells[f"{one} − {other}, {graph_tables.NAMES[dataset]}"][column] == "{:+.1f} ± {:.1f}".format(*dot)


def test_a_panel_has_every_pair_once_a_noise():
    axes = graph_gains.draw().axes
    assert [axis.get_title() for axis in axes] == ["Cora", "CiteSeer", "ACM"]
    for axis in axes:
        clean, noisy = (container.lines[0] for container in axis.containers)
        assert len(clean.get_xdata()) == len(noisy.get_xdata()) == 10
        assert (noisy.get_ydata() > clean.get_ydata()).all() and axis.yaxis_inverted()
    assert axes[0].get_yticklabels()[0].get_text() == "csg2l, default − gcn"

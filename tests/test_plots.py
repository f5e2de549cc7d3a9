"""The one style of all figures."""

import numpy as np

from experiments.common import plots
import figures


def test_a_band_is_a_deviation_of_the_seeds_to_each_side_of_their_mean():
    _, (axes,) = plots.panels(1, title="digits, 8 workers")
    plots.band(axes, [1, 2], [[0.1, 0.3], [0.6, 0.6]], label="vote")
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 0.2], [2, 0.6]])
    corners = axes.collections[0].get_paths()[0].vertices
    deviation = np.sqrt(2) / 10  # of 0.1 and 0.3
    assert {round(y, 6) for x, y in corners if x == 1} == {round(0.2 - deviation, 6), round(0.2 + deviation, 6)}
    assert {y for x, y in corners if x == 2} == {0.6}
    plots.band(axes, [1, 2], [[0.1], [0.2]], label="one seed")
    assert len(axes.collections) == 1  # which has no deviation


def test_panels_are_never_more_than_two_beside_each_other_and_unused_ones_are_off():
    figure, found = plots.panels(3, title="t")
    assert len(found) == 3 and [axes.axison for axes in figure.axes] == [True, True, True, False]
    assert figure.get_size_inches()[0] <= 8.5


def test_a_figure_out_of_style_is_told_so():
    figure, (axes,) = plots.panels(1, title="t")
    axes.plot([1, 2], [1, 2])
    axes.set(xlabel="steps")
    assert figures.problems(figure) == []
    axes.plot([1, 2], [2, 1], color="red")
    axes.text(1, 1, "small", fontsize=5)
    figure.suptitle("")
    axes.set(xlabel="")
    figure.set_size_inches(13, 4)
    assert figures.problems(figure) == [
        "no title", "too wide to be read at half width", "text too small", "no labels in ''", "red in ''",
    ]  # fmt: skip


def test_boxes_stand_from_top_to_bottom_with_their_limits():
    _, (axes,) = plots.panels(1, title="t")
    plots.boxes(axes, {"one": [1.0, 2.0], "two": [3.0, 4.0]}, limits={"two": 3.5})
    assert [text.get_text() for text in axes.get_yticklabels()] == ["one", "two"]
    assert axes.yaxis_inverted()
    (limit,) = axes.collections
    np.testing.assert_allclose(limit.get_segments()[0][:, 0], 3.5)

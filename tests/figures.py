"""What every figure of an experiment has to be like."""

from matplotlib.colors import same_color
from matplotlib.text import Text
import pytest

from experiments.common import plots

NEUTRAL = ("black", "grey", "white")


def drawn(experiment, records, folder):
    """The figures that an experiment draws from records, after a look at their style."""
    found = []

    def keep(figure, folder, name):
        found.append(figure)
        return [f"{folder}/{name}.png"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", keep)
        files = experiment.plot(records, str(folder))
    assert len(files) == len(found) > 0
    for figure in found:
        assert problems(figure) == []
    return found


def problems(figure):
    """What is wrong with a figure, in words."""
    figure.draw_without_rendering()
    said = []
    if not figure.get_suptitle():
        said.append("no title")
    if figure.get_size_inches()[0] > 10.1:
        said.append("too wide to be read at half width")
    if any(text.get_fontsize() < 7 for text in figure.findobj(Text) if text.get_text() and text.get_visible()):
        said.append("text too small")
    for axes in (axes for axes in figure.axes if axes.axison):
        if not axes.has_data():
            said.append(f"nothing in {axes.get_title()!r}")
        if not (axes.get_xlabel() or axes.get_ylabel() or figure.get_supxlabel()):
            said.append(f"no labels in {axes.get_title()!r}")
        for line in axes.lines:
            if not any(same_color(line.get_color(), colour) for colour in (*plots.COLOURS, *NEUTRAL)):
                said.append(f"{line.get_color()} in {axes.get_title()!r}")
    return said

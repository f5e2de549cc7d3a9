"""Plots: one style for all figures, readable at half width and by readers who are colour-blind.

Every figure says in its title what data and how many workers it is about, every axis has its unit, and a band is one
standard deviation of the seeds to each side of their mean.
"""

from collections.abc import Iterable, Mapping, Sequence
import pathlib
from typing import Any

from cycler import cycler
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

# Okabe and Ito's (2008), but for yellow, which is too light for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DIVERGING = "PuOr"  # purple and orange

matplotlib.rcParams.update(
    {
        "axes.prop_cycle": cycler(linestyle=["-", "--", ":"]) * cycler(color=COLOURS),
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 12,
        "figure.titlesize": 13,
        "font.size": 12,
        "grid.alpha": 0.3,
        "legend.fontsize": 9,
        "legend.framealpha": 0.7,
        "lines.linewidth": 2,
        "savefig.dpi": 150,
    }
)


def panels(
    count: int, *, title: str, columns: int = 2, width: float = 4.2, height: float = 3.4
) -> tuple[Figure, list[Axes]]:
    """A figure of panels, at most two beside each other, so that text stays readable at half width.

    Args:
      count: Panels.
      title: What all of them are about: data, workers, seeds.
      columns: The most panels beside each other.
      width: Inches of a panel.
      height: Inches of a panel.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    found = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in found[count:]:
        unused.set_axis_off()
    return figure, found[:count]


def band(axes: Axes, x: Sequence[Any], samples: Iterable[Sequence[float]], *, label: str, **style: Any) -> None:
    """Draw means over seeds as a line, and a standard deviation to each side as a band.

    Args:
      axes: Where.
      x: Positions.
      samples: For each of them the values of all seeds.
      label: In the legend.
      style: Of the line.
    """
    values = [np.asarray(found, float) for found in samples]
    means = np.array([found.mean() for found in values])
    spreads = np.array([found.std(ddof=1) if len(found) > 1 else 0.0 for found in values])
    (line,) = axes.plot(x, means, label=label, **style)
    if spreads.any():
        axes.fill_between(x, means - spreads, means + spreads, color=line.get_color(), alpha=0.2, linewidth=0)


def boxes(axes: Axes, values: Mapping[str, Sequence[float]], *, limits: Mapping[str, float] | None = None) -> None:
    """Draw the quartiles and outliers of each list of values, from top to bottom, and limits as dashed lines.

    Args:
      axes: Where.
      values: By what they are of.
      limits: Of some of them.
    """
    axes.boxplot(list(values.values()), tick_labels=list(values), orientation="horizontal")
    axes.invert_yaxis()
    for place, name in enumerate(values, start=1):
        if limits and name in limits:
            axes.vlines(limits[name], place - 0.35, place + 0.35, color=COLOURS[1], linestyle="--")


def save(figure: Figure, folder: str, name: str) -> list[pathlib.Path]:
    """Write a figure as `folder/name.png`.

    Returns:
      The file alone, as `plot` of an experiment does.
    """
    path = pathlib.Path(folder) / f"{name}.png"
    figure.savefig(path)
    return [path]

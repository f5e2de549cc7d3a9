"""Draw figures as SVG, one for light pages and one for dark ones, from the records that are kept.

    python docs/gallery/draw.py              # all of experiments/measured/
    python docs/gallery/draw.py train        # one of them

Figures are written to docs/_static/figures/NAME/. The same records give the same bytes. An experiment's own `plot` draws;
the colours of text and lines are put in afterwards, so that a plot need not know about themes. Of records that were
kept without what a plot needs there is no figure.
"""

from collections.abc import Callable
import importlib
import pathlib
import re
import shutil
import sys
import tempfile
import unittest.mock

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import matplotlib
from matplotlib.figure import Figure

from experiments.__main__ import load
from experiments.common import records as recorded

MEASURED = ROOT / "experiments" / "measured"
FIGURES = ROOT / "docs" / "_static" / "figures"
INK = "#010203"  # stands for a theme's colour of text until the file is written
THEMES = {"light": "#1f2328", "dark": "#d1d7e0"}
STYLE = {
    **dict.fromkeys(
        ("axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "text.color", "xtick.color", "ytick.color"), INK
    ),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
    "grid.color": INK,
    "legend.framealpha": 0.0,
    "savefig.transparent": True,
    "svg.fonttype": "path",  # the same everywhere, formulas too
    "svg.hashsalt": "signopt",
}


def themed(svg: str, theme: str) -> str:
    """A figure in the colours of a theme. What a plot draws in black is ink, too."""
    for colour in (INK, "#000000"):
        svg = svg.replace(colour, THEMES[theme])
    # Text and tick labels without a colour of their own are black.
    svg = re.sub(r"<svg ", f'<svg fill="{THEMES[theme]}" ', svg, count=1)
    return re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)


def draw(plot: Callable, records: list[recorded.Record], folder: pathlib.Path) -> list[pathlib.Path]:
    """Draw what an experiment plots, once for each theme.

    Args:
      plot: Of an experiment.
      records: What it reads.
      folder: Where to; what was there is replaced.
    """
    written, save = [], Figure.savefig

    def save_svg(figure, path, **kwargs):
        del kwargs
        with tempfile.TemporaryDirectory() as aside:
            drawn = pathlib.Path(aside) / "figure.svg"
            save(figure, drawn, metadata={"Date": None, "Creator": None})
            svg = drawn.read_text(encoding="utf-8")
        for theme in THEMES:
            written.append(folder / f"{pathlib.Path(path).stem}-{theme}.svg")
            written[-1].write_text(themed(svg, theme), encoding="utf-8")

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with matplotlib.rc_context(STYLE), unittest.mock.patch.object(Figure, "savefig", save_svg):
        plot(records, str(folder))
    return written


def main(names: list[str]) -> None:
    importlib.import_module("experiments.common.plots")  # sets the style
    for name in names or sorted(path.parent.name for path in MEASURED.glob(f"*/{recorded.FILE}")):
        records = recorded.read(MEASURED / name / recorded.FILE)
        experiment = load(records[0]["experiment"])
        try:
            written = draw(experiment.plot, records, FIGURES / name)
        except (IndexError, KeyError, ValueError) as error:
            shutil.rmtree(FIGURES / name)
            print(f"no figure of {name}: its records lack {error}")
            continue
        print("\n".join(str(path.relative_to(ROOT)) for path in written))


if __name__ == "__main__":
    main(sys.argv[1:])

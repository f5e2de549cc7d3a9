"""Draw figures as SVG, one for light pages and one for dark ones, from the records of experiments.

    python docs/gallery/draw.py                          # all of experiments/measured/
    python docs/gallery/draw.py results/train            # keep the records of a run, and draw its figures

Records are kept in experiments/measured/NAME/records.jsonl, figures in docs/_static/figures/NAME/. The same records
give the same bytes. An experiment's own `plot` draws; the colours of text and lines are put in afterwards, so that a
plot need not know about themes.
"""

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

MEASURED = ROOT / "experiments" / "measured"
FIGURES = ROOT / "docs" / "_static" / "figures"
INK, FAINT = "#010203", "#040506"  # stand for a theme's colours until the file is written
THEMES = {"light": {INK: "#1f2328", FAINT: "#d1d9e0"}, "dark": {INK: "#d1d7e0", FAINT: "#3d444d"}}
# Okabe and Ito's colours, which colour-blind readers tell apart, without those that vanish on white or on black.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
STYLE = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "figure.facecolor": "none",
    "font.size": 11,
    "grid.alpha": 1.0,
    "grid.color": FAINT,
    "legend.framealpha": 0.0,
    "savefig.transparent": True,
    "svg.fonttype": "path",
    "svg.hashsalt": "signopt",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def themed(svg: str, theme: str) -> str:
    """A figure in the colours of a theme. What a plot draws in black is ink."""
    for stands_for, colour in (THEMES[theme] | {"#000000": THEMES[theme][INK]}).items():
        svg = svg.replace(stands_for, colour)
    return re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)


def draw(name: str) -> list[pathlib.Path]:
    """Draw the figures of an experiment whose records are kept."""
    from experiments.__main__ import experiments

    found = experiments()[name]
    module = getattr(found, "module", name)
    experiment = __import__(f"experiments.{module}", fromlist=["plot"])
    from experiments import __name__ as package

    records = __import__(
        f"{package}.common.records" if hasattr(found, "module") else f"{package}.records", fromlist=["read"]
    )
    target = FIGURES / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    save, written = Figure.savefig, []

    def save_svg(figure, path, **kwargs):
        del kwargs
        with tempfile.TemporaryDirectory() as folder:
            drawn = pathlib.Path(folder) / "figure.svg"
            save(figure, drawn, metadata={"Date": None, "Creator": None})
            for theme in THEMES:
                written.append(target / f"{pathlib.Path(path).stem}-{theme}.svg")
                written[-1].write_text(themed(drawn.read_text(encoding="utf-8"), theme), encoding="utf-8")

    with matplotlib.rc_context(STYLE), unittest.mock.patch.object(Figure, "savefig", save_svg):
        experiment.plot(records.read(MEASURED / name / "records.jsonl"), str(target))
    return written


def main(runs: list[str]) -> None:
    for run in map(pathlib.Path, runs):
        (MEASURED / run.name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / "records.jsonl", MEASURED / run.name / "records.jsonl")
    names = [pathlib.Path(run).name for run in runs] or sorted(
        path.parent.name for path in MEASURED.glob("*/records.jsonl")
    )
    for name in names:
        for path in draw(name):
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main(sys.argv[1:])

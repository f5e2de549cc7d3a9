"""The claims of the papers around signSGD that are no problem of `suite`: one figure for each.

* `evaluations`, `slopes`: steps from values of the loss alone, by dimension; and what travels if workers share directions.
* `conditions`, `depths`: ScaledSGD by the condition of a matrix, and descent by the depth of a linear chain.
* `kinks`: whether a ReLU network is at a local minimum, also where it has no derivative.
* `noise`, `leaders`: noise on each worker's steps between averages, and workers that follow the best of them.
* `proximal`: small batches with a pull to an anchor.
* `late`: strongly convex descent whose coordinates are read late.

    python -m experiments neighbours
    python -m experiments neighbours --claims noise --seeds 10

Time and numbers to expect are in experiments/README.md.
"""

from collections.abc import Callable, Iterator
import dataclasses
import pathlib
from typing import NamedTuple

import numpy as np
import rich.console
import rich.table

from experiments.common import plots
from experiments.common import progress
from experiments.common.flags import flag
from experiments.common.records import Record
from experiments.papers import apart
from experiments.papers import factors
from experiments.papers import kinks
from experiments.papers import values


class Claim(NamedTuple):
    """A figure.

    Attributes:
      run: From a number of seeds to records with a "line", an "x" and "values", one for each seed.
      x: What the lines are drawn over.
      y: What is measured.
      log: Whether both axes are logarithmic.
      expect: What the paper, or theory, says.
    """

    run: Callable[[int], Iterator[Record]]
    x: str
    y: str
    log: bool
    expect: str


CLAIMS = {
    "evaluations": Claim(
        values.evaluations, "dimension", "evaluations", True, "as d where all counts, as log d where few coordinates do"
    ),
    "slopes": Claim(
        values.borders, "bits a step and worker", "loss left", True, "a few floats, or bits, a step are enough"
    ),
    "conditions": Claim(
        factors.conditions, "condition number", "steps", True, "SGD's grow with it, ScaledSGD's do not"
    ),
    "depths": Claim(factors.depths, "factors", "steps", True, "exponential in the depth for gradient descent"),
    "kinks": Claim(
        kinks.descents, "steps", "steepest slope", False, "what is stationary, and what is not, can be told"
    ),
    "noise": Claim(apart.noise, "noise", "test accuracy", False, "better generalisation than without noise"),
    "leaders": Claim(apart.leaders, "steps a round", "test accuracy", False, "following the best beats the mean"),
    "proximal": Claim(apart.proximal, "batch size", "test accuracy", False, "pulled ahead at small batches"),
    "late": Claim(apart.late, "longest delay", "squared distance", False, "falls as 1/t at any delay"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    claims: tuple[str, ...] = flag(tuple(CLAIMS), "which", choices=tuple(CLAIMS))
    workers: int = flag(1, "devices to ask for", at_least=1)
    seeds: int = flag(8, "number of runs: seeds 0, 1, 2, ...", at_least=1)
    output: str = flag("results/neighbours", "folder for records and plots")


def run(config: Config) -> Iterator[Record]:
    """Measure one claim after the other.

    Yields:
      A record for each point of a line.
    """
    for name in progress.track(config.claims, "claims"):
        for record in CLAIMS[name].run(config.seeds):
            yield {"claim": name} | record


def lines(records: list[Record], claim: str) -> dict[str, dict[float, list[float]]]:
    """The values at each x of each line."""
    found: dict[str, dict[float, list[float]]] = {}
    for record in (r for r in records[1:] if r["claim"] == claim):
        found.setdefault(record["line"], {})[record["x"]] = record["values"]
    return found


def written(record: Record, seeds: int) -> str:
    """The mean of a point's values, and their deviation."""
    own = record["values"]
    if not own:
        return "never"
    spread = f" ± {np.std(own, ddof=1):.2g}" if len(own) > 1 else ""
    some = f" ({len(own)} of {seeds})" if len(own) < seeds else ""
    capped = f" ({record['capped']} at the limit)" if record.get("capped") else ""
    slope = f", exponent {record['exponent']:.2f}" if "exponent" in record else ""
    return f"{np.mean(own):.3g}{spread}{some}{capped}{slope}"


def summary(records: list[Record]) -> list[list[list[str]]]:
    """A table for each claim."""
    found = []
    for name in [name for name in records[0]["config"]["claims"] if lines(records, name)]:
        claim, own = CLAIMS[name], [r for r in records[1:] if r["claim"] == name]
        if name == "slopes":
            rows = [["slopes", claim.x, claim.y]]
            rows += [[r["line"], f"{r['x']:g}", written(r, records[0]["config"]["seeds"])] for r in own]
        else:
            positions = sorted({r["x"] for r in own})
            rows = [[f"{claim.y} by {claim.x}", *(f"{x:g}" for x in positions)]]
            for line in lines(records, name):
                at = {r["x"]: written(r, records[0]["config"]["seeds"]) for r in own if r["line"] == line}
                rows.append([line, *(at.get(x, "") for x in positions)])
        found.append(rows)
    return found


def table(records: list[Record]) -> rich.console.Group:
    """The same, with what each paper says."""
    drawn = []
    shown = [name for name in records[0]["config"]["claims"] if lines(records, name)]
    for name, (header, *rows) in zip(shown, summary(records), strict=True):
        one = rich.table.Table(*header, title=f"{name}: to expect: {CLAIMS[name].expect}")
        for row in rows:
            one.add_row(*row)
        drawn.append(one)
    return rich.console.Group(*drawn)


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw every claim.

    Returns:
      The figures' files.
    """
    shown = [name for name in records[0]["config"]["claims"] if lines(records, name)]
    figure, panels = plots.panels(len(shown), title=f"{records[0]['config']['seeds']} seeds", width=4.8)
    for axes, name in zip(panels, shown, strict=True):
        claim = CLAIMS[name]
        for line, points in lines(records, name).items():
            positions = [x for x in sorted(points) if points[x]]
            plots.band(axes, positions, [points[x] for x in positions], label=line, marker=".")
        axes.set(title=name, xlabel=claim.x, ylabel=claim.y)
        if claim.log:
            axes.set(xscale="log", yscale="log")
        axes.legend(fontsize=7)
    return plots.save(figure, folder, "neighbours")

"""Figures 1, 2 and 4 of signSGD, and the curvature they lack: how dense gradients, noise and curvature are on the way.

A network learns the digits by SGD; every so often `python -m signopt geometry` looks at it. The densities of gradient and
noise are the figure 1 of Bernstein et al. (2018; theirs: both dense and coupled, all through the training of a ResNet), the density of the
gradient at step 0 is its figure 4, and histograms of the noise of some parameters are its figure 2. For a loss of your
own take `python -m signopt geometry --loss package.module:function`.

    python -m experiments geometry

Time and numbers to expect are in experiments/README.md.
"""

from collections.abc import Iterator
import dataclasses
import pathlib

import rich.table

from experiments.common import losses
from experiments.common import plots
from experiments.common import progress
from experiments.common.flags import flag
from experiments.common.records import Record
from signopt import diagnostics
from signopt._tools import geometry
from signopt._tools import problem

MODELS = {"mlp": losses.mlp, "wide": losses.wide, "cnn": losses.cnn}


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    model: str = flag("mlp", "which network", choices=tuple(MODELS))
    learning_rate: float = flag(0.1, "of SGD", at_least=0)
    steps: int = flag(300, "training steps", at_least=0)
    measure_every: int = flag(50, "steps between two looks", at_least=1)
    probes: int = flag(8, "of the Hessian", at_least=1)
    watched: int = flag(4, "parameters whose noise is drawn as histograms", at_least=1)
    threshold: float = flag(diagnostics.MUCH_MORE, "what 'much denser' means", at_least=1)
    workers: int = flag(1, "devices to ask for", at_least=1)
    seeds: int = flag(1, "seed 0 makes the network", at_least=1)
    output: str = flag("results/geometry", "folder for records and plots")


def run(config: Config) -> Iterator[Record]:
    """Train with SGD and look at the geometry on the way.

    Yields:
      A record for each look.
    """
    looks = geometry.along_the_path(
        problem.of(MODELS[config.model]()),
        learning_rate=config.learning_rate,
        steps=config.steps,
        measure_every=config.measure_every,
        probes=config.probes,
        threshold=config.threshold,
        watched=config.watched,
    )
    with progress.telling("geometry") as tell:
        for record in looks:
            tell(f"step {record['step']} of {config.steps}")
            yield record


def table(records: list[Record]) -> rich.table.Table:
    """Densities and ratios, and what the typical ones mean."""
    drawn = rich.table.Table(title="geometry along the path of SGD, one worker")
    for column in geometry.COLUMNS:
        drawn.add_column(column, justify="right")
    for record in records[1:]:
        drawn.add_row(*geometry.row(record))
    drawn.caption = records[len(records) // 2]["words"]
    return drawn


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw densities, ratios, and histograms of the noise at the first and the last look.

    Returns:
      The figures' files.
    """
    config, looks = records[0]["config"], records[1:]
    title = f"digits, {config['model']}, one worker"
    figure, (densities, ratios) = plots.panels(2, title=title)
    steps = [r["step"] for r in looks]
    for name, label in (("gradient", "g"), ("noise", r"\sigma"), ("curvature", "L")):
        densities.plot(steps, [r[f"{name}_density"] for r in looks], marker="o", label=rf"$\phi({label})$")
    for name, label in (("curvature_ratio", "$R_1$"), ("noise_ratio", "$R_2$")):
        ratios.plot(steps, [r[name] for r in looks], marker="o", label=label)
    ratios.axhline(config["threshold"], color="grey", linestyle="--", label="much denser")
    densities.set(xlabel="steps", ylabel="density", ylim=(0, 1))
    ratios.set(xlabel="steps", ylabel="ratio of densities", ylim=(0, None))
    for axes in (densities, ratios):
        axes.legend()
    files = plots.save(figure, folder, "geometry")
    watched = len(looks[0]["noise"])
    title = f"noise of {watched} parameters at steps {steps[0]} and {steps[-1]}"
    figure, panels = plots.panels(2 * watched, title=title, columns=watched, width=2, height=1.8)
    for axes, noise in zip(panels, looks[0]["noise"] + looks[-1]["noise"], strict=True):
        axes.hist(noise, bins=20)
        axes.set(yticks=[])
    figure.supxlabel("gradient of a mini-batch, less the mean of all")
    return files + plots.save(figure, folder, "noise")

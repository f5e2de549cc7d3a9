"""Learning rate and weight decay together: where Signum is good, and where Adam is.

Figure 6 of signSGD (Bernstein et al., 2018), on the digits: test accuracy over a grid of learning rates and of decoupled weight
decays, x <- x - a (u + w x), for voted Signum, and for AdamW and SGD with momentum on the mean gradient. By default rates follow a
cosine to zero, and the last fifth of the training images is the test.

    python -m experiments sweep

Time and numbers to expect are in experiments/README.md.
"""

from collections.abc import Iterator
import dataclasses
import pathlib

import jax
import numpy as np
import optax
import rich.table

from experiments.common import plots
from experiments.common import progress
from experiments.common import runners
from experiments.common import trials
from experiments.common.flags import flag
from experiments.common.records import Record
import signopt

AXIS = runners.AXIS
METHODS = ("signum", "adamw", "sgd")
# A step of SGD is as long as its gradient is small: its grid lies a factor of this higher.
_SGD = 16.0
# Below it maps are not compared, and the colours end.
FLOOR = 0.9


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    methods: tuple[str, ...] = flag(METHODS, "what to compare", choices=METHODS)
    learning_rates: tuple[float, ...] = flag(
        (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128, 0.256),
        f"peaks, in order, with a constant factor between neighbours; times {_SGD:g} for sgd",
        at_least=0,
    )
    weight_decays: tuple[float, ...] = flag(
        (0.0, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0), "times the parameters, beside the votes", at_least=0
    )
    workers: int = flag(8, "number of workers", at_least=1)
    schedule: str = flag("cosine", "how learning rates go on from their peak", choices=("cosine", "linear", "constant"))
    mask: bool = flag(False, "let only matrices decay, not biases")
    wire: str = flag("two_bit", "how votes travel", choices=("one_bit", "two_bit", "psum"))
    steps: int = flag(600, "training steps", at_least=1)
    batch_size: int = flag(8, "examples per worker and step", at_least=1)
    validation: bool = flag(True, "test on the last fifth of the training images")
    seeds: int = flag(2, "number of runs: seeds 0, 1, 2, ...", at_least=1)
    output: str = flag("results/sweep", "folder for records and plots")


def _optimizer(config, method, learning_rate, weight_decay):
    relative = {
        "cosine": optax.cosine_decay_schedule(1.0, config.steps),
        "linear": optax.linear_schedule(1.0, 0.0, config.steps),
        "constant": optax.constant_schedule(1.0),
    }[config.schedule]

    def schedule(count):
        return learning_rate * relative(count)

    mask = (lambda params: jax.tree.map(lambda p: p.ndim > 1, params)) if config.mask else None
    if method == "signum":
        voting = {"axis_name": AXIS, "num_workers": config.workers, "wire": config.wire}
        return signopt.signum(schedule, weight_decay=weight_decay, mask=mask, **voting)
    inner = optax.scale_by_adam() if method == "adamw" else optax.trace(0.9)
    decayed = optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(signopt.mean(AXIS), inner, decayed, optax.scale_by_learning_rate(schedule))


def run(config: Config) -> Iterator[Record]:
    """Train with every method at every point of the grid.

    Yields:
      A record for each method, learning rate, weight decay and seed.
    """
    for method in progress.track(config.methods, "grids"):
        rates, decays, seeds = trials.grid(config.learning_rates, config.weight_decays, seeds=config.seeds)
        rates = rates * (_SGD if method == "sgd" else 1.0)
        found = trials.train(
            lambda setting, method=method: _optimizer(config, method, *setting),
            (rates.astype(np.float32), decays.astype(np.float32)),
            seeds,
            workers=config.workers,
            steps=config.steps,
            batch_size=config.batch_size,
            validation=config.validation,
        )
        for i in range(len(seeds)):
            yield {
                "method": method,
                "learning_rate": float(rates[i]),
                "weight_decay": float(decays[i]),
                "seed": int(seeds[i]),
                "test_accuracy": float(found.test_accuracy[i]),
            }


def heat(records: list[Record], method: str) -> tuple[list[float], list[float], np.ndarray]:
    """Learning rates, weight decays, and the mean accuracy over seeds; shape (learning rates, weight decays)."""
    own = [record for record in records[1:] if record["method"] == method]
    rates, decays = (sorted({record[name] for record in own}) for name in ("learning_rate", "weight_decay"))
    sums = np.zeros((len(rates), len(decays), 2))
    for record in own:
        at = rates.index(record["learning_rate"]), decays.index(record["weight_decay"])
        sums[at] += (record["test_accuracy"], 1)
    return rates, decays, sums[..., 0] / sums[..., 1]


def similarity(records: list[Record], one: str, other: str) -> tuple[float, float]:
    """How alike two heat maps are, up to a factor between the learning rates.

    Returns:
      The largest correlation over all shifts of one map's learning rates that leave two thirds of them, accuracies below
      `FLOOR` counted as that; and the factor by which `other` wants larger ones.
    """
    rates, _, a = heat(records, one)
    others, _, b = heat(records, other)
    a, b = np.maximum(a, FLOOR), np.maximum(b, FLOOR)
    found = []
    for shift in range(-(len(rates) // 3), len(rates) // 3 + 1):
        kept = len(rates) - abs(shift)
        rows = slice(max(0, -shift), max(0, -shift) + kept), slice(max(0, shift), max(0, shift) + kept)
        x, y = a[rows[0]].ravel(), b[rows[1]].ravel()
        alike = float(np.corrcoef(x, y)[0, 1]) if x.std() and y.std() else 0.0
        found.append((alike, others[rows[1].start] / rates[rows[0].start]))
    return max(found)


def table(records: list[Record]) -> rich.table.Table:
    """The best point of each method, and how alike the maps are."""
    config = records[0]["config"]
    drawn = rich.table.Table(
        title=f"digits, {config['workers']} workers, {config['steps']} steps, mean of {config['seeds']} seeds"
    )
    for column in ("method", "best", "learning rate", "weight decay", "cells within 0.01 of it", "like signum's"):
        drawn.add_column(column, justify="left" if column == "method" else "right")
    for method in config["methods"]:
        rates, decays, found = heat(records, method)
        i, j = np.unravel_index(found.argmax(), found.shape)
        alike = ""
        if "signum" in config["methods"] and method != "signum":
            alike = "{:.2f}, rates x {:g}".format(*similarity(records, "signum", method))
        wide = f"{int((found >= found.max() - 0.01).sum())} of {found.size}"
        drawn.add_row(method, f"{found.max():.4f}", f"{rates[i]:g}", f"{decays[j]:g}", wide, alike)
    return drawn


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw a heat map for each method.

    Returns:
      The figures' files.
    """
    config = records[0]["config"]
    title = f"digits, {config['workers']} workers, {config['seeds']} seeds"
    figure, panels = plots.panels(len(config["methods"]), title=title, width=5, height=5)
    for axes, method in zip(panels, config["methods"], strict=True):
        rates, decays, found = heat(records, method)
        image = axes.imshow(found, vmin=FLOOR, vmax=1.0, cmap="cividis", origin="lower", aspect="auto")
        for (i, j), value in np.ndenumerate(found):
            colour = "black" if value > (1 + FLOOR) / 2 else "white"
            axes.text(j, i, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=9, color=colour)
        axes.set(title=method, xlabel="weight decay", ylabel="learning rate")
        axes.set_xticks(range(len(decays)), [f"{decay:g}" for decay in decays])
        axes.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.grid(visible=False)
    figure.colorbar(image, ax=panels, label="test accuracy")
    return plots.save(figure, folder, "sweep")

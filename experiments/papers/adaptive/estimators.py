"""What `mh_signsgd` may choose, on a network: the estimator of the learning rate, the smoothness, and the momentum.

Four workers with 64 images each train the small network of digits (64-64-10), as in the part `network`, where a run
of the paper's convolutional network takes minutes. Every estimator runs with the smoothness of the paper, the number of
parameters, and with the measured one, and the default with several betas; beside them voted signSGD and Signum with the
best constant learning rate of a sweep, which see the test images to choose it. No figure of a paper.
"""

from collections.abc import Iterator
import dataclasses
import functools
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


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    workers: int = flag(4, "number of workers", at_least=2)
    batch_size: int = flag(64, "examples per worker and step", at_least=1)
    steps: int = flag(1000, "training steps", at_least=1)
    betas: tuple[float, ...] = flag((0.0, 0.9, 0.95, 0.98, 0.99), "decay rates of the momentum that is voted with")
    learning_rates: tuple[float, ...] = flag(
        (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1), "what fixed ones may choose from"
    )
    refresh_every: int = flag(100, "steps between two measurements of the curvature", at_least=1)
    seeds: int = flag(5, "number of runs", at_least=1)
    first_seed: int = flag(0, "the seed of the first run; the others follow", at_least=0)
    validation: bool = flag(False, "test on the last fifth of the training images instead")
    output: str = flag("results/estimators", "folder for records and plots")


def methods(config: Config) -> dict[str, tuple]:
    """What to compare: from a setting to an optimizer, what the setting is, and its values."""
    found: dict[str, tuple] = {}
    measured = signopt.measured_smoothness(jax.random.key(0), refresh_every=config.refresh_every)
    for estimator in ("margin", "exact", "leave_one_out"):
        for name, smoothness in (("dimension", None), ("curvature", measured)):
            make = functools.partial(
                signopt.mh_signsgd,
                axis_name=AXIS,
                num_workers=config.workers,
                estimator=estimator,
                smoothness=smoothness,
                wire="one_bit" if estimator == "margin" else "psum",
            )
            betas = config.betas if smoothness is None else (0.95,)
            found[f"{estimator}, {name}"] = (lambda b, make=make: make(beta=b), "beta", betas)
    shared = {"axis_name": AXIS, "num_workers": config.workers, "wire": "one_bit"}
    for name, alias in (("signSGD", signopt.signsgd), ("Signum", signopt.signum)):
        make = functools.partial(alias, **shared)
        found[name] = (make, "learning rate", config.learning_rates)
    return found


def run(config: Config) -> Iterator[Record]:
    """Train with every method, setting and seed.

    Yields:
      A record for each.
    """
    for name, (make, what, values) in progress.track(methods(config).items(), "estimators"):
        settings, seeds = trials.grid(np.asarray(values, np.float32), seeds=config.seeds)
        found = trials.train(
            make,
            settings,
            config.first_seed + seeds,
            workers=config.workers,
            steps=config.steps,
            batch_size=config.batch_size,
            validation=config.validation,
        )
        rates = optax.tree.get(found.opt_state, "learning_rate") if what == "beta" else settings
        for i in range(len(seeds)):
            yield {
                "method": name,
                "what": what,
                "setting": values[i // config.seeds],
                "seed": config.first_seed + int(seeds[i]),
                "test_accuracy": float(found.test_accuracy[i]),
                "train_loss": float(found.train_loss[i]),
                "learning_rate": float(rates[i]),
            }


def groups(records: list[Record]) -> dict[tuple[str, float], list[Record]]:
    """The seeds' records, by method and setting."""
    found: dict[tuple[str, float], list[Record]] = {}
    for record in records[1:]:
        found.setdefault((record["method"], record["setting"]), []).append(record)
    return found


def table(records: list[Record]) -> rich.table.Table:
    """Accuracy and loss of every method and setting; of fixed learning rates the best alone."""
    config = records[0]["config"]
    drawn = rich.table.Table(
        title=f"digits, {config['workers']} workers, {config['steps']} steps, mean of {config['seeds']}"
    )
    for column in ("method", "setting", "accuracy", "loss", "learning rate at the end"):
        drawn.add_column(column, justify="left" if column == "method" else "right")

    def accuracy(group):
        return np.mean([record["test_accuracy"] for record in group])

    kept = groups(records)
    fixed = {
        name: [key for key, own in kept.items() if key[0] == name and own[0]["what"] != "beta"] for name, _ in kept
    }
    worse = {key for keys in fixed.values() for key in keys if key != max(keys, key=lambda key: accuracy(kept[key]))}
    for (name, setting), own in kept.items():
        if (name, setting) in worse:
            continue
        spread = np.std([r["test_accuracy"] for r in own], ddof=1) if len(own) > 1 else 0.0
        drawn.add_row(
            name, f"{own[0]['what']} {setting:g}", f"{accuracy(own):.4f} ± {spread:.4f}",
            f"{np.mean([r['train_loss'] for r in own]):.2g}", f"{np.mean([r['learning_rate'] for r in own]):.1e}",
        )  # fmt: skip
    return drawn


def summary(records: list[Record]) -> list[list[str]]:
    """Accuracy by estimator and beta, and the best of the fixed learning rates."""
    config, found = records[0]["config"], groups(records)
    accuracy = {key: float(np.mean([record["test_accuracy"] for record in own])) for key, own in found.items()}
    rows = [["digits: test accuracy", *(f"beta {beta:g}" for beta in config["betas"])]]
    blank = [""] * len(config["betas"])
    for name in dict.fromkeys(name for name, _ in found):
        own = {setting: value for (method, setting), value in accuracy.items() if method == name}
        if next(r for (method, _), (r, *_) in found.items() if method == name)["what"] == "beta":
            rows.append([name, *(f"{own[beta]:.4f}" if beta in own else "" for beta in config["betas"])])
        else:
            best = max(own, key=own.__getitem__)
            rows.append([f"{name}, the best rate of {len(own)}: {best:g}", f"{own[best]:.4f}", *blank[1:]])
    return rows


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw accuracy against beta, and against the learning rate where that is fixed.

    Returns:
      The figures' files.
    """
    config = records[0]["config"]
    title = f"digits, {config['workers']} workers, {config['seeds']} seeds"
    figure, found = plots.panels(2, title=title, columns=1, width=6.5)
    axes = dict(zip(("beta", "learning rate"), found, strict=True))
    for name in dict.fromkeys(record["method"] for record in records[1:]):
        own = {setting: group for (method, setting), group in groups(records).items() if method == name}
        accuracies = [[record["test_accuracy"] for record in group] for group in own.values()]
        plots.band(axes[next(iter(own.values()))[0]["what"]], list(own), accuracies, label=name, marker="o")
    axes["learning rate"].set(xscale="log")
    for label, ax in axes.items():
        ax.set(xlabel=label, ylabel="test accuracy", ylim=(0.9, 1.0))
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return plots.save(figure, folder, "estimators")

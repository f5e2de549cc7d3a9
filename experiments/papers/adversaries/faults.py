"""A worker whose gradients are not finite now and then: a vote loses its ballots, a mean loses the run.

On the digits, one of eight workers sends a gradient of NaN and inf, all entries or a few of them, on a random tenth of its
steps, left of its momentum. Signum on every wire, and a float32 mean before SGD with momentum, each beside the same run
without faults.
"""

from collections.abc import Iterator
import dataclasses
import pathlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.table

from experiments.common import optimizers
from experiments.common import plots
from experiments.common import progress
from experiments.common import runners
from experiments.common import trials
from experiments.common.flags import flag
from experiments.common.records import Record
from signopt import adversary

BORDERS = ("one_bit", "two_bit", "psum", "mean")


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    borders: tuple[str, ...] = flag(BORDERS, "how votes travel, or a mean", choices=BORDERS)
    workers: int = flag(8, "number of workers", at_least=1)
    faulty: int = flag(1, "how many of them have faults", at_least=0)
    rate: float = flag(0.1, "share of their steps with a fault", at_least=0)
    steps: int = flag(1000, "training steps", at_least=1)
    batch_size: int = flag(8, "examples per worker and step", at_least=1)
    seeds: int = flag(10, "number of runs: seeds 0, 1, 2, ...", at_least=1)
    output: str = flag("results/faults", "folder for records and plots")


def not_finite(key: jax.Array, rate: jax.Array) -> adversary.Adversary:
    """An adversary that is honest but for a share of its steps: NaN everywhere, or NaN and inf in a tenth of the entries."""

    def send(updates, situation):
        own = jax.random.fold_in(jax.random.fold_in(key, situation.count), jax.lax.axis_index(situation.axis_name))
        happens, everywhere, values = jax.random.split(own, 3)
        now = jax.random.uniform(happens) < rate
        share = jnp.where(jax.random.bernoulli(everywhere), 1.0, 0.1)

        def spoil(k, x):
            odds = jax.random.uniform(k, x.shape)
            bad = jnp.where(odds < share / 3, jnp.inf, jnp.where(odds < share / 2, -jnp.inf, jnp.nan))
            return jnp.where(now & (odds < share), bad, x)

        return jax.tree.map(spoil, optax.tree.split_key_like(values, updates), updates)

    return send


def run(config: Config) -> Iterator[Record]:
    """Train with and without faults over every border.

    Yields:
      A record for each border, seed, and whether there are faults.
    """
    rates, seeds = trials.grid((0.0, config.rate), seeds=config.seeds)
    for border in progress.track(config.borders, "faults"):
        recipe = optimizers.RECIPES["sgd" if border == "mean" else "signum"]

        def make(setting, border=border, recipe=recipe):
            rate, seed = setting
            spoiled = adversary.corrupt(not_finite(jax.random.key(seed), rate), config.faulty, runners.AXIS)
            schedule = optax.cosine_decay_schedule(recipe.learning_rate, config.steps)
            return optax.chain(spoiled, recipe.make(schedule, border, config.workers))

        found = trials.train(
            make, (rates, seeds), seeds, workers=config.workers, steps=config.steps, batch_size=config.batch_size
        )
        counted = optax.tree.get(found.opt_state, "total_notfinite")
        for i in range(len(seeds)):
            yield {
                "border": border,
                "faults": bool(rates[i] > 0),
                "seed": int(seeds[i]),
                "test_accuracy": float(found.test_accuracy[i]),
                "is_finite": bool(found.is_finite[i]),
                "counted": None if counted is None else np.asarray(counted)[i].tolist(),
            }


def accuracies(records: list[Record], border: str, faults: bool) -> list[float]:
    """Test accuracies, by seed."""
    return [r["test_accuracy"] for r in records[1:] if (r["border"], r["faults"]) == (border, faults)]


def table(records: list[Record]) -> rich.table.Table:
    """Accuracy with and without faults, and how many steps with faults were counted."""
    config = records[0]["config"]
    drawn = rich.table.Table(
        title=f"{config['faulty']} of {config['workers']} workers not finite in {config['rate']:.0%} of their steps, "
        f"{config['steps']} steps, mean of {config['seeds']} seeds"
    )
    for column in ("border", "clean", "with faults", "difference", "counted, worker 0"):
        drawn.add_column(column, justify="left" if column == "border" else "right")
    for border in config["borders"]:
        clean, faulty = (accuracies(records, border, faults) for faults in (False, True))
        gain = statistics.mean(b - a for a, b in zip(clean, faulty, strict=True))
        counts = [r["counted"][0] for r in records[1:] if r["border"] == border and r["faults"] and r["counted"]]
        count = f"{statistics.mean(counts):.0f}" if counts else ""
        means = (f"{statistics.mean(clean):.4f}", f"{statistics.mean(faulty):.4f}")
        drawn.add_row(border, *means, f"{gain:+.4f}", count)
    return drawn


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw the accuracy of every seed, with and without faults.

    Returns:
      The figures' files.
    """
    config = records[0]["config"]
    borders = config["borders"]
    title = f"digits, {config['workers']} workers, {config['faulty']} of them faulty"
    figure, (axes,) = plots.panels(1, title=title, width=6)
    for offset, faults, label in ((-0.15, False, "clean"), (0.15, True, "with faults")):
        points = [(i + offset, a) for i, border in enumerate(borders) for a in accuracies(records, border, faults)]
        axes.plot(*zip(*points, strict=True), "o", alpha=0.5, label=label)
    axes.set(xticks=range(len(borders)), xticklabels=borders, ylabel="test accuracy, each seed", ylim=(0, 1.02))
    axes.legend()
    return plots.save(figure, folder, "faults")

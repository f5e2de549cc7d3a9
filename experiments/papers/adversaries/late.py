"""Ballots that come late, and noise that everybody shares: what the discussion of signSGD leaves open.

Figure: on a noisy quadratic and on the digits, voted signSGD and Signum with every worker's ballot from so many steps ago; and
Signum with normal noise added right of the vote, x <- x - a (d + s n), the same on every worker from a shared key, which costs
no traffic: `optax.add_noise`. Late ballots are a queue left of the vote, `delayed` below.
"""

from collections.abc import Iterator
import dataclasses
import pathlib
import statistics
from typing import NamedTuple

import jax
from jax import lax
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
import signopt

AXIS = runners.AXIS
METHODS = ("vote", "signum + vote")
DIMENSION, QUADRATIC_STEPS, QUADRATIC_RATE, QUADRATIC_NOISE = 100, 2000, 1e-2, 1.0


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    delays: tuple[int, ...] = flag((0, 1, 2, 4, 8, 16, 32, 64), "steps between a ballot and its vote", at_least=0)
    noise: tuple[float, ...] = flag((0.0, 0.5, 1.0, 2.0, 4.0), "deviation of the noise, in votes", at_least=0)
    workers: int = flag(8, "number of workers", at_least=1)
    wire: str = flag("two_bit", "how votes travel", choices=("one_bit", "two_bit", "psum"))
    steps: int = flag(600, "training steps on the digits", at_least=1)
    batch_size: int = flag(8, "examples per worker and step", at_least=1)
    seeds: int = flag(5, "number of runs: seeds 0, 1, 2, ...", at_least=1)
    output: str = flag("results/stale", "folder for records and plots")


class DelayedState(NamedTuple):
    """The ballots that wait.

    Attributes:
      queue: int8, shape (delay, *leaf) for each leaf. Per worker.
    """

    queue: optax.Updates


def delayed(delay: int) -> optax.GradientTransformation:
    """Send the signs of so many steps ago, and nothing in the first so many steps."""

    def init_fn(params):
        return DelayedState(jax.tree.map(lambda p: jnp.zeros((delay, *p.shape), jnp.int8), params))

    def update_fn(updates, state, params=None):
        del params
        longer = jax.tree.map(
            lambda q, x: jnp.concatenate([q, jnp.sign(x).astype(jnp.int8)[None]]), state.queue, updates
        )
        sent = jax.tree.map(lambda q, x: q[0].astype(x.dtype), longer, updates)
        return sent, DelayedState(jax.tree.map(lambda q: q[1:], longer))

    return optax.GradientTransformation(init_fn, update_fn)


def _optimizer(config, method, schedule, delay, noise, key):
    momentum = signopt.scale_by_signum(0.9) if method == "signum + vote" else signopt.scale_by_sign()
    return optax.chain(
        signopt.workers.per_worker(optax.chain(momentum, delayed(delay)), config.workers),
        signopt.majority_vote(AXIS, wire=config.wire),
        optax.add_noise(noise**2, 0.0, key),
        optax.scale_by_learning_rate(schedule),
    )


def run(config: Config) -> Iterator[Record]:
    """Train with every delay, then with every strength of noise.

    Yields:
      A record for each problem, method, delay, noise and seed, with an accuracy or a loss.
    """
    for method, delay in progress.track([(m, d) for m in METHODS for d in config.delays], "late ballots"):
        for problem, train in (("quadratic", _quadratic), ("digits", _digits)):
            for record in train(config, method, delay, (0.0,)):
                yield {"problem": problem, "varied": "delay", "method": method} | record
    for method in progress.track(METHODS, "shared noise"):
        for record in _digits(config, method, 0, config.noise):
            yield {"problem": "digits", "varied": "noise", "method": method} | record


def _digits(config, method, delay, strengths):
    noise, seeds = trials.grid(strengths, seeds=config.seeds)
    schedule = optax.cosine_decay_schedule(optimizers.RECIPES["signum"].learning_rate, config.steps)

    def make(setting):
        return _optimizer(config, method, schedule, delay, setting[0], jax.random.key(setting[1]))

    found = trials.train(
        make, (noise, seeds), seeds, workers=config.workers, steps=config.steps, batch_size=config.batch_size
    )
    for i in range(len(seeds)):
        result = {"test_accuracy": float(found.test_accuracy[i])}
        yield {"delay": delay, "noise": float(noise[i]), "seed": int(seeds[i])} | result


def _quadratic(config, method, delay, strengths):
    """F = |x|^2 / 2 from (1, ..., 1): its mean over the last tenth of the steps, at a constant learning rate."""

    def mean_loss(key):
        tx = _optimizer(config, method, QUADRATIC_RATE, delay, strengths[0], key)

        def step(state, noise):
            x, opt_state = state
            updates, opt_state = tx.update(x + QUADRATIC_NOISE * noise[0], opt_state, x)
            return (x + updates, opt_state), 0.5 * jnp.sum(x**2)

        start = jnp.ones(DIMENSION)
        together = signopt.workers.simulate(step, config.workers, axis_name=AXIS)

        def draw_and_step(state, k):
            return together(state, jax.random.normal(jax.random.fold_in(key, k), (config.workers, DIMENSION)))

        losses = lax.scan(draw_and_step, (start, tx.init(start)), jnp.arange(QUADRATIC_STEPS))[1]
        return losses[-QUADRATIC_STEPS // 10 :].mean()

    found = jax.jit(jax.vmap(mean_loss))(jax.vmap(jax.random.key)(np.arange(config.seeds)))
    for seed, loss in enumerate(np.asarray(found).tolist()):
        yield {"delay": delay, "noise": strengths[0], "seed": seed, "loss": loss}


def curve(records: list[Record], problem: str, varied: str, method: str) -> list[tuple[float, list[float]]]:
    """The results of all seeds at each delay or strength of noise."""
    points = {}
    for record in records[1:]:
        if (record["problem"], record["varied"], record["method"]) == (problem, varied, method):
            result = record["loss"] if problem == "quadratic" else record["test_accuracy"]
            points.setdefault(record[varied], []).append(result)
    return sorted(points.items())


_PANELS = (
    ("quadratic", "delay", "loss at the end"),
    ("digits", "delay", "test accuracy"),
    ("digits", "noise", "test accuracy"),
)


def table(records: list[Record]) -> rich.table.Table:
    """Means over seeds."""
    config = records[0]["config"]
    drawn = rich.table.Table(title=f"{config['workers']} workers, mean of {config['seeds']} seeds")
    for column in ("problem", "varied", "method", "value: mean"):
        drawn.add_column(column)
    for problem, varied, _ in _PANELS:
        for method in METHODS:
            points = curve(records, problem, varied, method)
            cells = ", ".join(f"{value:g}: {statistics.mean(found):.3f}" for value, found in points)
            drawn.add_row(problem, varied, method, cells)
    return drawn


def summary(records: list[Record]) -> list[list[list[str]]]:
    """A row for each problem and method: one table of delays, one of noise."""
    tables = {}
    for problem, varied, label in _PANELS:
        for method in METHODS:
            points = curve(records, problem, varied, method)
            header = [
                f"late ballots: {varied}" if varied == "delay" else "shared noise",
                *(f"{v:g}" for v, _ in points),
            ]
            row = [f"{problem}, {method}: {label}", *(f"{statistics.mean(found):.3f}" for _, found in points)]
            tables.setdefault(varied, [header]).append(row)
    return list(tables.values())


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw the loss and the accuracy against the delay, and the accuracy against the noise.

    Returns:
      The figures' files.
    """
    config = records[0]["config"]
    figure, panels = plots.panels(3, title=f"{config['workers']} workers, {config['seeds']} seeds")
    for axes, (problem, varied, label) in zip(panels, _PANELS, strict=True):
        for method in METHODS:
            points = curve(records, problem, varied, method)
            plots.band(axes, [value for value, _ in points], [found for _, found in points], label=method, marker=".")
        axes.set(title=problem, xlabel={"delay": "delay in steps", "noise": "noise in votes"}[varied], ylabel=label)
        if varied == "delay":
            axes.set_xscale("symlog", linthresh=1)
        if problem == "quadratic":
            axes.set_yscale("log")
        axes.legend()
    return plots.save(figure, folder, "late")

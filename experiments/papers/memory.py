"""Sparsified SGD with memory: one entry of d travels in a step, at the rate of SGD; without memory it does not converge.

Stich, Cordonnier and Jaggi (2018), on their kind of problem: logistic regression with a ridge, a sample a step, rates of
2 / (ridge (a + t)), and the average of all iterates with weights (a + t)², whose distance from the minimum theorem 2.4 bounds
by O(1/T) once T is large. The classes are scikit-learn's digits 0 to 4 and 5 to 9. The largest entry or a random one is sent,
with and without memory. A random entry without memory is tried as it is, which is SGD at a rate d times as small, and times
d, which is right on average and d times as noisy. Slopes are fitted to the last decade. The paper's ridge is 1/n; there the
start is still being forgotten after 100,000 steps (slope -1.8, of SGD too), so ours is larger.

    python -m experiments memory
    python -m experiments memory --ridge 0.03 --workers 8

Time and numbers to expect are in experiments/README.md.
"""

from collections.abc import Iterator
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import rich.table
import sklearn.datasets
import sklearn.linear_model

from experiments.common import plots
from experiments.common import progress
from experiments.common import runners
from experiments.common.flags import flag
from experiments.common.records import Record
import signopt
from signopt import codecs

AXIS = runners.AXIS
# The expected slope of each method, and what is expected beside it.
METHODS = {
    "SGD": "-1",
    "top-1, memory": "-1",
    "random-1, memory": "-1",
    "top-1, no memory": "0",
    "random-1, no memory": "0",
    "random-1 times d, no memory": "-1, about d times as high",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    methods: tuple[str, ...] = flag(tuple(METHODS), "what to compare", choices=tuple(METHODS))
    steps: int = flag(100_000, "steps", at_least=100)
    every: int = flag(100, "steps between two looks at the loss", at_least=1)
    ridge: float = flag(0.1, "the factor of the squared norm", at_least=1e-6)
    shift: float = flag(10.0, "a, in multiples of d, of all rates and weights", at_least=1)
    workers: int = flag(1, "number of workers, with a sample each", at_least=1)
    seeds: int = flag(5, "number of runs: seeds 0, 1, 2, ...", at_least=1)
    output: str = flag("results/memory", "folder for records and plots")


class Problem(NamedTuple):
    """Logistic regression with a ridge.

    Attributes:
      inputs: (n, d), each with its label of -1 or 1 multiplied in; float32.
      ridge: Its factor, and so the strong convexity.
      minimum: Of the mean loss.
    """

    inputs: np.ndarray
    ridge: float
    minimum: float


def problem(ridge: float) -> Problem:
    """The digits 0 to 4 against 5 to 9, standardized, without the pixels that are always dark."""
    images, digits = sklearn.datasets.load_digits(return_X_y=True)
    images = images[:, images.std(0) > 0]
    inputs, labels = (images - images.mean(0)) / images.std(0), np.where(digits < 5, 1, -1)
    solver = sklearn.linear_model.LogisticRegression(
        C=1 / (ridge * len(labels)), fit_intercept=False, tol=1e-12, max_iter=10_000
    )
    found = Problem((inputs * labels[:, None]).astype(np.float32), ridge, 0.0)
    return found._replace(minimum=float(losses(found, solver.fit(inputs, labels).coef_)[0]))


def losses(of: Problem, points: np.ndarray) -> np.ndarray:
    """The mean loss at each of the points (..., d), in float64."""
    points = np.asarray(points, np.float64)
    fit = np.logaddexp(0, -points @ of.inputs.T.astype(np.float64)).mean(-1)
    return fit + of.ridge / 2 * np.sum(points**2, -1)


def border(method: str, entries: int, workers: int, key: jax.Array) -> optax.GradientTransformationExtraArgs:
    """What travels, one entry of all `entries` or everything."""
    codec = {
        "SGD": None,
        "top-1": codecs.top_k(1 / entries),
        "random-1": codecs.random_k(1 / entries),
        "random-1 times d": codecs.random_k(1 / entries, unbiased=True),
    }[method.partition(",")[0]]
    memory = "workers" if method.endswith(", memory") else None
    return signopt.mean(AXIS, uplink=codec, memory=memory, num_workers=workers, key=key)


class _State(NamedTuple):
    params: Any
    opt_state: Any
    average: Any
    weight: Any


@functools.partial(jax.jit, static_argnames=("method", "workers", "shift", "ridge"))
def averages(method, inputs, chosen, seeds, *, workers: int, shift: float, ridge: float) -> jax.Array:
    """The weighted averages of the iterates, after each block of steps.

    Args:
      method: One of `METHODS`.
      inputs: As in `Problem`.
      chosen: Which sample each worker takes: (seeds, blocks, steps of a block, workers).
      seeds: (seeds,), of what the codec draws.
      workers: Their number.
      shift: a.
      ridge: As in `Problem`.

    Returns:
      (seeds, blocks, d).
    """
    size = inputs.shape[1]

    def one_run(chosen, seed):
        optimizer = optax.chain(  # the rate is left of the border: what is sent late was scaled when it was due
            optax.scale_by_schedule(lambda count: 2 / (ridge * (shift + count))),
            border(method, size, workers, jax.random.key(seed)),
            optax.scale(-1.0),
        )

        def loss(params, example):
            return jnp.mean(jax.nn.softplus(-inputs[example] @ params)) + ridge / 2 * jnp.sum(params**2)

        gradient = signopt.workers.value_and_grad(loss, axis_name=AXIS)

        def step(state, example):
            count = optax.tree.get(state.opt_state[0], "count")
            weight = (shift + count) ** 2
            total = state.weight + weight
            average = state.average + weight / total * (state.params - state.average)
            updates, opt_state = optimizer.update(gradient(state.params, example)[1], state.opt_state, state.params)
            return _State(optax.apply_updates(state.params, updates), opt_state, average, total), ()

        together = signopt.workers.simulate(step, workers, axis_name=AXIS)

        def block(state, examples):
            state, _ = lax.scan(together, state, examples)
            return state, state.average

        start = jnp.zeros(size)
        return lax.scan(block, _State(start, optimizer.init(start), start, jnp.zeros([])), chosen)[1]

    return jax.vmap(one_run)(chosen, seeds)


def run(config: Config) -> Iterator[Record]:
    """Run every method from zero.

    Yields:
      A record for each method and seed: how far the weighted average is above the minimum, at some numbers of steps.
    """
    of = problem(config.ridge)
    blocks, size = max(2, config.steps // config.every), of.inputs.shape[1]
    shape = (blocks, config.every, config.workers)
    chosen = np.stack(
        [np.random.default_rng(seed).integers(len(of.inputs), size=shape) for seed in range(config.seeds)]
    )
    looks = np.unique(np.geomspace(1, blocks, 40).round().astype(int))
    for method in progress.track(config.methods, "methods"):
        found = averages(
            method,
            of.inputs,
            chosen,
            np.arange(config.seeds),
            workers=config.workers,
            shift=config.shift * size,
            ridge=of.ridge,
        )
        gaps = losses(of, found)[:, looks - 1] - of.minimum
        for seed, gap in enumerate(gaps):
            yield {
                "method": method,
                "seed": seed,
                "entries": size,
                "steps": (config.every * looks).tolist(),
                "gap": gap.tolist(),
            }


def gaps(records: list[Record]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each method the numbers of steps, and the mean distance from the minimum over seeds there."""
    found: dict[str, list[Record]] = {}
    for record in records[1:]:
        found.setdefault(record["method"], []).append(record)
    return {name: (np.array(rs[0]["steps"]), np.mean([r["gap"] for r in rs], 0)) for name, rs in found.items()}


def slope(steps: np.ndarray, gap: np.ndarray) -> float:
    """The exponent of a power of the steps, fitted to the last decade.

    Examples:
      >>> round(slope(np.array([1, 10, 20, 50, 100]), 3 / np.array([1, 10, 20, 50, 100])), 6)
      -1.0
    """
    last = steps >= steps[-1] / 10
    return float(np.polyfit(np.log(steps[last]), np.log(gap[last]), 1)[0])


def summary(records: list[Record]) -> list[list[str]]:
    """Distance from the minimum, and measured and expected slope of each method."""
    found = gaps(records)
    size, last = records[1]["entries"], int(records[1]["steps"][-1])
    reference = found["SGD"][1][-1] if "SGD" in found else float("nan")
    rows = [["method", "entries sent", f"above the minimum after {last:,} steps", "over SGD", "slope", "to expect"]]
    for name, (steps, gap) in found.items():
        sent = str(size) if name == "SGD" else f"1 of {size}"
        measured = f"{slope(steps, gap):.2f}"
        rows.append([name, sent, f"{gap[-1]:.2g}", f"{gap[-1] / reference:.3g}", measured, METHODS[name]])
    return rows


def table(records: list[Record]) -> rich.table.Table:
    """The same."""
    header, *rows = summary(records)
    config = records[0]["config"]
    drawn = rich.table.Table(title=f"logistic regression, {config['workers']} workers, {config['seeds']} seeds")
    for column in header:
        drawn.add_column(column, justify="left" if column in ("method", "to expect") else "right")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw the distance from the minimum against steps, and a line that falls as they grow.

    Returns:
      The figures' files.
    """
    config, found = records[0]["config"], gaps(records)
    title = f"logistic regression on digits, {config['workers']} workers, {config['seeds']} seeds"
    figure, (axes,) = plots.panels(1, title=title, width=7, height=4.5)
    for name, (steps, gap) in found.items():
        axes.plot(steps, gap, label=name)
    steps, gap = next(iter(found.values()))
    axes.plot(steps, gap[-1] * steps[-1] / steps, color="grey", linewidth=0.8, label="1 / steps")
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="loss of the average above the minimum")
    axes.legend()
    return plots.save(figure, folder, "memory")

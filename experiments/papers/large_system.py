"""Large systems: the squared gradient norm at which a vote with a fixed learning rate settles falls as 1 / sqrt(M).

f(x) = |x|^2 / 2 with normal noise on every coordinate of every worker's gradient, and a vote of M = 1 to 1,024 workers with
one learning rate. The paper (Yang et al., 2020, theorem 1 and remark 1) proves that its bound on the *squared* norm falls
so, where earlier bounds stop at a neighbourhood. Near the minimum a coordinate is a random walk with steps of the learning
rate d and a drift of 2 sqrt(M) x / (pi s), so its mean square is pi s d / (4 sqrt(M)), until steps themselves show. The paper has no figure of this.

    python -m experiments large_system

Time and numbers to expect are in experiments/README.md.
"""

from collections.abc import Iterator
import dataclasses
import math
import pathlib

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import rich.table

from experiments.common import plots
from experiments.common import progress
from experiments.common import runners
from experiments.common.flags import flag
from experiments.common.records import Record
import signopt
from signopt import theory

AXIS = runners.AXIS


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    sizes: tuple[int, ...] = flag((1, 3, 9, 27, 81, 243, 729, 1024), "numbers of workers", at_least=1)
    dimension: int = flag(16, "coordinates", at_least=1)
    deviation: float = flag(10.0, "standard deviation of each coordinate of a worker's gradient", at_least=0)
    learning_rate: float = flag(0.01, "of every vote", at_least=0)
    lengths: int = flag(20, "steps, in times that a walk takes to forget", at_least=2)
    workers: int = flag(1, "devices to ask for; workers are simulated on one", at_least=1)
    seeds: int = flag(4, "number of runs: seeds 0, 1, 2, ...", at_least=1)
    output: str = flag("results/large_system", "folder for records and plots")


def run(config: Config) -> Iterator[Record]:
    """Let a vote of each size settle, and average from there.

    Yields:
      A record for each number of workers.
    """
    for size in progress.track(config.sizes, "numbers of workers"):
        forgets = math.pi * config.deviation / (2 * math.sqrt(size) * config.learning_rate)
        steps = math.ceil(config.lengths * forgets)
        squares = np.asarray(settle(config, size, steps))[:, steps // 4 :]
        drift_only = math.pi * config.deviation * config.learning_rate / (4 * math.sqrt(size))
        yield {
            "size": size,
            "steps": steps,
            "squared_norms": squares.mean(1).tolist(),
            "predicted": config.dimension * drift_only,
        }


def settle(config: Config, size: int, steps: int) -> jax.Array:
    """The squared norm of the gradient at every step of every run; shape (seeds, steps)."""
    optimizer = signopt.signsgd(config.learning_rate, axis_name=AXIS, wire="psum")

    def step(state, noise):
        x, opt_state = state
        updates, opt_state = optimizer.update(x + config.deviation * noise[0], opt_state, x)
        return (optax.apply_updates(x, updates), opt_state), None

    together = signopt.workers.simulate(step, size, axis_name=AXIS)

    def one_run(seed):
        def body(state, key):
            state, _ = together(state, jax.random.normal(key, (size, config.dimension)))
            return state, jnp.sum(state[0] ** 2)

        x = jnp.zeros(config.dimension)
        return lax.scan(body, (x, optimizer.init(x)), jax.random.split(jax.random.key(seed), steps))[1]

    return jax.jit(jax.vmap(one_run))(jnp.arange(config.seeds))


def slope(records: list[Record]) -> float:
    """The exponent of M in the squared norm, by least squares over all sizes but 1."""
    sizes = [math.log(record["size"]) for record in records[1:] if record["size"] > 1]
    squares = [math.log(np.mean(record["squared_norms"])) for record in records[1:] if record["size"] > 1]
    return float(np.polyfit(sizes, squares, 1)[0])


def table(records: list[Record]) -> rich.table.Table:
    """The squared norm by number of workers."""
    drawn = rich.table.Table(title=f"squared gradient norm at the floor: M to the power of {slope(records):.3f}")
    for column in (
        "workers",
        "steps",
        "squared norm",
        "times sqrt(M)",
        "random walk predicts",
        "advantage c of the vote",
    ):
        drawn.add_column(column, justify="right")
    for record in records[1:]:
        found, size = np.mean(record["squared_norms"]), record["size"]
        odd = size - 1 + size % 2
        c = theory.vote_advantage(odd, deviation=records[0]["config"]["deviation"], largest_gradient=0.01)
        drawn.add_row(
            str(size), str(record["steps"]), f"{found:.4f}", f"{found * math.sqrt(size):.3f}",
            f"{record['predicted']:.4f}", f"{c:.3f}",
        )  # fmt: skip
    return drawn


def summary(records: list[Record]) -> list[list[str]]:
    """The squared norm, a column for each number of workers."""
    rows = [["workers", *(str(r["size"]) for r in records[1:])]]
    rows.append(["squared gradient norm", *(f"{np.mean(r['squared_norms']):.3g}" for r in records[1:])])
    rows.append(["the random walk predicts", *(f"{r['predicted']:.3g}" for r in records[1:])])
    return rows


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw the squared norm against the number of workers.

    Returns:
      The figures' files.
    """
    config = records[0]["config"]
    title = f"|x|²/2 in {config['dimension']} dimensions, {config['seeds']} runs"
    figure, (axes,) = plots.panels(1, title=title, width=6, height=4)
    sizes = [record["size"] for record in records[1:]]
    plots.band(axes, sizes, [record["squared_norms"] for record in records[1:]], label="measured", marker="o")
    axes.plot(sizes, [record["predicted"] for record in records[1:]], label=r"$\pi \sigma \delta d / (4 \sqrt{M})$")
    axes.set(xlabel="workers M", ylabel="squared gradient norm at the floor", xscale="log", yscale="log")
    axes.legend()
    return plots.save(figure, folder, "large_system")

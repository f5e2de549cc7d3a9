"""Figure 1 of MH-signSGD: a parabola with all its noise on one coordinate, and a learning rate that finds itself.

f(x) = |x|^2 / 2 in 100 dimensions from x ~ N(0, I), with N(0, 100^2) on the first coordinate of every sample's gradient and
256 samples a step (Yang et al., 2020, section III). At a fixed learning rate of 0.05 SGD, signSGD and a vote of 256 samples
settle where noise and rate leave them; the adaptive vote goes on. So do votes of fewer voters, who average 256 / M samples
each: with the paper's estimator, which sends eight bits a parameter, and with this library's default, which sends one.
"""

from collections.abc import Iterator
import dataclasses
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

AXIS = runners.AXIS
DIMENSION, BATCH, DEVIATION = 100, 256, 100.0


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    steps: int = flag(10_000, "steps", at_least=1)
    tail: int = flag(1000, "steps at the end whose loss is averaged", at_least=1)
    learning_rate: float = flag(0.05, "of everything that is not adaptive", at_least=0)
    workers: int = flag(256, "voters of the paper's figure", at_least=2)
    fewer: tuple[int, ...] = flag((8, 64), "other numbers of voters, divisors of 256", at_least=2)
    betas: tuple[float, ...] = flag((), "other decay rates of the default's momentum, for the other numbers of voters")
    seeds: int = flag(10, "number of runs", at_least=1)
    first_seed: int = flag(0, "the seed of the first run; the others follow", at_least=0)
    output: str = flag("results/toy_noise", "folder for records and plots")


def methods(config: Config) -> dict[str, tuple[optax.GradientTransformation, int, float]]:
    """What to compare: the optimizer, how many voters it has, and the scale of the noise."""
    rate, voters = config.learning_rate, config.workers
    found: dict[str, tuple[optax.GradientTransformation, int, float]] = {
        "SGD": (optax.chain(signopt.mean(AXIS), optax.sgd(rate)), 1, 1.0),
        "signSGD": (signopt.signsgd(rate, axis_name=AXIS), 1, 1.0),
        f"vote, {voters} voters": (signopt.signsgd(rate, axis_name=AXIS, wire="psum"), voters, 1.0),
        f"adaptive, the paper's, {voters} voters": (papers(voters), voters, 1.0),
        "adaptive, no noise": (papers(voters), voters, 0.0),
    }
    for number in config.fewer:
        fixed = signopt.signsgd(rate, axis_name=AXIS, wire="one_bit")
        found |= {
            f"vote, {number} voters": (fixed, number, 1.0),
            f"adaptive, the paper's, {number} voters": (papers(number), number, 1.0),
            f"adaptive, {number} voters": (signopt.mh_signsgd(axis_name=AXIS, num_workers=number), number, 1.0),
        }
        for beta in config.betas:
            optimizer = signopt.mh_signsgd(axis_name=AXIS, num_workers=number, beta=beta)
            found[f"adaptive, beta {beta:g}, {number} voters"] = (optimizer, number, 1.0)
    return found


def papers(voters: int) -> optax.GradientTransformationExtraArgs:
    """MH-signSGD as the paper has it."""
    return signopt.mh_signsgd(axis_name=AXIS, num_workers=voters, beta=0.0, estimator="exact", wire="psum")


def losses(
    optimizer: optax.GradientTransformation, *, voters: int, noise: float, steps: int, seeds: int, first_seed: int = 0
) -> tuple[jax.Array, jax.Array]:
    """The loss at every step of every run, and the learning rates that were found (0 by who does not look for one).

    Returns:
      Two arrays of shape (seeds, steps).
    """
    deviation = noise * DEVIATION / np.sqrt(BATCH / voters)

    def step(state, batch):
        x, opt_state = state
        gradient = x.at[0].add(deviation * batch[0])
        updates, opt_state = optimizer.update(gradient, opt_state, x)
        return (optax.apply_updates(x, updates), opt_state), None

    together = signopt.workers.simulate(step, voters, axis_name=AXIS)

    def one_run(seed):
        key = jax.random.key(seed)
        x = jax.random.normal(key, (DIMENSION,))

        def body(state, k):
            state, _ = together(state, jax.random.normal(jax.random.fold_in(key, k), (voters,)))
            rate = optax.tree.get(state[1], "learning_rate", jnp.float32(0))
            return state, (jnp.sum(state[0] ** 2) / 2, rate)

        return lax.scan(body, (x, optimizer.init(x)), jnp.arange(1, steps + 1))[1]

    return jax.jit(jax.vmap(one_run))(first_seed + jnp.arange(seeds))


def run(config: Config) -> Iterator[Record]:
    """Run each method on all seeds.

    Yields:
      A record for each method: its loss and learning rate at a hundred steps or so, evenly spaced in the logarithm and
      averaged over runs, and the mean loss of the tail of each run.
    """
    steps = np.unique(np.geomspace(1, config.steps, 120).astype(int))
    for name, (optimizer, voters, noise) in progress.track(methods(config).items(), "the parabola"):
        found, rates = losses(
            optimizer,
            voters=voters,
            noise=noise,
            steps=config.steps,
            seeds=config.seeds,
            first_seed=config.first_seed,
        )
        yield {
            "method": name,
            "voters": voters,
            "tails": np.asarray(found)[:, -config.tail :].mean(1).tolist(),
            "steps": steps.tolist(),
            "losses": np.asarray(found).mean(0)[steps - 1].tolist(),
            "learning_rates": np.asarray(rates).mean(0)[steps - 1].tolist(),
        }


def table(records: list[Record]) -> rich.table.Table:
    """The mean loss at the end, and by how much a fixed learning rate ends higher."""
    config = records[0]["config"]
    drawn = rich.table.Table(title=f"|x|^2 / 2, {config['steps']} steps, mean of {config['seeds']} runs")
    for column in ("method", f"mean loss of the last {config['tail']} steps", "fixed / this, same voters"):
        drawn.add_column(column, justify="left" if column == "method" else "right")
    tails = {record["method"]: record["tails"] for record in records[1:]}
    for record in records[1:]:
        own, fixed = record["tails"], tails.get(f"vote, {record['voters']} voters")
        adaptive = record["method"].startswith("adaptive") and "no noise" not in record["method"]
        compared = "{:.1f} ± {:.1f}".format(*ratio(fixed, own)) if adaptive and fixed else ""
        drawn.add_row(record["method"], f"{np.mean(own):.3g}", compared)
    return drawn


def summary(records: list[Record]) -> list[list[str]]:
    """The mean loss at the end, a row for each number of voters."""
    tails = {record["method"]: record["tails"] for record in records[1:]}
    rows = [
        [
            "parabola: loss at the end",
            "fixed rate",
            "the paper's",
            "the default, one bit",
            "fixed / adaptive",
            "expected",
        ]
    ]
    for voters in sorted({record["voters"] for record in records[1:]} - {1}):
        names = [f"{name}{voters} voters" for name in ("vote, ", "adaptive, the paper's, ", "adaptive, ")]
        fixed, papers, default = (tails.get(name) for name in names)
        if fixed is None:
            continue
        best, least = (default, 3) if default else (papers or [], 5)
        means = [f"{np.mean(found):.3g}" if found else "" for found in (fixed, papers, default)]
        rows.append([f"{voters} voters", *means, "{:.1f} ± {:.1f}".format(*ratio(fixed, best)), f"at least {least}"])
    return rows


def ratio(fixed: list[float], adaptive: list[float]) -> tuple[float, float]:
    """The ratio of two means over the same runs, and its jackknife standard error (0 for a single run)."""
    pairs = np.array([fixed, adaptive])
    left_out = (pairs.sum(1, keepdims=True) - pairs) if pairs.shape[1] > 1 else pairs
    ratios, runs = left_out[0] / left_out[1], pairs.shape[1]
    return float(pairs[0].sum() / pairs[1].sum()), float(
        np.sqrt((runs - 1) / runs * np.sum((ratios - ratios.mean()) ** 2))
    )


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw the losses and the learning rates that were found, means over runs.

    Returns:
      The figures' files.
    """
    config = records[0]["config"]
    figure, (loss, rate) = plots.panels(
        2, title=f"noisy parabola in {DIMENSION} dimensions, {config['seeds']} runs", columns=1, width=7, height=4
    )
    for record in records[1:]:
        (line,) = loss.plot(record["steps"], np.maximum(record["losses"], 1e-6), label=record["method"])
        if record["method"].startswith("adaptive"):
            style = {"color": line.get_color(), "linestyle": line.get_linestyle(), "label": record["method"]}
            rate.plot(record["steps"], np.maximum(record["learning_rates"], 1e-6), **style)
    loss.set(xlabel="steps", ylabel="loss", yscale="log", xscale="log")
    rate.set(xlabel="steps", ylabel="learning rate that was found", yscale="log", xscale="log")
    for axes in (loss, rate):
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return plots.save(figure, folder, "toy")

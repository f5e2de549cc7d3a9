"""The papers' bounds against simulations: how wrong signs and votes are, where more workers harm, and how fast it goes.

Left: the probability of a wrong sign against the signal-to-noise ratio, and what Gauss, Cantelli and Markov allow (Bernstein
et al., 2018, sections 3 and 4). Middle: the paper's skewed example, gradients of 50 with probability 0.1, else -1: the mean
is 4.1, yet the more workers vote, the surer they are of the wrong sign. Right: rates of convergence on a quadratic, and
their bounds, by theorem; the one of the follow-up paper (2019, theorem 1) is the tightest. The papers prove this and draw no figure of it.

    python -m experiments bounds

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
NOISES = {  # unit variance
    "normal": jax.random.normal,
    "uniform": lambda key, shape: jax.random.uniform(key, shape, minval=-math.sqrt(3), maxval=math.sqrt(3)),
    "laplace": lambda key, shape: jax.random.laplace(key, shape) / math.sqrt(2),
}
SIGN_BOUNDS = {
    "Gauss": theory.sign_error_gauss,
    "Cantelli": theory.sign_error_cantelli,
    "Markov": theory.sign_error_markov,
}
CURVATURE = np.array([4, 1, 1, 0.25, 0.25, 0.25, 0.1, 0.1], np.float32)
DEVIATION = np.array([1, 0.5, 2, 1, 0.1, 0.5, 1, 0.2], np.float32)
START = np.array([1, -1, 2, 3, -2, 1, 2, -3], np.float32)


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    samples: int = flag(200_000, "samples for each probability", at_least=1)
    workers: int = flag(7, "voters of theorem 2", at_least=1)
    steps: tuple[int, ...] = flag((100, 400, 1600), "lengths of runs", at_least=1)
    seeds: int = flag(32, "number of runs: seeds 0, 1, 2, ...", at_least=1)
    output: str = flag("results/bounds", "folder for records and plots")


def run(config: Config) -> Iterator[Record]:
    """Measure probabilities, then rates.

    Yields:
      A record for each probability and each rate, with its bound.
    """
    key = jax.random.key(0)
    for ratio in progress.track(np.geomspace(0.1, 4, 14), "wrong signs"):
        bounds = {name: float(bound(ratio)) for name, bound in SIGN_BOUNDS.items()}
        for noise, draw in NOISES.items():
            wrong = float(jnp.mean(draw(key, (config.samples,)) <= -ratio))
            yield {"what": "sign", "noise": noise, "ratio": float(ratio), "measured": wrong, "bounds": bounds}
    for voters in (1, 3, 5, 9, 15, 27, 41):
        values = jnp.where(jax.random.bernoulli(key, 0.1, (config.samples // voters, voters)), 50.0, -1.0)
        yield {
            "what": "skewed",
            "workers": voters,
            "vote": float(jnp.mean(jnp.sign(values).sum(1) <= 0)),
            "exact": float(theory.vote_error(0.9, voters)),
            "mean": float(jnp.mean(values.mean(1) <= 0)),
        }
    for steps in progress.track(config.steps, "rates"):
        yield from _rates(config, steps)


def _rates(config: Config, steps: int) -> Iterator[Record]:
    smoothness, noise = float(CURVATURE.sum()), float(DEVIATION.sum())
    gap = float((CURVATURE * START**2).sum() / 2)
    growing, constant = 1 / math.sqrt(smoothness * steps), math.sqrt(gap / (smoothness * steps))
    known = {"gap": gap, "smoothness": smoothness}
    several = config.workers
    for name, voters, rate, batch, measure, bound in (
        ("2018, theorem 1", 1, growing, steps, _smallest_l1, theory.signsgd_rate(steps, **known, noise=noise)),
        (
            f"2018, theorem 2, {several} workers", several, growing, steps, _smallest_l1,
            theory.majority_vote_rate(steps, **known, noise=noise, num_workers=several),
        ),
        ("2019, theorem 1", 1, constant, 1, _mean_mixed, theory.small_batch_rate(steps, **known)),
    ):  # fmt: skip
        measured = float(measure(descend(rate, voters, batch, steps, config.seeds)))
        yield {"what": "rate", "theorem": name, "steps": steps, "measured": measured, "bound": bound}


def _smallest_l1(gradients):
    return jnp.abs(gradients).sum(-1).min(-1).mean()


def _mean_mixed(gradients):
    return theory.mixed_norm(gradients, DEVIATION).mean()


def descend(rate: float, voters: int, batch: int, steps: int, seeds: int) -> jax.Array:
    """Gradients along the path of a vote; shape (seeds, steps, 8)."""
    optimizer = signopt.signsgd(rate, axis_name=AXIS, wire="psum")

    def step(state, noise):
        x, opt_state = state
        updates, opt_state = optimizer.update(CURVATURE * x + DEVIATION / math.sqrt(batch) * noise[0], opt_state, x)
        return (optax.apply_updates(x, updates), opt_state), None

    together = signopt.workers.simulate(step, voters, axis_name=AXIS)

    def one_run(seed):
        def body(state, key):
            new_state, _ = together(state, jax.random.normal(key, (voters, 8)))
            return new_state, CURVATURE * state[0]

        start = jnp.asarray(START)
        return lax.scan(body, (start, optimizer.init(start)), jax.random.split(jax.random.key(seed), steps))[1]

    return jax.jit(jax.vmap(one_run))(jnp.arange(seeds))


def table(records: list[Record]) -> rich.table.Table:
    """How tight each bound is: the largest ratio of measured to bound."""
    drawn = rich.table.Table(title="measured / bound")
    for column in ("bound", "at", "ratio"):
        drawn.add_column(column, justify="left" if column == "bound" else "right")
    for name in SIGN_BOUNDS:
        for noise in NOISES:
            own = [r for r in records[1:] if r["what"] == "sign" and r["noise"] == noise]
            ratio, at = max((r["measured"] / r["bounds"][name], r["ratio"]) for r in own)
            drawn.add_row(f"{name}, {noise} noise", f"S = {at:.2f}", f"{ratio:.3f}")
    for r in records[1:]:
        if r["what"] == "rate":
            drawn.add_row(r["theorem"], f"K = {r['steps']}", f"{r['measured'] / r['bound']:.3f}")
    return drawn


def summary(records: list[Record]) -> list[list[str]]:
    """How tight each bound is."""
    rows = [["what", "measured over bound, at most", "to expect"]]
    for name in SIGN_BOUNDS:
        signs = [r for r in records[1:] if r["what"] == "sign"]
        ratio, at, noise = max((r["measured"] / r["bounds"][name], r["ratio"], r["noise"]) for r in signs)
        rows.append([f"a wrong sign, {name}", f"{ratio:.3f}, {noise} noise at S = {at:.2f}", "at most 1, and an error"])
    for theorem in dict.fromkeys(r["theorem"] for r in records[1:] if r["what"] == "rate"):
        own = [r for r in records[1:] if r["what"] == "rate" and r["theorem"] == theorem]
        ratios = ", ".join(f"{r['measured'] / r['bound']:.3f}" for r in own)
        rows.append([f"{theorem}: {', '.join(str(r['steps']) for r in own)} steps", ratios, "at most 1"])
    return rows


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw the three panels.

    Returns:
      The figures' files.
    """
    config = records[0]["config"]
    figure, (signs, votes, rates) = plots.panels(3, title=f"simulations and bounds, {config['seeds']} runs")
    by_noise = {noise: [r for r in records[1:] if r["what"] == "sign" and r["noise"] == noise] for noise in NOISES}
    for noise, own in by_noise.items():
        signs.plot([r["ratio"] for r in own], [r["measured"] for r in own], ".", label=f"{noise} noise")
    for name in SIGN_BOUNDS:
        signs.plot([r["ratio"] for r in own], [r["bounds"][name] for r in own], label=f"{name}'s bound")
    signs.set(xlabel="signal-to-noise ratio", ylabel="probability of a wrong sign", yscale="log", ylim=(1e-3, 1.2))
    skewed = [r for r in records[1:] if r["what"] == "skewed"]
    workers = [r["workers"] for r in skewed]
    votes.plot(workers, [r["vote"] for r in skewed], "o", label="majority vote")
    votes.plot(workers, [r["exact"] for r in skewed], label="its binomial tail")
    votes.plot(workers, [r["mean"] for r in skewed], "s-", label="mean")
    votes.set(xlabel="workers", ylabel="probability of a wrong sign", title="50 with probability 0.1, else -1")
    for theorem in dict.fromkeys(r["theorem"] for r in records[1:] if r["what"] == "rate"):
        own = [r for r in records[1:] if r["what"] == "rate" and r["theorem"] == theorem]
        (line,) = rates.plot([r["steps"] for r in own], [r["measured"] for r in own], "o-", label=theorem)
        rates.plot([r["steps"] for r in own], [r["bound"] for r in own], "--", color=line.get_color())
    rates.set(xlabel="steps", ylabel="norm of the gradient (dashed: bound)", xscale="log", yscale="log")
    for axes in (signs, votes, rates):
        axes.legend()
    return plots.save(figure, folder, "bounds")

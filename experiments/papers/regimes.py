"""When do signs win? Quadratics of chosen densities, the regime that diagnostics see, and who is faster when tuned.

Bernstein et al. (2018, section 3) compare bounds: SGD should be faster where noise and curvature are both much denser than
the gradient (regime I), signSGD as fast or faster where neither is (regime II). Here are quadratics with a diagonal Hessian
in 100 dimensions of both kinds, and, if one asks for them (`--kinds any`), of all densities in between: curvature, noise and
start each on a random number of coordinates. Densities are measured along the path of the tuned SGD, where it is still on its way (while
the loss is above twice its last): the typical, median density of the gradient there. The paper's bound takes the smallest,
which noise alone makes small at some step of many, and then sees regime III where signs win by far; whether it agrees is
recorded, too. Both methods get the best of a sweep of learning rates. The paper has no figure of this.

    python -m experiments regimes
    python -m experiments regimes --first_problem 1000
    python -m experiments regimes --kinds any --problems 60

Time and numbers to expect are in experiments/README.md.
"""

from collections.abc import Iterator
import dataclasses
import functools
import pathlib

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import rich.table

from experiments.common import plots
from experiments.common import progress
from experiments.common.flags import flag
from experiments.common.records import Record
import signopt
from signopt import diagnostics

DIMENSION = 100
RATES = np.geomspace(1e-4, 2.0, 24).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    steps: int = flag(400, "steps", at_least=1)
    problems: int = flag(12, "of each kind", at_least=1)
    kinds: tuple[str, ...] = flag(("I", "II"), "what the problems are made for", choices=("I", "II", "any"))
    first_problem: int = flag(0, "the number that the first of each kind is drawn with; the others follow", at_least=0)
    runs: int = flag(4, "runs of each learning rate", at_least=1)
    threshold: float = flag(diagnostics.MUCH_MORE, "what 'much denser' means", at_least=1)
    workers: int = flag(1, "devices to ask for", at_least=1)
    seeds: int = flag(1, "one: a problem's number is its seed", at_least=1)
    output: str = flag("results/regimes", "folder for records and plots")


def problem(kind: str, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Curvature, noise and start of a quadratic: sparse gradients in dense surroundings (I), the reverse (II), or any."""
    rng = np.random.default_rng(number)
    if kind == "any":
        numbers = np.exp(rng.uniform(0, np.log(DIMENSION + 1), 3)).astype(int)
        large = np.stack([rng.permutation(DIMENSION) < some for some in numbers])
        curvature, noise, start = rng.uniform(0.5, 1.5, (3, DIMENSION)) * np.where(large, 1, [[0.1], [0.01], [0.01]])
        return curvature, rng.choice([0.3, 1.0, 3.0]) * noise, 3 * start * rng.choice([-1, 1], DIMENSION)
    few = rng.permutation(DIMENSION)[: 1 + number % 4]
    magnitudes = rng.uniform(0.5, 1.5, DIMENSION)
    if kind == "I":
        start = np.zeros(DIMENSION)
        start[few] = 10 * magnitudes[few] * rng.choice([-1, 1], len(few))
        return magnitudes, 0.3 * rng.uniform(0.5, 1.5, DIMENSION), start
    noise, curvature = np.full(DIMENSION, 0.01), np.full(DIMENSION, 0.3)
    noise[few] = 10 * magnitudes[few]
    curvature[few] = 1 + magnitudes[few]
    return curvature, noise, magnitudes * rng.choice([-1, 1], DIMENSION)


@functools.partial(jax.jit, static_argnames=("make", "steps", "runs"))
def losses(make, curvature, noise, start, *, steps: int, runs: int, rates=RATES) -> tuple[jax.Array, jax.Array]:
    """Losses and gradients of all runs: shapes (rates, runs, steps) and (rates, runs, steps, 100).

    `make` is a function from a learning rate to an optimizer, whose `update` is given the noisy loss, `value_fn=`.
    """

    def one_run(rate, key):
        optimizer = optax.with_extra_args_support(make(rate))

        def body(state, key):
            x, opt_state = state
            gradient, noisy = curvature * x, noise * jax.random.normal(key, x.shape)
            updates, opt_state = optimizer.update(
                gradient + noisy, opt_state, x, value_fn=lambda x: jnp.sum(curvature * x**2 / 2 + noisy * x)
            )
            return (optax.apply_updates(x, updates), opt_state), (jnp.sum(gradient * x) / 2, gradient)

        x = jnp.asarray(start, jnp.float32)
        return lax.scan(body, (x, optimizer.init(x)), jax.random.split(key, steps))[1]

    keys = jax.random.split(jax.random.key(0), runs)
    return jax.vmap(lambda rate: jax.vmap(lambda key: one_run(rate, key))(keys))(jnp.asarray(rates))


def best(found: jax.Array) -> tuple[int, float]:
    """The learning rate with the lowest loss over the last tenth, and that loss."""
    tail = np.asarray(found, np.float64)[:, :, -max(1, found.shape[-1] // 10) :].mean((1, 2))
    chosen = int(np.nanargmin(np.where(np.isfinite(tail), tail, np.inf)))
    return chosen, float(tail[chosen])


def run(config: Config) -> Iterator[Record]:
    """Tune both methods on every problem, and look at the densities on SGD's path.

    Yields:
      A record for each problem.
    """
    for kind in config.kinds:
        numbers = range(config.first_problem, config.first_problem + config.problems)
        for number in progress.track(numbers, f"problems of kind {kind}"):
            curvature, noise, start = (x.astype(np.float32) for x in problem(kind, number))
            found, gradients = losses(optax.sgd, curvature, noise, start, steps=config.steps, runs=config.runs)
            chosen, sgd = best(found)
            signs, _ = losses(signopt.signsgd, curvature, noise, start, steps=config.steps, runs=config.runs)
            chosen_signs, sign = best(signs)
            path, on_path = np.asarray(found[chosen, 0]), gradients[chosen, 0]
            moving = max(1, int(np.argmax(path <= 2 * sgd)) if np.any(path <= 2 * sgd) else len(path))
            densities = jax.vmap(diagnostics.density)(on_path[:moving])
            order = jnp.argsort(densities)
            seen, sparsest = (
                diagnostics.geometry(on_path[int(step)], jnp.asarray(noise), jnp.asarray(curvature))
                for step in (order[moving // 2], order[0])
            )
            outcome = {"I": sgd < sign, "II": sign <= 2 * sgd}
            regime, regime_of_sparsest = (diagnostics.regime(x, threshold=config.threshold) for x in (seen, sparsest))
            yield {
                "chosen": kind,
                "number": number,
                "regime": regime,
                "curvature_ratio": float(seen.curvature_ratio),
                "noise_ratio": float(seen.noise_ratio),
                "regime_of_sparsest": regime_of_sparsest,
                "sgd": sgd,
                "sign": sign,
                "learning_rates": [float(RATES[chosen]), float(RATES[chosen_signs])],
                "agrees": bool(outcome.get(regime, False)),
                "sparsest_agrees": bool(outcome.get(regime_of_sparsest, False)),
            }


def table(records: list[Record]) -> rich.table.Table:
    """Every problem: its regime, and who won."""
    agree, sparsest = (sum(record[name] for record in records[1:]) for name in ("agrees", "sparsest_agrees"))
    silent = sum(record["regime"] == "III" for record in records[1:])
    drawn = rich.table.Table(
        title=f"theory and outcome agree on {agree} of {len(records) - 1} problems, theory says nothing on {silent} "
        f"(with the smallest density they agree on {sparsest})"
    )
    for column in ("made for", "measured", "R1", "R2", "SGD's loss", "signSGD's loss", "signSGD / SGD", "agrees"):
        drawn.add_column(column, justify="right")
    for r in records[1:]:
        drawn.add_row(
            r["chosen"], r["regime"], f"{r['curvature_ratio']:.2f}", f"{r['noise_ratio']:.2f}", f"{r['sgd']:.3g}",
            f"{r['sign']:.3g}", f"{r['sign'] / r['sgd']:.2f}", "yes" if r["agrees"] else "no",
        )  # fmt: skip
    return drawn


def summary(records: list[Record]) -> list[list[str]]:
    """A row for each regime that was measured."""
    rows = [["regime", "problems", "theory is right", "signSGD's loss over SGD's", "R1", "R2"]]
    for regime in sorted({r["regime"] for r in records[1:]}):
        own = [r for r in records[1:] if r["regime"] == regime]

        def between(values):
            return f"{min(values):.2g} to {max(values):.2g}"

        ratios = [between([r[name] for r in own]) for name in ("curvature_ratio", "noise_ratio")]
        losses = between([r["sign"] / r["sgd"] for r in own])
        rows.append([regime, str(len(own)), f"{sum(r['agrees'] for r in own)}", losses, *ratios])
    return rows


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw every problem in the plane of R1 and R2, coloured by who won.

    Returns:
      The figures' files.
    """
    title = f"{len(records) - 1} quadratics in {DIMENSION} dimensions, one worker"
    figure, (axes,) = plots.panels(1, title=title, width=6.5, height=5)
    ratios = [np.log10(r["sign"] / r["sgd"]) for r in records[1:]]
    limit = max(map(abs, ratios))
    dots = axes.scatter(
        [r["curvature_ratio"] for r in records[1:]], [r["noise_ratio"] for r in records[1:]], c=ratios,
        cmap=plots.DIVERGING, vmin=-limit, vmax=limit, edgecolors="black",
    )  # fmt: skip
    for line in (axes.axhline, axes.axvline):
        line(records[0]["config"]["threshold"], color="grey", linestyle="--")
    figure.colorbar(dots, label="log10 of signSGD's loss over SGD's")
    axes.set(xlabel="R1: curvature over gradient", ylabel="R2: noise over gradient", xscale="log", yscale="log")
    return plots.save(figure, folder, "regimes")

"""SignProx against proximal SGD: objective, support and bits, on problems whose minimum is known.

Figure: the objective's gap to its minimum and the size of the support against steps, and the gap against bits sent. On a
LASSO (200 x 100, 8 spikes), without noise on one worker and with gradient noise on eight; and on l1-penalized logistic
regression of scikit-learn's breast cancer and digits data, whose minimum is that of its own `saga` solver. Beside them
the rule that looks almost the same and is not: the proximal operator after a sign step. Table: where each ends.
"""

from collections.abc import Callable, Iterator
import dataclasses
import pathlib
import statistics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.table

from experiments.common import plots
from experiments.common import problems
from experiments.common import progress
from experiments.common.flags import flag
from experiments.common.records import Record
import signopt

AXIS = "worker"
PROBLEMS = {
    "lasso": problems.lasso,
    "breast_cancer": lambda: problems.logistic("breast_cancer", 0.01),
    "digits": lambda: problems.logistic("digits", 0.005),
}
STEPS = {"lasso": 2000, "breast_cancer": 2000, "digits": 10_000}


class Method(NamedTuple):
    """One line of the figure.

    Attributes:
      make: From the configuration, a problem and the number of steps to an optimizer.
      votes: Whether it runs on all workers, with noise; if not, on one without.
      wire: What travels, for `signopt.wire.bytes_sent`; None for nothing.
    """

    make: Callable[["Config", problems.Problem, int], optax.GradientTransformation]
    votes: bool
    wire: str | None


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    problem: tuple[str, ...] = flag(tuple(PROBLEMS), "what to minimize", choices=tuple(PROBLEMS))
    workers: int = flag(8, "number of workers where there is noise", at_least=1)
    noise: float = flag(0.1, "standard deviation of a worker's gradient noise, on the lasso", at_least=0)
    steps: int = flag(0, "steps; 2000, or 10000 for digits, if 0", at_least=0)
    sgd_rate: float = flag(0.2, "first learning rate of proximal SGD with noise", at_least=0)
    vote_rate: float = flag(0.02, "first learning rate of the vote with noise", at_least=0)
    looks: int = flag(100, "looks at the objective on the way", at_least=1)
    seeds: int = flag(8, "number of runs with noise: seeds 0, 1, 2, ...", at_least=1)
    output: str = flag("results/signprox", "folder for records and plots")


def _one_worker(config, problem, steps):
    del config
    return signopt.signprox(_falling(problem.start_rate, steps, 1e-6 / problem.start_rate), prox=problem.prox)


def _naive(config, problem, steps):
    del config
    rate = _falling(problem.start_rate, steps, 1e-6 / problem.start_rate)
    return optax.chain(signopt.signsgd(rate), signopt.prox_step(problem.prox, rate))


def _proximal_gradient(config, problem, steps):
    del config, steps
    return optax.chain(optax.sgd(1 / problem.curvature), signopt.prox_step(problem.prox, 1 / problem.curvature))


def _voted(config, problem, steps):
    rate = _falling(config.vote_rate, steps, 1e-4)
    return signopt.signprox(
        rate, prox=problem.prox, beta=0.9, axis_name=AXIS, num_workers=config.workers, wire="one_bit"
    )


def _proximal_sgd(config, problem, steps):
    rate = _falling(config.sgd_rate, steps, 1e-3)
    return optax.chain(signopt.mean(AXIS), optax.sgd(rate), signopt.prox_step(problem.prox, rate))


def _naive_voted(config, problem, steps):
    rate = _falling(config.vote_rate, steps, 1e-4)
    return optax.chain(
        signopt.signum(rate, axis_name=AXIS, num_workers=config.workers, wire="one_bit"),
        signopt.prox_step(problem.prox, rate),
    )


METHODS = {
    "signprox, one worker": Method(_one_worker, votes=False, wire=None),
    "proximal gradient": Method(_proximal_gradient, votes=False, wire=None),
    "prox of sign": Method(_naive, votes=False, wire=None),
    "signprox, voted": Method(_voted, votes=True, wire="one_bit"),
    "proximal SGD, float32 mean": Method(_proximal_sgd, votes=True, wire="mean"),
    "prox of voted sign": Method(_naive_voted, votes=True, wire="one_bit"),
}


def _falling(start, steps, ratio):
    return optax.exponential_decay(start, steps, ratio)


def run(config: Config) -> Iterator[Record]:
    """Minimize each problem with each method, and look at the objective on the way.

    Yields:
      A record for each problem, method, seed and look.
    """
    for name in config.problem:
        problem, steps = PROBLEMS[name](), config.steps or STEPS[name]
        methods = {method: recipe for method, recipe in METHODS.items() if name == "lasso" or not recipe.votes}
        for method, recipe in progress.track(methods.items(), name):
            for record in _minimize(config, problem, recipe, steps):
                yield {"problem": name, "method": method} | record


def _minimize(config, problem, recipe, steps):
    tx = recipe.make(config, problem, steps)
    num_workers = config.workers if recipe.votes else 1
    seeds = np.arange(config.seeds if recipe.votes else 1)

    def step(state, worker):
        params, opt_state, key, count = state
        grads = jax.grad(problem.loss)(params)
        if recipe.votes:
            mine = jax.random.fold_in(jax.random.fold_in(key, count), worker[0])
            noise = optax.tree.random_like(mine, grads, jax.random.normal)
            grads = jax.tree.map(lambda g, n: g + config.noise * n, grads, noise)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, key, count + 1), 0.0

    together = signopt.workers.simulate(step, num_workers, axis_name=AXIS)
    advance = lambda state, _: (together(state, jnp.arange(num_workers))[0], None)  # noqa: E731
    every = -(-steps // config.looks)

    @jax.jit
    @jax.vmap
    def follow(state):
        return jax.lax.scan(advance, state, length=every)[0]

    def start(seed):
        return problem.start, tx.init(problem.start), jax.random.key(seed), jnp.int32(0)

    sent = signopt.wire.bytes_sent(problem.start, num_workers, recipe.wire) if recipe.wire else 0
    size = sum(x.size for x in jax.tree.leaves(problem.start))
    states = jax.vmap(start)(seeds)
    for done in range(every, every * config.looks + 1, every):
        states = follow(states)
        for seed in seeds:
            params = jax.tree.map(lambda x, seed=seed: x[seed], jax.device_get(states[0]))
            polished = problem.polish(params)
            yield {
                "seed": int(seed),
                "step": done,
                "gap": float(problem.gap(params)),
                "relative_gap": float(problem.gap(params) / problem.minimum),
                "nonzero": problem.nonzero(params),
                "nonzero_after_polish": problem.nonzero(polished),
                "support_errors": problem.support_errors(polished),
                "support_of_minimizer": problem.nonzero(problem.minimizer),
                "bits_per_parameter": 8 * sent * done / size,
            }


def final(records: list[Record]) -> dict[tuple[str, str], list[Record]]:
    """The last record of each seed, by problem and method."""
    found = {}
    for record in records[1:]:
        found.setdefault((record["problem"], record["method"]), {})[record["seed"]] = record
    return {name: list(by_seed.values()) for name, by_seed in found.items()}


def table(records: list[Record]) -> rich.table.Table:
    """The end of each run, averaged over seeds."""
    drawn = rich.table.Table(title="where each method ends")
    for column in ("problem", "method"):
        drawn.add_column(column)
    for column in ("gap", "relative", "nonzero", "polished", "wrong in\nsupport", "kbit per\nparameter"):
        drawn.add_column(column, justify="right", no_wrap=True)
    for (problem, method), ends in final(records).items():
        mean = lambda field, ends=ends: statistics.mean(record[field] for record in ends)  # noqa: E731
        drawn.add_row(
            problem,
            method,
            f"{mean('gap'):.1e}",
            f"{mean('relative_gap'):.1e}",
            f"{mean('nonzero'):.1f}",
            f"{mean('nonzero_after_polish'):.1f}",
            f"{mean('support_errors'):.1f}",
            f"{mean('bits_per_parameter') / 1000:.2f}",
        )
    return drawn


def kept(records: list[Record]) -> list[Record]:
    """Every tenth look, and the end of each run: enough for curves."""
    ends = {id(record) for found in final(records).values() for record in found}
    places = {}

    def is_tenth(record):
        run = record["problem"], record["method"], record["seed"]
        places[run] = places.get(run, 0) + 1
        return places[run] % 10 == 0 or id(record) in ends

    return [records[0], *filter(is_tenth, records[1:])]


EXPECTED = {
    ("lasso", "signprox, one worker"): "gap at most 1e-6, the same support",
    ("lasso", "signprox, voted"): "at most 2 x the gap of proximal SGD",
    ("breast_cancer", "signprox, one worker"): "relative gap at most 1e-4, the same support",
    ("digits", "signprox, one worker"): "relative gap at most 1e-4, the same support",
    ("lasso", "prox of sign"): "stays far above the minimum",
}


def summary(records: list[Record]) -> list[list[str]]:
    """Where each method ends, and what was expected."""
    rows = [["problem", "measured", "to expect"]]
    for (problem, method), ends in final(records).items():
        if method in ("proximal gradient", "prox of voted sign") or (problem != "lasso" and method == "prox of sign"):
            continue
        mean = {
            name: statistics.mean(r[name] for r in ends) for name in ends[0] if isinstance(ends[0][name], int | float)
        }
        sent = f", {mean['bits_per_parameter'] / 1000:.3g} kbit per parameter" if mean["bits_per_parameter"] else ""
        gaps = f"gap {mean['gap']:.1e}, relative {mean['relative_gap']:.1e}"
        support = (
            f"{mean['support_errors']:.1f} of {len(ends) and ends[0]['support_of_minimizer']} wrong in the support"
        )
        rows.append([f"{problem}: {method}", f"{gaps}, {support}{sent}", EXPECTED.get((problem, method), "")])
    return rows


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw gap and support against steps, and on the lasso with noise the gap against bits.

    Returns:
      The figures' files.
    """
    config = records[0]["config"]
    names = list(dict.fromkeys(record["problem"] for record in records[1:]))
    with_bits = [name for name in names if any(r["bits_per_parameter"] for r in records[1:] if r["problem"] == name)]
    title = f"{', '.join(names)}; with noise {config['workers']} workers, {config['seeds']} seeds"
    figure, panels = plots.panels(2 * len(names) + len(with_bits), title=title, width=4.6)
    panels = iter(panels)
    for name in names:
        gap, support, *bits = next(panels), next(panels), *([next(panels)] if name in with_bits else [])
        mine = [record for record in records[1:] if record["problem"] == name]
        for method in dict.fromkeys(record["method"] for record in mine):
            looks = [record for record in mine if record["method"] == method]
            steps = sorted({record["step"] for record in looks})

            def of_seeds(field, looks=looks, steps=steps):
                return [[r[field] for r in looks if r["step"] == step] for step in steps]

            gaps = np.maximum([statistics.mean(found) for found in of_seeds("gap")], 1e-9)
            gap.plot(steps, gaps, label=method)
            plots.band(support, steps, of_seeds("nonzero"), label=method)
            if looks[-1]["bits_per_parameter"]:
                style = {"color": gap.lines[-1].get_color(), "linestyle": gap.lines[-1].get_linestyle()}
                bits[0].plot([found[0] for found in of_seeds("bits_per_parameter")], gaps, label=method, **style)
        gap.set(title=name, xlabel="steps", ylabel="gap to the minimum", yscale="log")
        support.set(title=name, xlabel="steps", ylabel="entries that are not zero")
        support.axhline(mine[0]["support_of_minimizer"], color="black", linewidth=0.5)
        gap.legend(fontsize=7)
        for axes in bits:
            axes.set(
                title=name, xlabel="bits sent per parameter", ylabel="gap to the minimum", xscale="log", yscale="log"
            )
    return plots.save(figure, folder, "known")

"""Every optimizer on every problem: who reaches the optimum, in how many steps and bits, and what densities say first.

The problems are those of `experiments/papers/problems.py`. Four workers, mini-batches of their own, a cosine schedule to
zero. Every optimizer gets the best of learning rates a factor of two apart, by the steps it needs on an instance that is
drawn for this alone; while the best is at the edge of the grid, the grid moves. It counts as having reached the optimum
where its error stays below the problem's target, in the median over fresh instances. `diagnostics.geometry` looks at the
path of the tuned SGD and says who should be ahead, SGD or signSGD.

    python -m experiments suite
    python -m experiments suite --problems chain4,chain12 --optimizers sgd,signsgd

Time and numbers to expect are in experiments/README.md.
"""

from collections.abc import Callable, Iterator
from concurrent import futures
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table

from experiments.common import plots
from experiments.common import progress
from experiments.common import runners
from experiments.common.flags import flag
from experiments.common.records import Record
from experiments.papers import problems
import signopt
from signopt import diagnostics

AXIS = runners.AXIS
HELD_OUT = 1000  # the number of the instance that rates are tuned on
GRID = 8  # learning rates at a time, and instances
MOVES = 4  # of the grid, at most
PROBES, LOOKS = 4, 9
DIVERGED = 1e9


class Optimizer(NamedTuple):
    """What is compared.

    Attributes:
      make: From a learning rate, or schedule, the number of workers and a wire to the optimizer.
      first: The learning rate in the middle of the first grid; None if there is none to tune.
    """

    make: Callable[[optax.ScalarOrSchedule, int, str], optax.GradientTransformation]
    first: float | None


def _mean(make, first):
    return Optimizer(lambda rate, workers, wire: optax.chain(signopt.mean(AXIS), make(rate)), first)


def _vote(make, first=2.0**-8, **kwargs):
    return Optimizer(lambda rate, workers, wire: make(rate, axis_name=AXIS, wire=wire, **kwargs), first)


def _voted_momentum(make, first=2.0**-9, **kwargs):
    return Optimizer(
        lambda rate, workers, wire: make(rate, axis_name=AXIS, num_workers=workers, wire=wire, **kwargs), first
    )


def _fed_back(make, first):
    return Optimizer(lambda rate, workers, wire: make(rate, axis_name=AXIS, num_workers=workers), first)


def _mh_signsgd(rate, workers, wire):
    """It finds its learning rate: nothing is tuned."""
    del rate
    return signopt.mh_signsgd(axis_name=AXIS, num_workers=workers, wire=wire)


OPTIMIZERS = {
    "sgd": _mean(optax.sgd, 2.0**-3),
    "momentum": _mean(functools.partial(optax.sgd, momentum=0.9), 2.0**-6),
    "adam": _mean(optax.adam, 2.0**-5),
    "lion": _mean(functools.partial(optax.lion, weight_decay=0.0), 2.0**-8),
    "muon": _mean(optax.contrib.muon, 2.0**-5),
    "signsgd": _vote(signopt.signsgd),
    "signum": _voted_momentum(signopt.signum),
    "voted lion": _voted_momentum(signopt.lion, weight_decay=0.0),
    "mh_signsgd": Optimizer(_mh_signsgd, None),
    "sign_muon": _voted_momentum(signopt.sign_muon),
    "ef_signsgd": _fed_back(signopt.ef_signsgd, 2.0**-4),
    "ef_signum": _fed_back(signopt.ef_signum, 2.0**-8),
}
SENT_AS_FLOATS = ("sgd", "momentum", "adam", "lion", "muon")


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    problems: tuple[str, ...] = flag(tuple(problems.PROBLEMS), "which problems", choices=tuple(problems.PROBLEMS))
    optimizers: tuple[str, ...] = flag(tuple(OPTIMIZERS), "which optimizers", choices=tuple(OPTIMIZERS))
    steps: int = flag(1000, "steps of each run", at_least=1)
    workers: int = flag(4, "number of workers", at_least=1)
    seeds: int = flag(GRID, f"instances of each problem, at most {GRID}", at_least=1)
    output: str = flag("results/suite", "folder for records and plots")


class Task(NamedTuple):
    """A problem with its instances and their mini-batches, each with a leading axis of instances.

    Attributes:
      problem: The problem.
      held_out: What rates are tuned on: one instance, repeated.
      fresh: What optimizers are compared on.
    """

    problem: problems.Problem
    held_out: tuple[Any, Any]
    fresh: tuple[Any, Any]


def task(name: str, config: Config) -> Task:
    """Draw the instances of a problem and all their mini-batches."""
    problem = problems.PROBLEMS[name]

    @jax.jit
    def draw(seeds):
        def one(seed):
            first, second = jax.random.split(jax.random.key(seed))
            keys = jax.random.split(second, (config.steps, config.workers))
            return problem.draw(first), jax.vmap(jax.vmap(problem.batch))(keys)

        return jax.vmap(one)(seeds)

    return Task(problem, draw(np.full(GRID, HELD_OUT)), draw(np.arange(GRID)))


def trials(problem: problems.Problem, make: Callable, config: Config, instance: Any, batches: Any, rate: Any):
    """Errors after every step, and the parameters before it, of one run."""
    tx = make(
        optax.cosine_decay_schedule(rate, config.steps), config.workers, "psum"
    )  # two_bit's numbers, compiled faster

    def step(state, batch):
        params, opt_state = state
        own = jax.tree.map(lambda x: x[0], batch)
        value_and_grad = signopt.workers.value_and_grad(lambda p: problem.loss(p, instance, own), axis_name=AXIS)
        _, gradients = value_and_grad(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    together = signopt.workers.simulate(step, config.workers, axis_name=AXIS)

    def body(state, batch):
        new, _ = together(state, batch)
        return new, (problem.error(new[0], instance), state[0])

    start = instance["start"]
    return lax.scan(body, (start, tx.init(start)), batches)[1]


def reached(errors: np.ndarray, target: float) -> np.ndarray:
    """The step from which on each run stays at the target; inf if it never does."""
    good = np.where(np.isfinite(errors), errors, np.inf) <= target
    last_bad = np.where(good, 0, np.arange(1, errors.shape[-1] + 1)).max(-1)
    return np.where(last_bad < errors.shape[-1], last_bad + 1, np.inf)


def tune(name: str, optimizer: str, drawn: Task, config: Config) -> tuple[Record, float]:
    """Find the learning rate, then run it on fresh instances: the record, and the rate."""
    problem, (make, first) = drawn.problem, OPTIMIZERS[optimizer]
    run = jax.jit(
        jax.vmap(lambda instance, batches, rate: trials(problem, make, config, instance, batches, rate)[0]),
        compiler_options={"xla_backend_optimization_level": "1"},
    )
    rates = (first or 1.0) * 2.0 ** np.arange(-(GRID // 2), GRID - GRID // 2)
    best, seen = 1.0, {}
    for _ in range(MOVES + 1 if first else 0):
        errors = np.asarray(run(*drawn.held_out, rates.astype(np.float32)))
        last = np.where(np.isfinite(errors[:, -1]), errors[:, -1], np.inf)
        seen |= dict(zip(rates.tolist(), zip(reached(errors, problem.target), last, strict=True), strict=True))
        best = min(seen, key=lambda rate: seen[rate])
        if min(seen) < best < max(seen):
            break
        rates = rates * 2.0 ** ((GRID - 1) * (1 if best == max(seen) else -1))
    errors = np.asarray(run(*drawn.fresh, np.full(GRID, best, np.float32)))[: config.seeds]
    steps, start = reached(errors, problem.target), jax.tree.map(lambda x: x[0], drawn.fresh[0]["start"])
    tx = make(1e-3, config.workers, "two_bit")
    last = np.where(np.isfinite(errors[:, -1]), errors[:, -1], np.inf)
    median = float(np.median(steps))
    record = {
        "problem": name,
        "optimizer": optimizer,
        "learning_rate": best if first else None,
        "edge": bool(seen) and not min(seen) < best < max(seen),
        "size": sum(x.size for x in jax.tree.leaves(start)),
        "reached": int(np.isfinite(steps).sum()),
        "steps": median if np.isfinite(median) else None,
        "bits": 8 * signopt.wire.bytes_sent(start, config.workers, tx, axis_name=AXIS),
        "error": min(float(np.median(last)), DIVERGED),
    }
    return record, best


def look(drawn: Task, rate: float, config: Config) -> Record:
    """The geometry where the tuned SGD is on its way, at the typical density of the gradient there."""
    problem = drawn.problem
    instance, batches = jax.tree.map(lambda x: x[0], drawn.fresh)

    @jax.jit
    def along(rate):
        errors, path = trials(problem, OPTIMIZERS["sgd"].make, config, instance, batches, rate)
        finite = jnp.all(jnp.stack([jnp.isfinite(x).reshape(len(x), -1).all(1) for x in jax.tree.leaves(path)]), 0)
        moving = jnp.maximum(1, jnp.argmax((errors <= problem.target) | ~finite))
        moving = jnp.where(moving == 1, jnp.where(errors[0] <= problem.target, 1, config.steps), moving)
        some = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:256], batches)

        def geometry(i):
            params = jax.tree.map(lambda x: x[i], path)
            gradients = jax.vmap(lambda batch: jax.grad(problem.loss)(params, instance, batch))(some)
            noise = jax.tree.map(lambda x: x.std(0), gradients)

            def whole(params):
                return jnp.mean(jax.vmap(lambda batch: problem.loss(params, instance, batch))(some))

            curvature = diagnostics.hessian_diagonal(whole, params, jax.random.key(0), probes=PROBES)
            return diagnostics.geometry(jax.tree.map(lambda x: x.mean(0), gradients), noise, curvature)

        return lax.map(geometry, (jnp.linspace(0, 1, LOOKS) * (moving - 1)).astype(jnp.int32))

    seen = jax.device_get(along(jnp.float32(rate)))
    order = np.argsort(seen.gradient_density)
    typical = jax.tree.map(lambda x: x[order[LOOKS // 2]], seen)
    return {
        "regime": diagnostics.regime(jax.tree.map(jnp.asarray, typical)),
        **{name: float(value) for name, value in typical._asdict().items()},
    }


def run(config: Config) -> Iterator[Record]:
    """Tune every optimizer on every problem, two at a time, and look at each problem's geometry.

    Yields:
      A record for each problem and optimizer; one for each problem's geometry.
    """
    drawn = {name: task(name, config) for name in config.problems}
    pairs = [(name, optimizer) for name in config.problems for optimizer in config.optimizers]

    def one(pair):
        name, optimizer = pair
        record, rate = tune(name, optimizer, drawn[name], config)
        seen = [{"problem": name} | look(drawn[name], rate, config)] if optimizer == "sgd" else []
        return [record, *seen]

    with futures.ThreadPoolExecutor(2) as pool:
        pending = [pool.submit(one, pair) for pair in pairs]
        for done in progress.track(pending, "optimizers on problems"):
            yield from done.result()


def by_problem(records: list[Record]) -> dict[str, dict[str, Record]]:
    """The record of each optimizer on each problem."""
    found: dict[str, dict[str, Record]] = {}
    for record in records[1:]:
        if "optimizer" in record:
            found.setdefault(record["problem"], {})[record["optimizer"]] = record
    return found


def rank(own: dict[str, Record]) -> dict[str, int]:
    """Places among the optimizers of a problem, from 1: by steps, and by the last error among those that never arrive."""
    order = {name: (r["steps"] or np.inf, 0 if r["steps"] else r["error"]) for name, r in own.items()}
    return {name: 1 + sum(other < mine for other in order.values()) for name, mine in order.items()}


def predictions(records: list[Record]) -> dict[str, tuple[Record, str]]:
    """The geometry of each problem, and whether it was right about SGD and signSGD."""
    found = {}
    for record in (r for r in records[1:] if "regime" in r):
        own = by_problem(records)[record["problem"]]
        places = rank({name: own[name] for name in ("sgd", "signsgd") if name in own})
        if len(places) < 2 or record["regime"] == "III":
            verdict = "silent" if record["regime"] == "III" else ""
        else:
            steps = [own[name]["steps"] or np.inf for name in ("sgd", "signsgd")]
            ahead = {"I": places["sgd"] == 1, "II": places["signsgd"] == 1 or steps[1] <= 2 * steps[0]}
            verdict = "right" if ahead[record["regime"]] else "wrong"
        found[record["problem"]] = (record, verdict)
    return found


def summary(records: list[Record]) -> list[list[list[str]]]:
    """Steps with places and the prediction; then bits."""
    found, seen = by_problem(records), predictions(records)
    names = records[0]["config"]["optimizers"]
    steps = [["steps (place)", "predicted", "R1", "R2", *names]]
    bits = [["kbit sent by a worker", *names]]
    for problem, own in found.items():
        places, (geometry, verdict) = rank(own), seen.get(problem, ({}, ""))
        said = [f"{geometry['regime']}, {verdict}" if geometry else ""]
        ratios = [f"{geometry[x]:.2f}" if geometry else "" for x in ("curvature_ratio", "noise_ratio")]
        shown = [_steps(own[n], places[n]) for n in names]
        steps.append([problem, *said, *ratios, *shown])
        bits.append([problem, *(_kbit(own[n]) for n in names)])
    mean = [np.mean([rank(own)[name] for own in found.values()]) for name in names]
    arrived = [sum(bool(own[name]["steps"]) for own in found.values()) for name in names]
    steps.append(["mean place", "", "", "", *(f"{x:.1f}" for x in mean)])
    steps.append([f"reached, of {len(found)}", "", "", "", *map(str, arrived)])
    return [steps, bits]


def _steps(record, place):
    if record["steps"]:
        return f"{record['steps']:.0f} ({place})"
    return f"error {record['error']:.2g}" if record["error"] < DIVERGED else "diverges"


def _kbit(record):
    return f"{record['steps'] * record['bits'] / 1000:.3g}" if record["steps"] else "-"


def table(records: list[Record]) -> rich.console.Group:
    """Both tables; where the optimum is not reached, the first has the last error."""
    drawn = []
    for header, *rows in summary(records):
        one = rich.table.Table(*header, title=header[0])
        for row in rows:
            one.add_row(*row)
        drawn.append(one)
    return rich.console.Group(*drawn)


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw how many problems each optimizer has solved after so many steps, and after so many bits per parameter.

    Returns:
      The figures' files.
    """
    config, found = records[0]["config"], by_problem(records)
    title = f"{len(found)} problems, {config['workers']} workers, {config['seeds']} instances"
    figure, panels = plots.panels(2, title=title, width=5.0, height=4.2)
    for name in config["optimizers"]:
        own = [problem[name] for problem in found.values() if problem[name]["steps"]]
        style = "--" if name in SENT_AS_FLOATS else "-"
        steps = sorted(r["steps"] for r in own)
        bits = sorted(r["steps"] * r["bits"] / r["size"] for r in own)
        for axes, values in zip(panels, (steps, bits), strict=True):
            axes.step(values, np.arange(1, len(values) + 1), where="post", label=name, linestyle=style)
    for axes, label in zip(panels, ("steps", "bits sent per parameter and worker"), strict=True):
        axes.set(xlabel=label, ylabel="problems solved", xscale="log", ylim=(0, len(found) + 0.5))
    panels[0].legend(fontsize=7)
    return plots.save(figure, folder, "suite")

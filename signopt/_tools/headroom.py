"""Would compression help my step? What a vote gains here, what it could gain at most, and at which bandwidth it pays.

A step is timed as it is, with gradients averaged in float32; with a two-bit and a one-bit vote; and with the collective
left out, which nothing that compresses can beat. Left out means the same chain with `axis_name=None` under the same
runner: each worker follows its own gradients, and what it computes is thrown away.

    python -m signopt headroom --loss my_package.my_module:problem --workers 4
"""

# All programs run under `check_vma=False`: workers whose collective is left out drift apart, and types would say so.

import argparse
from collections.abc import Callable, Iterator
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from signopt import mean
from signopt import scale_by_signum
from signopt import workers
from signopt._tools import exchanges
from signopt._tools import problem as problems
from signopt._tools import timing
from signopt.vote import majority_vote

AXIS = "workers"
AS_IS, TWO_BIT, ONE_BIT = "mean, float32", "vote, two_bit", "vote, one_bit"
BOUND, VOTE_ALONE = "mean, left out", "vote, left out"
_RATE = 1e-3  # which no time depends on


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    problems.argument(parser)
    add, number = parser.add_argument, problems.number
    add("--workers", type=number(int, 2), default=8, help="workers, a device each (default: 8)")
    add("--steps", type=number(int, 1), default=5, help="back to back in one turn (default: 5)")
    add("--rounds", type=number(int, 1), default=11, help="how often each program takes its turn (default: 11)")
    add("--hosts", type=number(int, 2), default=16, help="of the cluster that you think of (default: 16)")
    add("--latency_us", type=number(float, 0), default=50.0, help="from one to another, microseconds (default: 50)")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time the programs, which take turns; then ask the cost model.

    Yields:
      A record for each program, and one of the model's for each wire.
    """
    devices = problems.devices(options.workers)  # before anything else asks JAX for one
    problem = problems.load(options.loss)
    made = programs(problem, devices, options.steps)
    seconds = timing.take_turns(made, options.rounds, problems.progress)
    for name, times in seconds.items():
        yield {
            "kind": "program",
            "program": name,
            "parameters": problem.size,
            "workers": options.workers,
            "device": devices[0].device_kind,
            "seconds": [t / options.steps for t in times],
        }
    compute = statistics.median(seconds[BOUND]) / options.steps
    cluster = exchanges.Cluster(options.hosts, math.nan, 1e-6 * options.latency_us)
    for wire in ("two_bit", "one_bit"):
        below = {
            str(gain): exchanges.break_even(
                problem.size, wire, cluster, exchanges.Rates(), speed_up=gain, compute_seconds=compute
            )
            for gain in (1.0, 1.1, 2.0)
        }
        finite = {gain: value if math.isfinite(value) else None for gain, value in below.items()}
        yield {"kind": "model", "wire": wire, "hosts": options.hosts, "compute_seconds": compute, "below": finite}


def programs(problem: problems.Problem, devices: list, steps: int) -> dict[str, Callable[[], Any]]:
    """Functions that each make some steps, from where they were, with every way to agree."""
    count = len(devices)
    mesh = jax.make_mesh((count,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    chosen = np.arange(count) % problem.count
    batch = jax.device_put(
        jax.tree.map(lambda x: x[chosen], problem.batches), jax.sharding.NamedSharding(mesh, jax.P(AXIS))
    )

    def of(optimizer):
        value_and_grad = workers.value_and_grad(problem.loss, axis_name=AXIS)

        def step(state, batch):
            params, opt_state = state
            value, gradients = value_and_grad(params, jax.tree.map(lambda x: x[0], batch))
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        run_step = workers.on_mesh(step, mesh, axis_name=AXIS, check_vma=False, donate=True)
        # Every program's own copy: a step takes the memory of its state.
        held = [jax.tree.map(jnp.copy, (problem.params, optimizer.init(problem.params)))]

        def program():
            for _ in range(steps):
                held[0], values = run_step(held[0], batch)
            return held[0], values

        return program

    def averaged(axis_name):
        return optax.chain(mean(axis_name), optax.sgd(_RATE, momentum=0.9))

    def voted(axis_name, wire):
        momentum = workers.per_worker(scale_by_signum(), count)
        return optax.chain(momentum, majority_vote(axis_name, wire=wire), optax.scale_by_learning_rate(_RATE))

    return {
        AS_IS: of(averaged(AXIS)),
        TWO_BIT: of(voted(AXIS, "two_bit")),
        ONE_BIT: of(voted(AXIS, "one_bit")),
        BOUND: of(averaged(None)),
        VOTE_ALONE: of(voted(None, "two_bit")),
    }


def report(records: list[dict[str, Any]]) -> str:
    """The programs' times, and what they mean in words."""
    first = records[0]
    rows = []
    for r in (r for r in records if r["kind"] == "program"):
        low, middle, high = timing.quartiles(speed_ups(records, r["program"]))
        ms = 1e3 * statistics.median(r["seconds"])
        rows.append([r["program"], f"{ms:.2f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}"])
    title = f"A step on {first['parameters']:,} parameters, {first['workers']} workers on {first['device']}; medians:"
    drawn = problems.table(["gradients meet by", "ms", "x as fast", "quartiles"], rows)
    return "\n".join([title, "", drawn, "", *words(records)])


def speed_ups(records: list[dict[str, Any]], program: str) -> list[float]:
    """How many times as fast as the step as it is, turn by turn."""
    seconds = {r["program"]: r["seconds"] for r in records if r["kind"] == "program"}
    return timing.ratios(seconds[AS_IS], seconds[program])


def words(records: list[dict[str, Any]]) -> list[str]:
    """What the records say about compression, in sentences."""
    best, two_bit, one_bit = (statistics.median(speed_ups(records, name)) for name in (BOUND, TWO_BIT, ONE_BIT))
    said = [
        f"Communication takes {1 - 1 / best:.0%} of your step here, so nothing that compresses makes it more than "
        f"{best:.2f} times as fast."
        if best > 1
        else "Communication takes no measurable share of your step here: there is nothing to gain.",
        f"A vote makes it {two_bit:.2f} (two bits) or {one_bit:.2f} (one bit) times as fast"
        + ("." if max(two_bit, one_bit) > 1.05 else ": on this network, keep the mean."),
    ]
    for r in (r for r in records if r["kind"] == "model"):
        some, double = (_where(r["below"][gain]) for gain in ("1.1", "2.0"))
        said.append(
            f"The cost model, for {r['hosts']} hosts with a link each and {1e3 * r['compute_seconds']:.3g} ms of "
            f"computation: {r['wire']} makes the step 1.1 times as fast {some}, and twice {double}."
        )
    return said


def _where(bits_per_second):
    if bits_per_second is None:
        return "at any bandwidth"
    return f"below {exchanges.bandwidth(bits_per_second)}bit/s" if bits_per_second else "below no bandwidth"

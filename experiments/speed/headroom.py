"""Would compression help my step? What it gains here, what it could gain at most, and at which bandwidth it pays.

A step is timed as it is, with gradients averaged in float32; with a two-bit and a one-bit vote; and with the collective left
out, which nothing that compresses can beat. Left out means the same chain with `axis_name=None` under the same runner: each
worker follows its own gradients, and what it computes is thrown away. All of them run under `check_vma=False`, since such
workers drift apart and types would say so. `--loss` names a function of your own: `package.module:function`, which returns
`(params, loss, batches)` with `loss(params, batch)` a scalar and every leaf of `batches` with a leading axis of
mini-batches, one for each worker in a step. PyTorch's no-op hook for gradients answers the same question.

    python -m experiments headroom
    python -m experiments headroom --loss my_package.my_module:problem --workers 4

Time and numbers to expect are in experiments/README.md.
"""

from collections.abc import Callable, Iterator
import dataclasses
import math
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import optax
import rich.console
import rich.table

from experiments.common import devices
from experiments.common import exchanges
from experiments.common import optimizers
from experiments.common import timing
from experiments.common.flags import flag
from experiments.common.records import Record
from experiments.papers import geometry
import signopt

AXIS = optimizers.AXIS
AS_IS, BOUND = "mean, float32", "mean, left out"
_RATE = 1e-3  # which no time depends on


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    loss: str = flag("", "package.module:function that returns (params, loss, batches); ours if empty")
    model: str = flag("wide", "ours: which network", choices=tuple(geometry.MODELS))
    batch_size: int = flag(32, "ours: examples in a mini-batch", at_least=1)
    workers: int = flag(8, "workers, a device each", at_least=2)
    steps: int = flag(5, "back to back in one turn", at_least=1)
    rounds: int = flag(11, "how often each program takes its turn", at_least=1)
    hosts: int = flag(16, "of the cluster that you think of, for the model", at_least=2)
    latency_us: float = flag(50.0, "microseconds from one of them to another, for the model", at_least=0)
    seeds: int = flag(1, "seed 0 makes our network", at_least=1)
    output: str = flag("results/headroom", "folder for records and plots")


def run(config: Config) -> Iterator[Record]:
    """Time the programs, which take turns.

    Yields:
      A record for each program, and one of the model's.
    """
    params, loss, batches = geometry.problem(geometry.Config(config.loss, config.model, config.batch_size))
    params, batches = jax.tree.map(jnp.asarray, (params, batches))
    made = programs(config, params, loss, batches)
    seconds = timing.take_turns(made, config.rounds)
    size = sum(x.size for x in jax.tree.leaves(params))
    for name, times in seconds.items():
        yield {"kind": "program", "program": name, "parameters": size, "seconds": [t / config.steps for t in times]}
    compute = statistics.median(seconds[BOUND]) / config.steps
    cluster = exchanges.Cluster(config.hosts, math.nan, 1e-6 * config.latency_us)
    for wire in ("two_bit", "one_bit"):
        below = {
            str(gain): exchanges.break_even(
                size, wire, cluster, exchanges.Rates(), speed_up=gain, compute_seconds=compute
            )
            for gain in (1.0, 1.1, 2.0)
        }
        finite = {gain: value if math.isfinite(value) else None for gain, value in below.items()}
        yield {"kind": "model", "wire": wire, "hosts": config.hosts, "compute_seconds": compute, "below": finite}


def programs(config: Config, params: Any, loss: Callable, batches: Any) -> dict[str, Callable[[], Any]]:
    """Functions that each make some steps, from where they were, with every way to agree."""
    mesh = jax.make_mesh(
        (config.workers,),
        (AXIS,),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=devices.take(config.workers),
    )

    def of(optimizer):
        value_and_grad = signopt.workers.value_and_grad(loss, axis_name=AXIS)

        def step(state, batch):
            params, opt_state = state
            value, gradients = value_and_grad(params, jax.tree.map(lambda x: x[0], batch))
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        run_step = signopt.workers.on_mesh(step, mesh, axis_name=AXIS, check_vma=False, donate=True)
        # Every program's own copy: a step takes the memory of its state.
        held = [jax.device_put((params, optimizer.init(params)), jax.devices()[0])]
        held[0] = jax.tree.map(jnp.copy, held[0])
        count = len(jax.tree.leaves(batches)[0])
        chosen = np.arange(config.workers) % count
        batch = jax.device_put(
            jax.tree.map(lambda x: x[chosen], batches), jax.sharding.NamedSharding(mesh, jax.P(AXIS))
        )

        def program():
            for _ in range(config.steps):
                held[0], values = run_step(held[0], batch)
            return held[0], values

        return program

    def averaged(axis_name):
        return optax.chain(signopt.mean(axis_name), optax.sgd(_RATE, momentum=0.9))

    def voted(axis_name, wire):
        momentum = signopt.workers.per_worker(signopt.scale_by_signum(), config.workers)
        return optax.chain(momentum, signopt.majority_vote(axis_name, wire=wire), optax.scale_by_learning_rate(_RATE))

    return {
        AS_IS: of(averaged(AXIS)),
        "vote, two_bit": of(voted(AXIS, "two_bit")),
        "vote, one_bit": of(voted(AXIS, "one_bit")),
        BOUND: of(averaged(None)),
        "vote, left out": of(voted(None, "two_bit")),
    }


def _seconds(records):
    return {r["program"]: r["seconds"] for r in records[1:] if r["kind"] == "program"}


def speed_ups(records: list[Record], program: str) -> list[float]:
    """How many times as fast as the step as it is, turn by turn."""
    seconds = _seconds(records)
    return timing.ratios(seconds[AS_IS], seconds[program])


def words(records: list[Record]) -> list[str]:
    """What the records say about compression, in sentences."""
    config = records[0]["config"]
    best, two_bit, one_bit = (
        statistics.median(speed_ups(records, name)) for name in (BOUND, "vote, two_bit", "vote, one_bit")
    )
    share = max(0.0, 1 - 1 / best)
    said = [
        f"Communication takes {share:.0%} of your step here, so nothing that compresses makes it more than {best:.2f} "
        f"times as fast."
        if best > 1
        else "Communication takes no measurable share of your step here: there is nothing to gain.",
        f"A vote makes it {two_bit:.2f} (two bits) or {one_bit:.2f} (one bit) times as fast"
        + ("." if max(two_bit, one_bit) > 1.05 else ": on this network, keep the mean."),
    ]
    for r in (r for r in records[1:] if r["kind"] == "model"):
        some, double = (_where(r["below"][gain]) for gain in ("1.1", "2.0"))
        said.append(
            f"The cost model, for {config['hosts']} hosts with a link each and {1e3 * r['compute_seconds']:.3g} ms of "
            f"computation: {r['wire']} makes the step 1.1 times as fast {some}, and twice {double}."
        )
    return said


def _where(bits_per_second):
    if bits_per_second is None:
        return "at any bandwidth"
    return f"below {exchanges.bandwidth(bits_per_second)}bit/s" if bits_per_second else "below no bandwidth"


def table(records: list[Record]) -> rich.console.Group:
    """The programs, and what they mean in words."""
    header, size = records[0], next(r["parameters"] for r in records[1:] if r["kind"] == "program")
    drawn = rich.table.Table(
        title=f"a step on {size:,} parameters, {header['config']['workers']} workers on {header['device']}, "
        f"{header['cores']} cores; medians"
    )
    for column in ("gradients meet by", "ms", "x as fast", "quartiles"):
        drawn.add_column(column, justify="left" if column == "gradients meet by" else "right")
    for name, times in _seconds(records).items():
        low, middle, high = timing.quartiles(speed_ups(records, name))
        drawn.add_row(name, f"{1e3 * statistics.median(times):.2f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}")
    return rich.console.Group(drawn, *words(records))


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw the time of a step in every round.

    Returns:
      The figures' files.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    seconds = _seconds(records)
    axes.boxplot([[1e3 * t for t in times] for times in seconds.values()], tick_labels=list(seconds))
    axes.axhline(
        1e3 * statistics.median(seconds[BOUND]), color="grey", linestyle="--", label="what compression cannot beat"
    )
    axes.set(ylabel="ms of a step", ylim=(0, None))
    axes.legend()
    path = pathlib.Path(folder) / "headroom.png"
    figure.savefig(path, dpi=150)
    return [path]

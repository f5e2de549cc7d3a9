"""What should my workers send, how often, and when? A ranked table for your loss, workers and network, and lines to paste.

Your step is timed with nothing exchanged, for each optimizer in question. The network is as you say, or is measured between the
devices of all processes. Gradients of your own batches say how dense they are, how far workers agree, and whether their data
differ: mini-batch i is worker i mod N's; of many processes each has those that it loads. A model adds up computation and
exchange. What a choice costs in accuracy is what it cost in this project's experiments, which the last column names: try
it on your own.

    python -m signopt advise --loss my_package.my_module:problem --workers 8 --megabits 1000
    python -m signopt advise --loss my_package.my_module:problem --workers 8
    python -m signopt advise --loss my_package.my_module:problem --distributed     # on every host
"""

import argparse
from collections.abc import Iterator
import os
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import optax

from signopt import wire as wires
from signopt._tools import choices
from signopt._tools import exchanges
from signopt._tools import gradients
from signopt._tools import links
from signopt._tools import problem as problems
from signopt._tools import timing

WORTH = 1.05  # times as fast as a mean: less is no reason to compress


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    problems.argument(parser)
    add, number = parser.add_argument, problems.number
    add("--workers", type=number(int, 2), help="workers; without a network given, a device each (default: all, or 8)")
    add("--megabits", type=number(float, 1e-3), help="Mbit/s of each worker's link, each way; measured if left out")
    add("--latency_us", "--latency-us", type=number(float, 0), default=50.0, help="of that link (default: 50)")
    add("--distributed", action="store_true", help="join other processes, as `jax.distributed.initialize` does")
    add(
        "--tolerance",
        type=number(float, 0),
        default=2.0,
        help="percent of loss or accuracy you would give (default: 2)",
    )
    add("--rounds", type=number(int, 1), default=7, help="how often each step is timed (default: 7)")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time steps, measure the network, look at gradients; then ask the cost model.

    Yields:
      A record for the network, one for the gradients, and one for each choice, the best first.
    """
    if options.distributed:
        _join()
    workers, mesh = _workers(options)
    problem = problems.load(options.loss)
    if mesh is None:
        link, rates = links.given(workers, 1e6 * options.megabits, 1e-6 * options.latency_us), exchanges.Rates()
    else:
        problems.progress("timing the network")
        link, rates = links.measured(mesh), links.rates()
    yield {
        "kind": "network",
        "measured": mesh is not None,
        "workers": workers,
        "parameters": problem.size,
        "device": jax.devices()[0].device_kind,
        **{name: cluster._asdict() for name, cluster in link._asdict().items()},
    }
    problems.progress("looking at gradients")
    found = gradients.look(problem, workers)
    yield {"kind": "gradients", "alike": found.alike, **found._asdict()}
    seconds = compute_seconds(problem, options.rounds)
    rows = predicted(problem, workers, link, rates, seconds, alike=found.alike)
    yield from ranked(rows, options.tolerance)


def _join():
    os.environ.setdefault("NPROC", "16")
    count, index = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    try:
        jax.distributed.initialize(
            num_processes=int(count) if count else None, process_id=int(index) if index else None
        )
    except (ValueError, RuntimeError) as error:
        raise problems.UsageError(
            f"`--distributed` cannot join other processes: {error} Start it with `srun` or `mpirun`, or set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process."
        ) from error


def _workers(options):
    """How many there are, and a mesh of them if the network is to be measured."""
    if options.megabits and not options.distributed:
        return options.workers or 8, None
    if options.distributed:
        devices, count = jax.devices(), options.workers or jax.device_count()
        if count != len(devices) and not options.megabits:
            raise problems.UsageError(
                f"`--workers {count}` has to be the {len(devices)} devices of all processes, whose network is measured. "
                "Leave it out, or say how fast another network is: `--megabits`."
            )
        if count % jax.process_count():
            raise problems.UsageError(
                f"`--workers {count}` has to be a multiple of the {jax.process_count()} processes."
            )
    else:
        count = options.workers or 8
        devices = problems.devices(count)
    if options.megabits:
        return count, None
    return count, jax.make_mesh((count,), (links.AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def compute_seconds(problem: problems.Problem, rounds: int) -> dict[str, float]:
    """The time of a step of one worker that exchanges nothing, for each of `choices.local_optimizers`.

    Of many processes, all of which have to call it, the slowest counts.
    """
    batch = jax.tree.map(lambda x: x[0], problem.batches)

    def of(optimizer):
        def step(params, opt_state, batch):
            gradient = jax.grad(problem.loss)(params, batch)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        run = jax.jit(step, donate_argnums=(0, 1))
        held = [jax.tree.map(jnp.copy, (problem.params, optimizer.init(problem.params)))]

        def program():
            held[0] = run(*held[0], batch)
            return held[0]

        return program

    programs = {name: of(optimizer) for name, optimizer in choices.local_optimizers().items()}
    seconds = timing.take_turns(programs, rounds, problems.progress)
    return {name: links.at_all(statistics.median(times)) for name, times in seconds.items()}


def predicted(
    problem: problems.Problem,
    workers: int,
    link: links.Links,
    rates: exchanges.Rates,
    seconds: dict[str, float],
    *,
    alike: bool,
) -> list[dict[str, Any]]:
    """What each choice takes, sends and costs."""
    overlaps = jax.default_backend() != "cpu"
    rows = []
    for choice in choices.CHOICES:
        size, schedule = problem.size, {name: getattr(choice, name) for name in ("every", "fragments", "delay")}
        cost = choices.cost(choice, alike=alike)
        rows.append(
            {
                "kind": "choice",
                "name": choice.name,
                "wire": choice.wire,
                **schedule,
                "compute_seconds": seconds[choice.local],
                "seconds": exchanges.step_seconds(
                    size,
                    choice.wire,
                    link.of(choice.wire),
                    rates,
                    compute_seconds=seconds[choice.local],
                    overlaps=overlaps,
                    **schedule,
                ),
                "bits": bits(problem.params, workers, choice),
                "percent": cost.percent,
                "basis": cost.basis,
                "code": choices.code(choice, workers),
            }
        )
    return rows


def bits(params: Any, workers: int, choice: choices.Choice) -> float:
    """What a worker sends per parameter and step, on average over a round."""
    size = sum(jnp.size(x) for x in jax.tree.leaves(params))
    named = {"float32": "mean"}.get(choice.wire, choice.wire)
    border: Any = exchanges.CODED[choice.wire](workers) if choice.wire in exchanges.CODED else named
    return 8 * wires.bytes_sent(params, workers, border) / choice.every / size


def ranked(rows: list[dict[str, Any]], tolerance: float) -> list[dict[str, Any]]:
    """The best first: what costs at most so many percent by time, then the rest by time.

    Not to compress comes first unless something is at least `WORTH` times as fast.
    """

    def costs_too_much(row):
        return row["percent"] is None or row["percent"] > tolerance

    found = sorted(rows, key=lambda row: (costs_too_much(row), row["seconds"]))
    found = [row | {"beyond": costs_too_much(row)} for row in found]
    means = [row for row in found if row["name"].startswith(choices.NOTHING) and not costs_too_much(row)]
    if means and means[0]["seconds"] <= WORTH * found[0]["seconds"]:
        found.remove(means[0])
        found.insert(0, means[0])
    return found


COLUMNS = ["", "how often, when", "ms a step", "bits", "costs", "basis"]


def report(records: list[dict[str, Any]]) -> str:
    """The network, the gradients, the table, and the lines for its first row."""
    network, look, *rows = records
    title = f"{network['parameters']:,} parameters, {network['workers']} workers on {network['device']}"
    shown = [
        [
            row["name"],
            _when(row),
            f"{1e3 * row['seconds']:.3g}",
            f"{row['bits']:.3g}",
            "?" if row["percent"] is None else f"{row['percent']:g} %",
            row["basis"],
        ]
        for row in rows
    ]
    beyond = next((i for i, row in enumerate(rows) if row["beyond"]), len(rows))
    if beyond < len(rows):
        shown.insert(beyond, ["beyond --tolerance:", *[""] * (len(COLUMNS) - 1)])
    legend = (
        "ms: predicted. bits: that a worker sends per parameter and step. costs: by how many percent it ended behind the "
        "best float32 mean in our experiments."
    )
    first = rows[0]
    code = [
        "",
        f"{first['name']}, {_when(first)}:",
        "",
        *(f"    {line}".rstrip() for line in first["code"].split("\n")),
        "",
        "It belongs in a step that `signopt.workers.on_mesh` or `simulate` runs; in plain `jax.jit` wrap it: "
        '`signopt.workers.in_jit(optimizer, mesh, axis_name="worker")`.',
        "docs/loops.md has both as diffs, docs/from_adamw.md the learning rates.",
    ]
    return "\n".join([title, *words(network, look), "", problems.table(COLUMNS, shown), "", legend, *code])


def _when(row):
    often = "every step" if row["every"] == 1 else f"every {row['every']} steps"
    return (
        often + (f" in {row['fragments']} parts" if row["fragments"] > 1 else "") + (", late" if row["delay"] else "")
    )


def words(network: dict[str, Any], look: dict[str, Any]) -> list[str]:
    """What was found out about the network and the gradients, in sentences."""
    speeds = [f"{exchanges.bandwidth(network[name]['bits_per_second'])}bit/s" for name in links.Links._fields]
    latency = f"{1e6 * network['deals']['latency_seconds']:.3g} us"
    said = [
        f"Network, measured: sums travel at {speeds[0]}, votes at {speeds[1]}; latency {latency}."
        if network["measured"]
        else f"Network, as you say: {speeds[0]}, latency {latency}."
    ]
    if look["probability"] is None:
        said.append("Too few mini-batches to tell whether workers' data differ; taken to be alike.")
    else:
        ratio = f"Workers' gradients differ {look['ratio']:.3g} times as much as noise explains"
        said.append(
            f"{ratio} (p = {look['probability']:.2g}): their data are {'alike' if look['alike'] else 'different'}."
        )
    said.append(
        f"Margin of the signs of single gradients: {look['margin']:.2f}, of thrown coins {look['chance']:.2f}. Density of the "
        f"mean gradient: {look['density']:.2g}."
    )
    return said

"""What should my workers send, how often, and when? A ranked table for your loss, workers and network, and lines to paste.

Your gradient is timed, and what each choice does with it on your own tree, on all devices at once, without a network. Then the
collectives of each choice's program are timed between the devices of all processes, or the network is as you say. A step is
the sum. Gradients of your own batches say how dense they are, how far workers agree, and whether their data differ:
mini-batch i is worker i mod N's; of many processes each has those that it loads. What a choice costs in accuracy is what it
cost in this project's experiments, which the last column names: try it on your own.

    python -m signopt advise --loss my_package.my_module:problem --workers 8 --megabits 1000
    python -m signopt advise --loss my_package.my_module:problem --workers 8
    python -m signopt advise --loss my_package.my_module:problem --distributed     # on every host
"""

import argparse
from collections.abc import Iterator, Sequence
import os
import sys
from typing import Any

import jax

from signopt import wire as wires
from signopt._tools import choices
from signopt._tools import exchanges
from signopt._tools import gradients
from signopt._tools import links
from signopt._tools import problem as problems
from signopt._tools import work

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
    add("--rank", type=number(int, 1), default=1, help="the row whose lines to paste are printed (default: 1)")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time the network, the gradient and every choice, look at gradients, and add up.

    Yields:
      A record for the network, one for the gradients, and one for each choice, the best first.
    """
    if options.rank > len(choices.CHOICES):
        raise problems.UsageError(f"`--rank` has to be at most {len(choices.CHOICES)}, got {options.rank}.")
    if options.distributed:
        _join()
    workers, mesh = _workers(options)
    problem = problems.load(options.loss)
    sent = messages(problem, workers)
    gradient = work.gradient(problem, devices := _own_devices(mesh))
    if mesh is None:
        cluster = exchanges.Cluster(workers, 1e6 * options.megabits, 1e-6 * options.latency_us)
        travel = [links.given(cluster, each) for each in sent]
    else:
        problems.progress("timing the network")
        travel = links.measured(mesh, sent, gradient)
    yield {
        "kind": "network",
        "measured": mesh is not None,
        "workers": workers,
        "parameters": problem.size,
        "device": jax.devices()[0].device_kind,
        "rank": options.rank,
        "latency_seconds": None if mesh is not None else 1e-6 * options.latency_us,
        "bits_per_second": 8 * _bytes(sent[0], workers) / travel[0] if mesh is not None else 1e6 * options.megabits,
    }
    problems.progress("looking at gradients")
    found = gradients.look(problem, workers)
    yield {"kind": "gradients", "alike": found.alike, **found._asdict()}
    seconds = work.seconds(problem, devices, gradient, options.rounds)
    yield from ranked(predicted(problem, workers, sent, travel, seconds, alike=found.alike), options.tolerance)


def _join():
    if jax.distributed.is_initialized():
        return
    # Gloo prints to the file of stdout, which is for what is found.
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
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


def _own_devices(mesh):
    return jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)


def messages(problem: problems.Problem, workers: int) -> list[links.Messages]:
    """The collectives of each choice's exchange."""
    return [
        tuple(wires.messages(problem.params, workers, choices.settled(choice, workers), axis_name=choices.AXIS))
        for choice in choices.CHOICES
    ]


def _bytes(messages, workers):
    return float(sum(message.sent(workers) for message in messages))


def predicted(
    problem: problems.Problem,
    workers: int,
    sent: Sequence[links.Messages],
    travel: Sequence[float],
    seconds: work.Work,
    *,
    alike: bool,
) -> list[dict[str, Any]]:
    """What each choice takes, sends and costs.

    Args:
      problem: The user's.
      workers: Their number.
      sent: The collectives of each choice's exchange.
      travel: The seconds that each of them takes.
      seconds: What is computed.
      alike: Whether the workers' data are.

    Returns:
      A record for each of `choices.CHOICES`.
    """
    rows = []
    for choice, own, exchange, update in zip(choices.CHOICES, sent, travel, seconds.updates, strict=True):
        cost = choices.cost(choice, alike=alike)
        rows.append(
            {
                "kind": "choice",
                "name": choice.name,
                **{name: getattr(choice, name) for name in ("every", "fragments", "delay")},
                "gradient_seconds": seconds.gradient,
                "update_seconds": update,
                "exchange_seconds": exchange,
                "seconds": step_seconds(choice, seconds.gradient, update, exchange),
                "bits": 8 * _bytes(own, workers) * choice.exchanges_per_step / problem.size,
                "percent": cost.percent,
                "basis": cost.basis,
                "code": choices.code(choice, workers),
            }
        )
    return rows


def step_seconds(choice: choices.Choice, gradient: float, update: float, exchange: float) -> float:
    """A step, on average over a round.

    Nothing overlaps but late decisions whose exchange no `lax.cond` holds, where the backend lets collectives run beside
    computation: of those the longer of gradient and travel counts.
    """
    if choice.delay and choice.fragments == choice.every and jax.default_backend() != "cpu":
        return max(gradient, exchange) + update
    return gradient + update + exchange * choice.exchanges_per_step


def ranked(rows: list[dict[str, Any]], tolerance: float) -> list[dict[str, Any]]:
    """The best first: what costs at most so many percent by time, then the rest by time.

    Not to compress comes first unless something is at least `WORTH` times as fast.
    """

    def costs_too_much(row):
        return row["percent"] is None or row["percent"] > tolerance

    found = sorted(rows, key=lambda row: (costs_too_much(row), row["seconds"]))
    found: list[dict[str, Any]] = [row | {"beyond": costs_too_much(row)} for row in found]
    means = [row for row in found if row["name"].startswith(choices.NOTHING) and not costs_too_much(row)]
    if means and means[0]["seconds"] <= WORTH * found[0]["seconds"]:
        found.remove(means[0])
        found.insert(0, means[0])
    return found


COLUMNS = ["", "rank", "how often, when", "ms a step", "bits", "costs", "basis"]


def report(records: list[dict[str, Any]]) -> str:
    """The network, the gradients, the table, and the lines for one of its rows."""
    network, look, *rows = records
    title = f"{network['parameters']:,} parameters, {network['workers']} workers on {network['device']}"
    shown = [
        [
            row["name"],
            str(rank),
            _when(row),
            f"{1e3 * row['seconds']:.3g}",
            f"{row['bits']:.3g}",
            "?" if row["percent"] is None else f"{row['percent']:g} %",
            row["basis"],
        ]
        for rank, row in enumerate(rows, 1)
    ]
    beyond = next((i for i, row in enumerate(rows) if row["beyond"]), len(rows))
    if beyond < len(rows):
        shown.insert(beyond, ["beyond --tolerance:", *[""] * (len(COLUMNS) - 1)])
    legend = (
        "ms: predicted. bits: that a worker sends per parameter and step. costs: by how many percent it ended behind the "
        "best float32 mean in our experiments."
    )
    shown_row = rows[network["rank"] - 1]
    code = [
        "",
        f"{shown_row['name']}, {_when(shown_row)} (`--rank` prints the lines of another row):",
        "",
        *(f"    {line}".rstrip() for line in shown_row["code"].split("\n")),
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
    speed = f"{exchanges.bandwidth(network['bits_per_second'])}bit/s"
    said = [
        f"Network, measured: a float32 mean of all parameters travels at {speed}."
        if network["measured"]
        else f"Network, as you say: {speed}, latency {1e6 * network['latency_seconds']:g} us."
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

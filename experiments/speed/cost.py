"""What a step costs: a model of its time from parameters, workers, bandwidth and latency, for every way to agree.

The model and its assumptions are in `signopt/_tools/exchanges.py`. It is checked against what `slow_network` measured, and says
below which bandwidth each wire pays, for up to 100,000 workers. No figure of a paper.

    python -m experiments cost
    python -m experiments cost --parameters 7000000000 --latency_us 50 --step_ms 2000
    python -m experiments cost --measured results/slow_network/records.jsonl --stages results/wire/records.jsonl

Time and numbers to expect are in experiments/README.md.
"""

from collections.abc import Iterator
import dataclasses
import math
import pathlib
import statistics
from typing import Any

import numpy as np
import rich.console
import rich.table

from experiments.common import namespaces
from experiments.common import plots
from experiments.common import progress
from experiments.common import records as recorded
from experiments.common.flags import flag
from experiments.common.records import Record
from signopt._tools import exchanges

KEPT = pathlib.Path(__file__).parents[1] / "measured" / "slow_network" / recorded.FILE
# What each program of `experiments/common/host.py` sends.
WIRE_OF_PROGRAM = {
    "float32 mean": "float32",
    "bfloat16 mean": "bfloat16",
    "int8 sum of signs": "int8",
    "psum": "int8",
    "bits gathered by all": "all_gather",
    "two_bit": "two_bit",
    "one_bit": "one_bit",
    "two_bit, swapped": "two_bit",
    "one_bit, swapped": "one_bit",
}
# What headers leave of a packet for data.
PAYLOAD_SHARE = 1 - namespaces.HEADER_BYTES / (namespaces.MTU + 14)
BANDWIDTHS = np.logspace(6, 13, 141)  # bits/s
WORTH = 1.1  # a gain that one would notice
# Wire, `every`, `fragments` and `delay`, as in `signopt.local_steps`.
WAYS = (
    "float32/1/1/0",
    "low_precision/1/1/0",
    "scaled_sign/1/1/0",
    "top_k/1/1/0",
    "one_bit/1/1/0",
    "one_bit/1/1/1",
    "float32/16/1/0",
    "sized/16/1/0",
    "sized/16/16/1",
)
SHOWN = (1e8, 1e9, 1e10, 1e11)  # bits/s, of the table of ways


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    parameters: int = flag(124_000_000, "of the model", at_least=1)
    sizes: tuple[int, ...] = flag((2, 4, 8, 64, 1024, 10_000, 100_000), "numbers of workers", at_least=2)
    latency_us: float = flag(50.0, "microseconds from one worker to another", at_least=0)
    message_us: float = flag(2.0, "microseconds that a message costs its sender", at_least=0)
    step_ms: float = flag(200.0, "milliseconds that a worker computes in a step", at_least=0)
    inner: int = flag(8, "devices of a host, which average in float32 in the plot of two levels", at_least=1)
    inner_gigabits: float = flag(400.0, "Gbit/s of the links inside a host", at_least=1e-3)
    ways: tuple[str, ...] = flag(WAYS, "of exchanging: wire/every/fragments/delay")
    measured: str = flag("", "records of slow_network to check against; those kept with the code if empty")
    stages: str = flag("", "records of the experiment wire, with the rates of this machine; those of ours if empty")
    workers: int = flag(1, "devices to ask for", at_least=1)
    seeds: int = flag(1, "one: nothing is random", at_least=1)
    output: str = flag("results/cost", "folder for records and plots")


def run(config: Config) -> Iterator[Record]:
    """Check the model, and say which wire wins where.

    Yields:
      The rates, a record for each program of `slow_network`, for each number of workers and wire, and for each of the two
      curves of a plot.
    """
    rates = rates_of(recorded.read(config.stages)) if config.stages else exchanges.Rates()
    yield {"kind": "rates"} | dataclasses.asdict(rates)
    if config.measured or KEPT.exists():
        yield from check(recorded.read(config.measured or KEPT), rates)
    compute, size = 1e-3 * config.step_ms, config.parameters
    for workers in progress.track(config.sizes, "numbers of workers"):
        cluster = exchanges.Cluster(workers, math.nan, 1e-6 * config.latency_us, 1e-6 * config.message_us)

        def at(bandwidth, wire, cluster=cluster):
            return exchanges.exchange_seconds(size, wire, cluster._replace(bits_per_second=bandwidth), rates)

        times = {wire: [at(bandwidth, wire) for bandwidth in BANDWIDTHS] for wire in exchanges.WIRES}
        fastest = [min(exchanges.WIRES, key=lambda wire: times[wire][i]) for i in range(len(BANDWIDTHS))]
        for wire in exchanges.WIRES:
            wins = [float(b) for b, best in zip(BANDWIDTHS, fastest, strict=True) if best == wire]
            below = [
                exchanges.break_even(size, wire, cluster, rates, speed_up=gain, compute_seconds=compute)
                if wire != "float32"
                else 0.0
                for gain in (1.0, WORTH)
            ]
            yield {
                "kind": "wire",
                "workers": workers,
                "wire": wire,
                "bits_per_parameter": 8 * exchanges.bytes_sent(size, workers, wire) / size,
                "pays_below": below[0] if math.isfinite(below[0]) else None,
                "worth_it_below": below[1] if math.isfinite(below[1]) else None,
                "fastest_from": min(wins, default=None),
                "fastest_to": max(wins, default=None),
                "seconds": times[wire],
            }
    workers = config.sizes[min(2, len(config.sizes) - 1)]
    cluster = exchanges.Cluster(workers, math.nan, 1e-6 * config.latency_us, 1e-6 * config.message_us)
    for way in progress.track(config.ways, "ways"):
        wire, schedule = named(way)
        seconds = [
            exchanges.step_seconds(
                size, wire, cluster._replace(bits_per_second=b), rates, compute_seconds=compute, **schedule
            )
            for b in BANDWIDTHS
        ]
        yield {"kind": "way", "workers": workers, "way": way, "seconds": seconds, "bits": bits(way, size, workers)}
    hosts = max(2, config.sizes[len(config.sizes) // 2] // config.inner)
    inner = exchanges.Cluster(config.inner, 1e9 * config.inner_gigabits, 1e-6, 0.0)
    for wire in exchanges.WIRES:
        outer = [exchanges.Cluster(hosts, b, 1e-6 * config.latency_us, 1e-6 * config.message_us) for b in BANDWIDTHS]
        seconds = [exchanges.two_level_seconds(size, wire, inner, o, rates, compute_seconds=compute) for o in outer]
        yield {"kind": "two levels", "hosts": hosts, "devices": config.inner, "wire": wire, "seconds": seconds}


def named(way: str) -> tuple[str, dict[str, Any]]:
    """Read a way of exchanging.

    Raises:
      SystemExit: If there is no such wire, or a number is missing.

    Examples:
      >>> named("sized/16/4/1")
      ('sized', {'every': 16, 'fragments': 4, 'delay': 1})
    """
    wire, *numbers = way.split("/")
    if wire not in (*exchanges.WIRES, *exchanges.CODED) or len(numbers) != 3 or not all(map(str.isdecimal, numbers)):
        raise SystemExit(f"error: --ways has to be of names such as {', '.join(WAYS[-2:])}, got {way}")
    return wire, dict(zip(("every", "fragments", "delay"), map(int, numbers), strict=True))


def bits(way: str, parameters: int, workers: int) -> float:
    """What a worker sends per parameter and step, on average over a round."""
    wire, schedule = named(way)
    part = -(-parameters // schedule["fragments"])
    return 8 * exchanges.bytes_sent(part, workers, wire) * schedule["fragments"] / schedule["every"] / parameters


def check(measured: list[Record], rates: exchanges.Rates) -> Iterator[Record]:
    """Predict what `slow_network` measured on links with a limit.

    All hosts compute on one machine, so that work takes as many times longer. Gloo, which carries JAX's collectives
    between processes of CPUs, sends bfloat16 as float32.

    Args:
      measured: The records of `slow_network`, the header first.
      rates: Of the machine.

    Yields:
      A record for each number of hosts, link and program, with seconds measured and predicted.
    """
    cases = {}
    for r in measured[1:]:
        if r["kind"] == "vote" and r["megabits"]:
            cases.setdefault((r["hosts"], r["megabits"], r["program"]), []).append(r)
    for (hosts, megabits, program), turns in cases.items():
        size = turns[0]["parameters"]
        wire = WIRE_OF_PROGRAM[program]
        sent = "float32" if wire == "bfloat16" else wire
        cluster = exchanges.Cluster(hosts, 1e6 * megabits * PAYLOAD_SHARE)
        shared = rates.times(hosts)
        yield {
            "kind": "check",
            "hosts": hosts,
            "megabits": megabits,
            "program": program,
            "wire": wire,
            "measured": statistics.median(r["seconds"] for r in turns),
            "predicted": exchanges.exchange_seconds(size, sent, cluster, shared),
        }


def rates_of(stages: list[Record]) -> exchanges.Rates:
    """The rates that the records of `the experiment `wire`` hold: medians over the stages that were timed.

    Args:
      stages: Records, the header first. A stage packs all `parameters`, counts what `workers` voters have cast for a share
        of them, as many ballots as there are parameters, or unpacks; stages that are missing keep their default.

    Examples:
      >>> found = [{"kind": "stage", "stage": "pack", "planes": 2, "workers": 8, "parameters": 1000, "seconds": [4e-6]}]
      >>> f"{rates_of([{}, *found]).pack:.1e}"
      '4.0e-09'
    """
    found = {}
    for r in stages[1:]:
        if r.get("kind") == "stage" and r["stage"] in ("pack", "count", "unpack"):
            if r["stage"] == "count" and r["workers"] > exchanges.MANY:
                continue  # the loop, which the model knows as such
            per = r["planes"] if r["stage"] == "count" else 1
            found.setdefault(r["stage"], []).append(statistics.median(r["seconds"]) / (r["parameters"] * per))
    return dataclasses.replace(
        exchanges.Rates(), **{stage: statistics.median(values) for stage, values in found.items()}
    )


def medians(measured: list[Record]) -> list[Record]:
    """The records of `slow_network` with the turns of a program as one: medians.

    Examples:
      >>> turns = [{"kind": "vote", "program": "psum", "round": i, "seconds": i, "decided": 7} for i in range(3)]
      >>> medians([{}, *({"hosts": 2, "megabits": 100.0} | turn for turn in turns)])[1:]
      [{'hosts': 2, 'megabits': 100.0, 'kind': 'vote', 'program': 'psum', 'round': 0, 'seconds': 1}]
    """
    kept, votes = [], {}
    for r in measured[1:]:
        if r["kind"] == "vote":
            votes.setdefault((r["hosts"], r["megabits"], r["program"]), []).append(r)
    for turns in votes.values():
        first = {name: value for name, value in turns[0].items() if name not in ("decided", "same_everywhere")}
        kept.append(first | {"round": 0, "seconds": statistics.median(r["seconds"] for r in turns)})
    return [measured[0], *kept, *(r for r in measured[1:] if r["kind"] != "vote")]


def errors(records: list[Record]) -> list[float]:
    """By how much the model errs, as a fraction of what was measured; negative where it is too fast."""
    return [r["predicted"] / r["measured"] - 1 for r in records[1:] if r["kind"] == "check"]


def table(records: list[Record]) -> rich.console.Group:
    """The check, and for each number of workers what pays where."""
    return rich.console.Group(*(part(records) for part in (_table_of_check, _table_of_wires, _table_of_ways)))


def _table_of_check(records):
    drawn = rich.table.Table(title="the model against slow_network: seconds of a vote")
    for column in ("hosts", "Mbit/s", "program", "measured, ms", "model, ms", "error"):
        drawn.add_column(column, justify="left" if column == "program" else "right")
    for r in (r for r in records[1:] if r["kind"] == "check"):
        ms = [f"{1e3 * r[name]:.1f}" for name in ("measured", "predicted")]
        error = f"{r['predicted'] / r['measured'] - 1:+.0%}"
        drawn.add_row(str(r["hosts"]), f"{r['megabits']:g}", r["program"], *ms, error)
    if sizes := [abs(error) for error in errors(records)]:
        drawn.caption = f"median error {statistics.median(sizes):.0%}, worst {max(sizes):.0%}"
    return drawn


def _table_of_wires(records):
    config = records[0]["config"]
    drawn = rich.table.Table(
        title=f"{config['parameters']:,} parameters, {config['latency_us']:g} us latency, {config['step_ms']:g} ms of "
        "computation in a step: bandwidths in bits/s"
    )
    columns = ("bits per\nparameter", "faster than\nfloat32 below", f"{WORTH:g} x as\nfast below", "fastest of all")
    for column in ("workers", "wire", *columns):
        drawn.add_column(column, justify="left" if column == "wire" else "right")
    for r in (r for r in records[1:] if r["kind"] == "wire"):
        first = r["wire"] == "float32"
        below = ["" if first else exchanges.bandwidth(r[name]) for name in ("pays_below", "worth_it_below")]
        wins = "" if r["fastest_from"] is None else _interval(r["fastest_from"], r["fastest_to"])
        drawn.add_row(f"{r['workers']:,}", r["wire"], f"{r['bits_per_parameter']:.2f}", *below, wins)
        if r["wire"] == exchanges.WIRES[-1]:
            drawn.add_section()
    drawn.caption = "fastest of all: among the bandwidths of the plot, 1 Mbit/s to 10 Tbit/s"
    return drawn


def _table_of_ways(records):
    found = [r for r in records[1:] if r["kind"] == "way"]
    drawn = rich.table.Table(title=f"seconds of a step, {found[0]['workers'] if found else 0} workers")
    shown = [f"{exchanges.bandwidth(b)}bit/s" for b in SHOWN]
    for column in ("wire", "every", "fragments", "delay", "bits per\nparameter", *shown):
        drawn.add_column(column, justify="left" if column == "wire" else "right")
    for r in found:
        drawn.add_row(*r["way"].split("/"), f"{r['bits']:.3g}", *(f"{at(r, b):.3g}" for b in SHOWN))
    drawn.caption = "late exchanges run beside computation where nothing holds them, as on accelerators"
    return drawn


def at(record: Record, bits_per_second: float) -> float:
    """What a curve says at the bandwidth of the plot that is nearest."""
    return record["seconds"][int(np.argmin(abs(np.log(BANDWIDTHS / bits_per_second))))]


def _interval(low, high):
    if high >= BANDWIDTHS[-1]:
        return "all" if low <= BANDWIDTHS[0] else f"from {exchanges.bandwidth(low)}"
    return (
        f"up to {exchanges.bandwidth(high)}"
        if low <= BANDWIDTHS[0]
        else f"{exchanges.bandwidth(low)} to {exchanges.bandwidth(high)}"
    )


def summary(records: list[Record]) -> list[list[str]]:
    """Below which bandwidth each wire is faster than a mean, and where one bit is worth it."""
    shown = ("one_bit", "two_bit", "int8", "all_gather")
    rows = [["workers", *(f"{wire} pays below" for wire in shown), f"one_bit is {WORTH:g} x as fast below"]]
    of = {(r["workers"], r["wire"]): r for r in records[1:] if r["kind"] == "wire"}
    for workers in records[0]["config"]["sizes"]:
        below = [of[workers, wire]["pays_below"] for wire in shown] + [of[workers, "one_bit"]["worth_it_below"]]
        rows.append([f"{workers:,}", *(_where(found) for found in below)])
    return rows


def _where(found):
    name = exchanges.bandwidth(found)
    return name if name in ("any", "none") else f"{name}bit/s"


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw the time of a step against bandwidth, for each number of workers and for two levels, and the check.

    Returns:
      The figures' files.
    """
    config = records[0]["config"]
    compute = 1e-3 * config["step_ms"]
    of_wires = [r for r in records[1:] if r["kind"] == "wire"]
    sizes = [w for w in config["sizes"] if w in (config["sizes"][0], 64, config["sizes"][-1])]
    two = [r for r in records[1:] if r["kind"] == "two levels"]
    checked = [r for r in records[1:] if r["kind"] == "check"]
    title = f"the model, {config['parameters']:,} parameters"
    ways = [r | {"wire": r["way"]} for r in records[1:] if r["kind"] == "way"]
    figure, panels = plots.panels(len(sizes) + bool(ways) + 1 + bool(checked), title=title)
    curves = [(f"{w:,} workers", [r for r in of_wires if r["workers"] == w], compute) for w in sizes]
    if ways:
        curves.append((f"{ways[0]['workers']} workers: wire/every/fragments/delay", ways, 0.0))
    curves.append((f"{two[0]['hosts']} hosts of {two[0]['devices']} devices", two, 0.0))
    for axes, (title, wires, more) in zip(panels, curves, strict=False):
        for r in wires:
            axes.plot(BANDWIDTHS, [s + more for s in r["seconds"]], label=r["wire"])
        axes.axhline(compute, color="grey", linestyle="--", linewidth=0.8, label="computation")
        axes.set(title=title, xscale="log", yscale="log", xlabel="bit/s of a link", ylabel="seconds of a step")
        if wires is ways:
            axes.legend(fontsize=7)
    panels[len(sizes) + bool(ways)].legend()
    if checked:
        axes = panels[-1]
        for hosts in sorted({r["hosts"] for r in checked}):
            own = [r for r in checked if r["hosts"] == hosts]
            axes.plot([r["measured"] for r in own], [r["predicted"] for r in own], "o", label=f"{hosts} hosts")
        ends = [f(r["measured"] for r in checked) for f in (min, max)]
        axes.plot(ends, ends, color="grey", linewidth=0.8)
        axes.set(title="check", xscale="log", yscale="log", xlabel="measured, s", ylabel="model, s")
        axes.legend()
    return plots.save(figure, folder, "cost")

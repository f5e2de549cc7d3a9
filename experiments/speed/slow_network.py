"""Votes and training between hosts whose links are slow: 100 Mbit/s, 1 Gbit/s and as fast as the machine goes.

Every host is a process of its own in a network namespace of its own, with a token bucket on both ends of its link
(`experiments/common/namespaces.py`), and JAX's collectives travel over TCP (gloo). First votes are held back to back, with this
library's wires and with what others send: a mean in float32 and bfloat16, 8-bit signs, and packed signs that everybody
gathers from everybody; the programs take turns in one run, since only ratios from one run mean anything. The kernel counts
what travels. Then a network of a million parameters is trained on the digits until it has a test accuracy. No figure of a
paper; to expect at 100 Mbit/s is a one-bit vote 28 times as fast as a mean in float32, and a two-bit vote 14 times.

Needs Linux, root and iproute2, which makes the links.

    python -m experiments slow_network
    python -m experiments slow_network --hosts 2 --megabits 100 --no-training

Time and numbers to expect are in experiments/README.md.
"""

from collections.abc import Iterator
import dataclasses
import pathlib
import statistics
import time

import rich.console
import rich.table

from experiments.common import asking
from experiments.common import namespaces
from experiments.common import plots
from experiments.common import progress
from experiments.common.flags import flag
from experiments.common.records import Record
from experiments.speed import cost
from signopt._tools import exchanges
from signopt._tools import timing

BASELINE = "float32 mean"
WIRES = cost.WIRE_OF_PROGRAM
LIMITS = {
    "one_bit, swapped": 28,
    "two_bit, swapped": 14,
}  # at LIMITED_AT, how many times as fast as `BASELINE`, at least
LIMITED_AT = 100.0
RUNS = (("sgd", "mean"), ("signum", "two_bit"), ("signum", "one_bit"))
PORT = 9999  # nobody else is in the namespace


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    hosts: tuple[int, ...] = flag((2, 4), "numbers of hosts, a process each", at_least=2)
    megabits: tuple[float, ...] = flag(
        (100.0, 1000.0, 0.0), "Mbit/s of every link, each way; 0 for no limit", at_least=0
    )
    parameters: int = flag(4_194_304, "parameters of a vote", at_least=1)
    leaves: int = flag(1, "arrays that they are in", at_least=1)
    rounds: int = flag(5, "how often each program takes its turn; 0 for no votes", at_least=0)
    seconds: float = flag(0.5, "about how long one turn holds votes, of which there are 2 to 10", at_least=0)
    training: bool = flag(True, "whether to train, too")
    width: int = flag(1024, "of the trained network's two hidden layers", at_least=1)
    batch_size: int = flag(16, "examples per host and step", at_least=1)
    target: float = flag(0.97, "test accuracy at which training stops", at_least=0)
    evaluate_every: int = flag(5, "steps between two looks at the test images", at_least=1)
    steps: int = flag(300, "at which training gives up", at_least=1)
    sgd_rate: float = flag(0.1, "learning rate of SGD with momentum 0.9", at_least=0)
    signum_rate: float = flag(5e-4, "learning rate of Signum", at_least=0)
    validation: bool = flag(False, "test on the last fifth of the training images instead, to tune")
    workers: int = flag(1, "devices of a host", at_least=1)
    seeds: int = flag(1, "trainings: seeds 0, 1, 2, ...", at_least=1)
    output: str = flag("results/slow_network", "folder for records and plots")


def run(config: Config) -> Iterator[Record]:
    """Hold votes and train, on every number of hosts and at every rate.

    Returns:
      A record for each turn of a program, each test of a late host, and each training.

    Raises:
      NetworkError: Before anything is measured or written, if links cannot be made here.
    """
    namespaces.require()
    return _run(config)


def _run(config):
    for count in config.hosts:
        with namespaces.network(count) as network, asking.running(network) as ask:
            for program in WIRES if config.rounds else ():
                ask("votes", program=program, parameters=config.parameters, leaves=config.leaves, count=0)
            for megabits in config.megabits:
                namespaces.shape(network, 1e6 * megabits if megabits else None)
                where = {"hosts": count, "megabits": megabits}
                for record in _measure(config, count, megabits, ask):
                    yield where | record | {"dropped": namespaces.dropped(network)}


def _measure(config, count, megabits, ask):
    """The records of one number of hosts at one rate."""
    name = f"{count} hosts, {_link(megabits)}"
    for turn in progress.track(range(config.rounds), f"{name}: votes"):
        order = list(WIRES)
        for program in order[turn % len(order) :] + order[: turn % len(order)]:
            formula = exchanges.bytes_sent(config.parameters, count, WIRES[program], leaves=config.leaves)
            expected = 8 * formula / (1e6 * megabits) if megabits else 0.0
            votes = min(10, max(2, round(config.seconds / max(expected, 1e-3))))
            asked = {"program": program, "parameters": config.parameters, "leaves": config.leaves, "count": votes}
            found = ask("votes", **asked)
            yield (
                {"kind": "vote", "round": turn, "formula_bytes": formula}
                | asked
                | _together(found)
                | {
                    "decided": found[0]["decided"],
                    "same_everywhere": len({answer["decided"] for answer in found}) == 1,
                }
            )
    if megabits and config.rounds:
        size = exchanges.bytes_sent(config.parameters, count, "one_bit") // (count - 1) * count // 2
        for collective in _collectives(count):
            for delay in (0.0, 0.01):
                asked = {"collective": collective, "size": size, "delay": delay}
                ask("late", **asked, at=0.0)  # compiles
                found = [ask("late", **asked, at=time.monotonic() + 0.1) for _ in range(config.rounds)]
                seconds = [max(answer["seconds"] for answer in answers) for answers in found]
                yield {"kind": "late", "collective": collective, "delay": delay, "bytes": size, "seconds": seconds}
    for seed in range(config.seeds if config.training else 0):
        for optimizer, wire in RUNS:
            rate = config.sgd_rate if optimizer == "sgd" else config.signum_rate
            settings = ("width", "batch_size", "target", "evaluate_every", "steps", "validation")
            asked = {"optimizer": optimizer, "wire": wire, "learning_rate": rate, "seed": seed}
            found = ask("train", **asked, **{name: getattr(config, name) for name in settings})
            ends = {name: found[0][name] for name in ("accuracy", "parameters")}
            yield {"kind": "training"} | asked | _together(found) | ends | {"steps": found[0]["steps"]}


def _collectives(hosts):
    """The exchanges that a late host is tested with: those of JAX, and swaps between so many hosts."""
    swapped = {2: ("all_to_all, swapped", "all_gather, swapped"), 4: ("all_to_all, swapped",)}
    return ("all_to_all", "all_gather", *swapped.get(hosts, ()))


def _together(found):
    """The slowest host's seconds, and the most that one has sent and received."""
    names = ("seconds", *namespaces.Counted._fields)
    return {name: max(answer[name] for answer in found) for name in names}


def _link(megabits):
    return f"{megabits:g} Mbit/s" if megabits else "no limit"


def payload_bits(record: Record, direction: str = "sent") -> float:
    """Bits per parameter that one host sent (or "received") in a vote or a step, without the headers of packets."""
    size = record[f"bytes_{direction}"] - namespaces.HEADER_BYTES * record[f"packets_{direction}"]
    return 8 * size / record["parameters"]


def ratios(records: list[Record], hosts: int, megabits: float, program: str) -> list[float]:
    """How many times as fast as `BASELINE` a program was, turn by turn."""
    seconds = {
        name: {r["round"]: r["seconds"] for r in _votes(records, hosts, megabits) if r["program"] == name}
        for name in (BASELINE, program)
    }
    return [seconds[BASELINE][turn] / seconds[program][turn] for turn in seconds[program]]


def _votes(records, hosts, megabits):
    return [r for r in _of_kind(records, "vote") if (r["hosts"], r["megabits"]) == (hosts, megabits)]


def _of_kind(records, kind):
    return [r for r in records[1:] if r["kind"] == kind]


def table(records: list[Record]) -> rich.console.Group:
    """The votes, what a late host costs, and the trainings."""
    parts = (_table_of_votes, _table_of_late_hosts, _table_of_trainings)
    return rich.console.Group(*[drawn for part in parts if (drawn := part(records)).row_count])


def _rows(drawn, columns):
    for column, justify in columns:
        drawn.add_column(column, justify=justify)
    return drawn


def _table_of_votes(records):
    header = records[0]
    size, leaves = (header["config"][name] for name in ("parameters", "leaves"))
    drawn = rich.table.Table(
        title=f"votes on {size:,} parameters in {leaves} array{'s' * (leaves > 1)}, {header['cores']} cores, medians"
    )
    columns = (
        "ms",
        "x as fast\nas float32",
        "quartiles",
        "to expect,\nat least",
        "bits per\nparameter",
        "formula",
        "with\nheaders",
    )
    _rows(drawn, [("hosts", "right"), ("link", "right"), ("program", "left"), *((c, "right") for c in columns)])
    for hosts in header["config"]["hosts"]:
        for megabits in header["config"]["megabits"]:
            for program in WIRES:
                turns = [r for r in _votes(records, hosts, megabits) if r["program"] == program]
                if not turns:
                    continue
                low, middle, high = timing.quartiles(ratios(records, hosts, megabits, program))
                limit = LIMITS.get(program, "") if megabits == LIMITED_AT else ""
                drawn.add_row(
                    str(hosts), _link(megabits), program,
                    f"{1e3 * statistics.median(r['seconds'] for r in turns):.1f}", f"{middle:.2f}",
                    f"{low:.2f} to {high:.2f}", str(limit),
                    f"{statistics.median(max(payload_bits(r), payload_bits(r, 'received')) for r in turns):.3f}",
                    f"{8 * turns[0]['formula_bytes'] / size:.3f}",
                    f"{statistics.median(8 * r['bytes_sent'] / size for r in turns):.3f}",
                )  # fmt: skip
            drawn.add_section()
    drawn.caption = "bits: each way on each host, as its network card counted them; the larger of sent and received"
    return drawn


def _table_of_late_hosts(records):
    drawn = rich.table.Table(title="a collective that host 0 joins late: from its start to the end, median and range")
    _rows(drawn, [(c, "right") for c in ("hosts", "link", "collective", "late by, ms", "ms", "range", "ideal, ms")])
    for r in _of_kind(records, "late"):
        ideal = 8e3 * r["bytes"] * (r["hosts"] - 1) / r["hosts"] / (1e6 * r["megabits"])
        ms = [1e3 * s for s in r["seconds"]]
        drawn.add_row(
            str(r["hosts"]), _link(r["megabits"]), r["collective"], f"{1e3 * r['delay']:g}",
            f"{statistics.median(ms):.1f}", f"{min(ms):.1f} to {max(ms):.1f}", f"{ideal:.1f}",
        )  # fmt: skip
    drawn.caption = "ideal: its bytes over the rate of the link, both directions at once"
    return drawn


def _trainings(records):
    """The trainings of each number of hosts, rate, optimizer and wire, all seeds together."""
    found = {}
    for r in _of_kind(records, "training"):
        found.setdefault((r["hosts"], r["megabits"], r["optimizer"], r["wire"]), []).append(r)
    return found


def _table_of_trainings(records):
    config, found = records[0]["config"], _trainings(records)
    sizes = {r["parameters"] for rs in found.values() for r in rs}
    drawn = rich.table.Table(
        title=f"training {', '.join(f'{size:,}' for size in sizes)} parameters until {config['target']:.0%} of test images "
        f"are right, {config['batch_size']} images per host, mean of {config['seeds']} seeds"
    )
    columns = ("learning rate", "steps", "seconds", "x as fast\nas sgd", "ms a step", "accuracy")
    _rows(
        drawn,
        [
            ("hosts", "right"),
            ("link", "right"),
            ("optimizer", "left"),
            ("wire", "left"),
            *((c, "right") for c in columns),
        ],
    )
    for (hosts, megabits, optimizer, wire), runs in found.items():
        seconds, steps = (statistics.mean(r[name] for r in runs) for name in ("seconds", "steps"))
        sgd = found.get((hosts, megabits, *RUNS[0]))
        speed = statistics.mean(r["seconds"] for r in sgd) / seconds if sgd else float("nan")
        missed = any(r["accuracy"] < config["target"] for r in runs)
        drawn.add_row(
            str(hosts), _link(megabits), optimizer, wire, f"{runs[0]['learning_rate']:g}", f"{steps:.0f}",
            f"{seconds:.2f}{', missed' * missed}", f"{speed:.2f}", f"{1e3 * seconds / steps:.1f}",
            f"{statistics.mean(r['accuracy'] for r in runs):.3f}",
        )  # fmt: skip
    drawn.caption = "seconds: all but compilation, looks at the test images included"
    return drawn


kept = cost.medians


def summary(records: list[Record]) -> list[list[str]]:
    """How many times as fast as a mean each program is, by the medians of its turns."""
    config = records[0]["config"]
    cases = [(hosts, megabits) for megabits in config["megabits"] for hosts in config["hosts"]]
    seconds = {}
    for r in _of_kind(records, "vote"):
        seconds.setdefault((r["hosts"], r["megabits"], r["program"]), []).append(r["seconds"])
    medians = {case: statistics.median(found) for case, found in seconds.items()}
    rows = [["times as fast as a float32 mean", *(f"{hosts} hosts, {_link(megabits)}" for hosts, megabits in cases)]]
    for program in (program for program in WIRES if (*cases[0], program) in medians):
        times = [medians[*case, BASELINE] / medians[*case, program] for case in cases]
        rows.append([program, *(f"{x:.3g}" for x in times)])
    rows[1] = ["float32 mean, ms", *(f"{1e3 * medians[*case, BASELINE]:.0f}" for case in cases)]
    return rows


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw by how much votes are faster than a mean in float32, and the times of training.

    Returns:
      The figures' files.
    """
    config = records[0]["config"]
    cases = [(hosts, megabits) for hosts in config["hosts"] for megabits in config["megabits"]]
    labels = [f"{hosts} hosts,\n{_link(megabits)}" for hosts, megabits in cases]
    found = [name for name, kind in (("votes", "vote"), ("training", "training")) if _of_kind(records, kind)]
    title = f"{' and '.join(map(str, config['hosts']))} hosts, a worker each"
    figure, panels = plots.panels(len(found), title=title, columns=1, width=7.5, height=4)
    for panel, axes in zip(found, panels, strict=True):
        if panel == "votes":
            held = {r["program"] for r in _of_kind(records, "vote")} - {BASELINE}
            names, baseline = [name for name in WIRES if name in held], "a mean in float32"
            values = {name: [statistics.median(ratios(records, *case, name)) for case in cases] for name in names}
        else:
            runs, baseline = _trainings(records), "SGD and a mean"
            mean = {key: statistics.mean(r["seconds"] for r in own) for key, own in runs.items()}
            values = {", ".join(run): [mean[*case, *RUNS[0]] / mean[*case, *run] for case in cases] for run in RUNS[1:]}
        width = 0.8 / len(values)
        for i, (name, heights) in enumerate(values.items()):
            axes.bar([x + width * (i + 0.5) - 0.4 for x in range(len(cases))], heights, width, label=name)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set(title=panel, yscale="log", ylabel=f"times as fast as {baseline}")
        axes.set_xticks(range(len(cases)), labels, fontsize=9)
        axes.legend()
    return plots.save(figure, folder, "slow_network")

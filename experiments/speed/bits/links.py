"""Seconds of an exchange where the network is slow: on 2 and 4 hosts at 100 Mbit/s, against a float32 mean.

To expect at 100 Mbit/s: scaled signs with memory on both sides 20 times as fast, the largest hundredth 15 times.
"""

from collections.abc import Iterator
import dataclasses
import pathlib
import statistics

import rich.table

from experiments.common import asking
from experiments.common import compressed
from experiments.common import namespaces
from experiments.common import plots
from experiments.common import progress
from experiments.common import report
from experiments.common.flags import flag
from experiments.common.records import Record
from signopt._tools import timing

BASELINE = compressed.BASELINE
WAYS = (
    BASELINE,
    "vote, one_bit",
    "int8",
    "int4",
    "scaled_sign",
    "scaled_sign, a block of 256",
    "top_k, 1 %",
    "top_k, 1 % of blocks of 4096",
    "random_k, 1 %",
)
LIMITS = {"scaled_sign": 20, "scaled_sign, a block of 256": 20, "top_k, 1 % of blocks of 4096": 15}
SECONDS = 0.5  # about how long a turn may take


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    ways: tuple[str, ...] = flag(WAYS, "ways to agree", choices=compressed.NAMES)
    hosts: tuple[int, ...] = flag((2, 4), "numbers of hosts, a process each", at_least=2)
    megabits: float = flag(100.0, "Mbit/s of every link, each way", at_least=1)
    parameters: int = flag(4_194_304, "parameters, in one array", at_least=1)
    rounds: int = flag(11, "how often each way takes its turn", at_least=1)
    workers: int = flag(1, "devices of a host", at_least=1)
    seeds: int = flag(1, "one: times do not depend on it", at_least=1)
    output: str = flag("results/bits", "folder for records and plots")


def run(config: Config) -> Iterator[Record]:
    """Time every way.

    Returns:
      A record for each number of hosts and way, with the seconds of every turn.

    Raises:
      NetworkError: Before anything is measured or written, if links cannot be made here.
    """
    namespaces.require()
    return _run(config)


def _run(config):
    for hosts in config.hosts:
        with namespaces.network(hosts) as network, asking.running(network) as ask:
            asked = {"parameters": config.parameters}
            for name in progress.track(config.ways, f"{hosts} hosts: compiling"):
                ask("agree", program=name, count=1, **asked)
            namespaces.shape(network, 1e6 * config.megabits)
            seconds = {name: [] for name in config.ways}
            for turn in progress.track(range(config.rounds), f"{hosts} hosts: turns"):
                for name in list(config.ways)[:: 1 if turn % 2 == 0 else -1]:
                    bits = compressed.way(name, "workers", hosts).bits(config.parameters)
                    count = min(5, max(1, round(SECONDS * 1e6 * config.megabits / bits)))
                    found = ask("agree", program=name, count=count, **asked)
                    seconds[name].append(max(answer["seconds"] for answer in found))
            for name, times in seconds.items():
                yield {"way": name, "hosts": hosts, "seconds": times}


def ratios(records: list[Record], hosts: int, way: str) -> list[float]:
    """How many times as fast as a float32 mean, turn by turn."""
    of = {r["way"]: r["seconds"] for r in records[1:] if r["hosts"] == hosts}
    return timing.ratios(of[BASELINE], of[way])


def summary(records: list[Record]) -> list[list[str]]:
    """How many times as fast as a float32 mean each way is: by the median of turns, and by the fastest turn of each."""
    config = records[0]["config"]
    of = {(r["hosts"], r["way"]): r["seconds"] for r in records[1:]}
    header = [
        f"{hosts} hosts, {config['megabits']:g} Mbit/s: {what}"
        for hosts in config["hosts"]
        for what in ("median", "fastest")
    ]
    rows = [["times as fast as a float32 mean", *header, "to expect, at least"]]
    first = [f"{1e3 * pick(of[hosts, BASELINE]):.0f}" for hosts in config["hosts"] for pick in (statistics.median, min)]
    rows.append(["float32 mean, ms", *first, ""])
    for way in (way for way in config["ways"] if way != BASELINE):
        found = []
        for hosts in config["hosts"]:
            found += [statistics.median(ratios(records, hosts, way)), min(of[hosts, BASELINE]) / min(of[hosts, way])]
        rows.append([way, *(f"{x:.3g}" for x in found), f"{LIMITS.get(way, '')}"])
    return rows


def table(records: list[Record]) -> rich.table.Table:
    """The same."""
    return report.drawn(
        summary(records), title=f"{records[0]['config']['parameters']:,} parameters; medians of ratios of turns"
    )


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw how many times as fast as a float32 mean each way is.

    Returns:
      The figures' files.
    """
    config = records[0]["config"]
    title = f"{config['parameters']:,} parameters, {config['megabits']:g} Mbit/s"
    figure, panels = plots.panels(len(config["hosts"]), title=title, columns=1, width=7, height=3)
    for hosts, axes in zip(config["hosts"], panels, strict=True):
        ways = [way for way in config["ways"] if way != BASELINE]
        plots.boxes(axes, {way: ratios(records, hosts, way) for way in ways}, limits=LIMITS)
        axes.set(title=f"{hosts} hosts", xlabel="times as fast as a float32 mean (dashed: to expect)")
    return plots.save(figure, folder, "links")

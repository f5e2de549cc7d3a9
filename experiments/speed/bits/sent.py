"""Bits per parameter that each worker sends: what the formula says, the compiled program, and the network card.

Table 1 of Bernstein et al. (2018) counts both directions of a star around one server: 64 bits of a float32 mean for each
worker and parameter, 2 of a vote. Here every worker is the server of 1/M of the parameters, so that (M - 1)/M of it travels.
To expect: the three counts agree within 2 %.
"""

from collections.abc import Iterator
import dataclasses
import pathlib

import rich.table

from experiments.common import asking
from experiments.common import compressed
from experiments.common import namespaces
from experiments.common import plots
from experiments.common import progress
from experiments.common import report
from experiments.common.flags import flag
from experiments.common.records import Record

LIMIT = 0.02  # by which the counts may differ


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    ways: tuple[str, ...] = flag((), "ways to agree; all if none is named")
    hosts: int = flag(4, "hosts, a process each", at_least=2)
    parameters: int = flag(4_194_304, "parameters, in one array", at_least=1)
    count: int = flag(3, "how often to agree", at_least=1)
    workers: int = flag(1, "devices of a host", at_least=1)
    seeds: int = flag(1, "one: sizes do not depend on it", at_least=1)
    output: str = flag("results/bits", "folder for records and plots")


def run(config: Config) -> Iterator[Record]:
    """Count what every way sends.

    Returns:
      A record for each, with its bits per worker and step.

    Raises:
      NetworkError: Before anything is measured or written, if links cannot be made here.
    """
    namespaces.require()
    return _run(config)


def _run(config):
    with namespaces.network(config.hosts) as network, asking.running(network) as ask:
        for name in progress.track(config.ways or compressed.NAMES, "ways to agree"):
            found = ask("agree", program=name, parameters=config.parameters, count=config.count)
            yield {
                "way": name,
                "parameters": config.parameters,
                "formula_bits": compressed.way(name, "workers", config.hosts).bits(config.parameters),
                "program_bits": found[0]["program_bits"],
                "card_bits": max(payload_bits(answer) for answer in found),
            }


def payload_bits(counted: Record) -> float:
    """What a host has sent, without the headers of packets."""
    return 8 * (counted["bytes_sent"] - namespaces.HEADER_BYTES * counted["packets_sent"])


def spread(record: Record) -> float:
    """How far the largest and the smallest of the three counts are apart, as a share of the formula's."""
    counts = [record[f"{name}_bits"] for name in ("formula", "program", "card")]
    return (max(counts) - min(counts)) / record["formula_bits"]


def summary(records: list[Record]) -> list[list[str]]:
    """Bits per parameter, of each worker."""
    hosts = records[0]["config"]["hosts"]
    rows = [[f"bits per parameter, {hosts} workers", "formula", "program", "network card", "apart"]]
    for r in records[1:]:
        counts = [f"{r[f'{name}_bits'] / r['parameters']:.4g}" for name in ("formula", "program", "card")]
        apart = spread(r)
        rows.append([r["way"], *counts, f"{apart:.1%}{' (missed)' * (apart > LIMIT)}"])
    return rows


def table(records: list[Record]) -> rich.table.Table:
    """The same."""
    return report.drawn(
        summary(records), title=f"{records[0]['config']['parameters']:,} parameters; each worker, both directions"
    )


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw the bits of every way.

    Returns:
      The figures' files.
    """
    config = records[0]["config"]
    title = f"{config['parameters']:,} parameters, {config['hosts']} hosts"
    figure, (axes,) = plots.panels(1, title=title, width=7, height=6)
    places = range(len(records) - 1)
    axes.barh(places, [r["card_bits"] / r["parameters"] for r in records[1:]], label="network card")
    axes.plot(
        [r["formula_bits"] / r["parameters"] for r in records[1:]],
        places,
        "|",
        color="black",
        markersize=14,
        label="formula",
    )
    axes.set_yticks(places, [r["way"] for r in records[1:]], fontsize=9)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="bits that each worker sends per parameter and step")
    axes.legend()
    return plots.save(figure, folder, "sent")

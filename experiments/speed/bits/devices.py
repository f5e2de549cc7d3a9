"""Seconds of an exchange between devices of one process, where nothing travels, against a float32 `pmean`.

Reading and writing is all that counts here. To expect: scaled signs with memory on both sides take at most 2.5 times as long.
"""

from collections.abc import Callable, Iterator
import dataclasses
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import rich.table

from experiments.common import compressed
from experiments.common import devices
from experiments.common import plots
from experiments.common import progress
from experiments.common import report
from experiments.common import runners
from experiments.common.flags import flag
from experiments.common.records import Record
import signopt
from signopt._tools import timing

AXIS = runners.AXIS
BASELINE = compressed.BASELINE
WAYS = (BASELINE, "vote, one_bit", "int8", "scaled_sign", "scaled_sign, a block of 256", "top_k, 1 % of blocks of 4096")
LIMITS = {"scaled_sign": 2.5, "scaled_sign, a block of 256": 2.5}


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    ways: tuple[str, ...] = flag(WAYS, "ways to agree", choices=compressed.NAMES)
    parameters: int = flag(4_194_304, "parameters, in one array", at_least=1)
    workers: int = flag(8, "workers, each on a device of its own", at_least=1)
    rounds: int = flag(21, "how often each way is timed", at_least=1)
    seeds: int = flag(1, "one: times do not depend on it", at_least=1)
    output: str = flag("results/bits", "folder for records and plots")


def run(config: Config) -> Iterator[Record]:
    """Time every way.

    Yields:
      A record for each, with its seconds in every round.
    """
    programs = {name: program(name, config.workers, config.parameters) for name in config.ways}
    with progress.telling("devices") as tell:
        seconds = timing.take_turns(programs, config.rounds, tell)
    for name, times in seconds.items():
        yield {"way": name, "seconds": times}


def program(name: str, workers: int, parameters: int) -> Callable[[], Any]:
    """From every worker's gradients and what it remembers to what all agree on, again and again."""
    border = compressed.way(name, AXIS, workers).border
    mesh = jax.make_mesh((workers,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices.take(workers))
    state = border.init(jnp.zeros(parameters))
    specs = signopt.workers.partition_specs(state, AXIS)
    mapped = jax.shard_map(
        lambda gradients, state: border.update(gradients[0], state),
        mesh=mesh,
        in_specs=(jax.P(AXIS), specs),
        out_specs=(jax.P(), specs),
        check_vma=False,
    )
    advance = jax.jit(mapped, donate_argnums=1)
    own = jax.NamedSharding(mesh, jax.P(AXIS))
    gradients = jax.device_put(jax.random.normal(jax.random.key(0), (workers, parameters)), own)
    held = [signopt.workers.place(state, mesh, specs)]

    def run():
        decided, held[0] = advance(gradients, held[0])
        return decided, held[0]

    return run


def ratios(records: list[Record], way: str) -> list[float]:
    """By how much longer than a float32 mean a way takes, round by round."""
    of = {r["way"]: r["seconds"] for r in records[1:]}
    return timing.ratios(of[way], of[BASELINE])


def summary(records: list[Record]) -> list[list[str]]:
    """Ratios to the float32 mean: medians of rounds, and the fastest round of each."""
    config = records[0]["config"]
    rows = [
        ["time over that of a float32 mean, one process", "median (quartiles)", "fastest rounds", "to expect, at most"]
    ]
    of = {r["way"]: r["seconds"] for r in records[1:]}
    first = [f"{1e3 * pick(of[BASELINE]):.1f} ms" for pick in (statistics.median, min)]
    rows.append([f"float32 mean, {config['workers']} devices", *first, ""])
    for way in (way for way in config["ways"] if way != BASELINE):
        low, middle, high = timing.quartiles(ratios(records, way))
        fastest = f"{min(of[way]) / min(of[BASELINE]):.2f}"
        rows.append([way, f"{middle:.2f} ({low:.2f} to {high:.2f})", fastest, f"{LIMITS.get(way, '')}"])
    return rows


def table(records: list[Record]) -> rich.table.Table:
    """The same."""
    return report.drawn(summary(records), title=f"{records[0]['config']['parameters']:,} parameters")


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw the times over the mean's.

    Returns:
      The figures' files.
    """
    config = records[0]["config"]
    title = f"{config['parameters']:,} parameters, {config['workers']} devices of one process"
    figure, (axes,) = plots.panels(1, title=title, width=7, height=3.5)
    plots.boxes(axes, {way: ratios(records, way) for way in config["ways"] if way != BASELINE}, limits=LIMITS)
    axes.set(xlabel="time over that of a float32 mean (dashed: to expect)")
    return plots.save(figure, folder, "devices")

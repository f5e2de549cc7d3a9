"""What it costs to find the largest entries of a row, exactly, in blocks, or above a threshold, and what is left behind.

On one device, for normal numbers and for a row whose layers differ in size by 10⁷. The threshold is that of a sample of one
entry in 64: as many entries as the message has room for are sent, in the order of the row, so that too low a threshold loses
the end of the row and too high a one wastes room. To expect: blocks of 4096 lose what the whole row does, and the whole row,
which is counted and not sorted, takes less time.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import math
import pathlib
import statistics
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import rich.table

from experiments.common import plots
from experiments.common import progress
from experiments.common import report
from experiments.common.flags import flag
from experiments.common.records import Record
from signopt import codecs
from signopt._tools import timing

SAMPLE = 64  # one entry in so many
SHARE = 0.01
WHOLE = "top_k, the whole row"
CODECS = {
    WHOLE: codecs.top_k(SHARE),
    "top_k, blocks of 65536": codecs.top_k(SHARE, block=65536),
    "top_k, blocks of 4096": codecs.top_k(SHARE, block=4096),
    "top_k, blocks of 256": codecs.top_k(SHARE, block=256),
    "random_k": codecs.random_k(SHARE),
    "scaled_sign": codecs.scaled_sign(),
}
THRESHOLD = "above a sampled threshold"


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    parameters: int = flag(1_048_576, "entries of the row", at_least=4096)
    rounds: int = flag(11, "how often each program is timed", at_least=1)
    workers: int = flag(1, "devices to ask for", at_least=1)
    seeds: int = flag(1, "one: the draw of the row", at_least=1)
    output: str = flag("results/bits", "folder for records and plots")


def run(config: Config) -> Iterator[Record]:
    """Time every encoder on every row.

    Yields:
      A record for each, with its seconds in every round, and the share of the squared norm that it leaves behind.
    """
    normal = jax.random.normal(jax.random.key(0), (config.parameters,))
    layers = jnp.repeat(10.0 ** -jnp.arange(8), -(-config.parameters // 8))[: config.parameters]
    for name, row in (("normal", normal), ("layers", normal * layers)):
        programs: dict[str, Callable[[], Any]] = {
            way: functools.partial(jax.jit(codec.encode), row, jax.random.key(1)) for way, codec in CODECS.items()
        }
        programs[THRESHOLD] = functools.partial(jax.jit(above_threshold), row, jax.random.key(1))
        programs["copy"] = functools.partial(jax.jit(jnp.negative), row)
        with progress.telling(f"selection, {name}") as tell:
            seconds = timing.take_turns(programs, config.rounds, tell)
        for way, times in seconds.items():
            yield {"row": name, "way": way, "seconds": times, "lost": lost(way, row)}


def above_threshold(row: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Entries above a threshold that a sample has, and their places, as many as `top_k` sends."""
    size = row.shape[0]
    sample = jnp.abs(row[jax.random.randint(key, (size // SAMPLE,), 0, size)])
    room, kept = math.ceil(SHARE * size), math.ceil(SHARE * sample.shape[0])
    threshold = lax.top_k(sample, kept)[0][-1]
    (places,) = jnp.nonzero(jnp.abs(row) >= threshold, size=room, fill_value=size)
    return row.at[places].get(mode="fill", fill_value=0), places


def lost(way: str, row: jax.Array) -> float:
    """The share of the squared norm that a message leaves behind, expected if it is drawn."""
    if way in CODECS:
        found: Any = CODECS[way].error
        return float(found(row))
    kept = row if way == "copy" else above_threshold(row, jax.random.key(1))[0]
    return float(1 - jnp.sum(kept**2) / jnp.sum(row**2))


def summary(records: list[Record]) -> list[list[str]]:
    """Milliseconds, and what is left behind, on both rows."""
    size = records[0]["config"]["parameters"]
    of = {(r["row"], r["way"]): r for r in records[1:]}
    names = list(dict.fromkeys(r["row"] for r in records[1:]))
    header = [
        f"a row of {size:,}",
        *(f"{name}: {what}" for name in names for what in ("ms", "over top_k", "left behind")),
    ]
    rows = [header]
    for way in dict.fromkeys(r["way"] for r in records[1:]):
        row = [way]
        for name in names:
            own = of[name, way]
            over = statistics.median(timing.ratios(own["seconds"], of[name, WHOLE]["seconds"]))
            row += [f"{1e3 * statistics.median(own['seconds']):.2f}", f"{over:.2f}", f"{own['lost']:.4f}"]
        rows.append(row)
    return rows


def table(records: list[Record]) -> rich.table.Table:
    """The same."""
    return report.drawn(summary(records), title="encoders on one device, 1 % of the entries; medians")


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw what each way leaves behind against its time.

    Returns:
      The figures' files.
    """
    names = list(dict.fromkeys(r["row"] for r in records[1:]))
    title = f"encoders, {records[0]['config']['parameters']:,} entries, one device"
    figure, panels = plots.panels(len(names), title=title)
    for name, axes in zip(names, panels, strict=True):
        for r in (r for r in records[1:] if r["row"] == name):
            axes.plot([1e3 * statistics.median(r["seconds"])], [r["lost"]], "o", label=r["way"])
        axes.set(title=name, xscale="log", xlabel="ms", ylabel="left behind, of the squared norm")
    panels[0].legend()
    return plots.save(figure, folder, "selection")

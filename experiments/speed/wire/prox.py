"""What a proximal step costs: SignProx beside signum, and total variation from a thousand points to a million.

Table: time of a whole step (parameters in, parameters out, donated) on 20 million parameters, programs taking turns in
one run; a step of l1 should take at most 1.3 times that of `optax.signum`. Figure: time of
`signopt.prox.total_variation` on noise, steps, a random walk and a ramp, for growing lengths; it should take the same
per point at every length.
"""

from collections.abc import Iterator
import dataclasses
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.table

from experiments.common import plots
from experiments.common import progress
from experiments.common.flags import flag
from experiments.common.records import Record
import signopt
from signopt import prox as proxes

RATE, STRENGTH = 1e-3, 1e-3
OPTIMIZERS = {
    "optax.signum": lambda: optax.signum(RATE),
    "signprox, l1, beta 0.9": lambda: signopt.signprox(RATE, prox=proxes.l1(STRENGTH), beta=0.9),
    "signprox, l1": lambda: signopt.signprox(RATE, prox=proxes.l1(STRENGTH)),
    "optax.signum, prox_step of l1": lambda: optax.chain(
        optax.signum(RATE), signopt.prox_step(proxes.l1(STRENGTH), RATE)
    ),
    "signprox, groups of 1000": lambda: signopt.signprox(RATE, prox=proxes.group_l1(STRENGTH, axis=1), beta=0.9),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    parameters: int = flag(20_000_000, "parameters of the step; a multiple of 1000", at_least=1000)
    points: tuple[int, ...] = flag((1000, 10_000, 100_000, 1_000_000), "lengths of the signals", at_least=1)
    strength: float = flag(1.0, "strength of the total variation", at_least=0)
    repeats: int = flag(15, "how often each program is timed", at_least=1)
    workers: int = flag(1, "one: nothing is sent", at_least=1)
    seeds: int = flag(1, "one: times do not depend on it", at_least=1)
    output: str = flag("results/prox_time", "folder for records and plots")


def run(config: Config) -> Iterator[Record]:
    """Time steps, then total variation.

    Yields:
      A record for each optimizer and for each signal and length, with the seconds of every repeat.
    """
    shape = (1000, config.parameters // 1000)
    grads = jax.random.normal(jax.random.key(0), shape) / 10
    steps = {name: _step(make()) for name, make in OPTIMIZERS.items()}
    states = {name: start(jax.random.normal(jax.random.key(1), shape)) for name, (start, _) in steps.items()}
    seconds = {name: [] for name in steps}
    *light, heavy = steps  # its temporary memory slows down whatever comes after it
    for name in progress.track(light * config.repeats + [heavy] * config.repeats, "proximal steps"):
        for is_timed in (False, True):  # first without: compilation, and caches and pages of the program before
            begin = time.perf_counter()
            states[name] = jax.block_until_ready(steps[name][1](states[name], grads))
            if is_timed:
                seconds[name].append(time.perf_counter() - begin)
    for name, times in seconds.items():
        yield {"kind": "step", "name": name, "size": grads.size, "seconds": times}
    for size in progress.track(config.points, "total variation"):
        denoise = jax.jit(lambda y: proxes.total_variation(config.strength)(y, 1.0))
        for name, signal in _signals(size).items():
            signal = jnp.asarray(signal, jnp.float32)
            jax.block_until_ready(denoise(signal))
            times = []
            for _ in range(config.repeats):
                begin = time.perf_counter()
                jax.block_until_ready(denoise(signal))
                times.append(time.perf_counter() - begin)
            yield {"kind": "total variation", "name": name, "size": size, "seconds": times}


def _step(tx):
    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state, grads):
        params, opt_state = state
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return lambda params: (params, tx.init(params)), advance


def _signals(size):
    rng = np.random.default_rng(0)
    levels = np.repeat(3 * rng.normal(size=size // 100 + 1), 100)[:size]
    return {
        "noise": rng.normal(size=size),
        "steps": levels + rng.normal(size=size) / 2,
        "walk": np.cumsum(rng.normal(size=size)),
        "ramp": np.linspace(0, 100, size),
    }


def table(records: list[Record]) -> rich.table.Table:
    """The shortest time of each program, which others on the machine lengthen least, and its ratio to signum or per point."""
    drawn = rich.table.Table(
        title=f"{records[0]['cores']} cores, {records[0]['device']}, fastest of {records[0]['config']['repeats']}"
    )
    for column in ("what", "size", "milliseconds", "ratio, or ns per point"):
        drawn.add_column(column, justify="left" if column == "what" else "right")
    signum = min(records[1]["seconds"])
    for record in records[1:]:
        fastest = min(record["seconds"])
        is_step = record["kind"] == "step"
        relative = f"{fastest / signum:.2f} x" if is_step else f"{fastest / record['size'] * 1e9:.0f} ns"
        name = record["name"] if is_step else f"total variation, {record['name']}"
        drawn.add_row(name, f"{record['size']:,}", f"{fastest * 1e3:.2f}", relative)
    return drawn


def summary(records: list[Record]) -> list[list[str]]:
    """The fastest steps over the fastest of `optax.signum`, and the spread of total variation's time per point."""
    rows = [["what", "measured, median (quartiles)", "to expect, at most"]]
    signum = min(records[1]["seconds"])
    for r in (r for r in records[2:] if r["kind"] == "step"):
        limit = "" if "groups" in r["name"] else "1.3"
        rows.append([f"prox: {r['name']}, over `optax.signum`, fastest", f"{min(r['seconds']) / signum:.2f}", limit])
    per_point = {}
    for r in (r for r in records[1:] if r["kind"] == "total variation"):
        per_point.setdefault(r["name"], []).append(1e9 * min(r["seconds"]) / r["size"])
    found = "; ".join(f"{name} {', '.join(f'{ns:.0f}' for ns in all_)}" for name, all_ in per_point.items())
    sizes = " to ".join(f"{size:,}" for size in (records[0]["config"]["points"][0], records[0]["config"]["points"][-1]))
    rows.append([f"prox: total variation, ns per point, {sizes} points", found, "the same at every length"])
    return rows


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw the time of total variation against the length.

    Returns:
      The figures' files.
    """
    figure, (axes,) = plots.panels(1, title="total variation, one worker", width=6)
    chains = [record for record in records[1:] if record["kind"] == "total variation"]
    for name in dict.fromkeys(record["name"] for record in chains):
        mine = [record for record in chains if record["name"] == name]
        axes.plot([r["size"] for r in mine], [min(r["seconds"]) for r in mine], marker=".", label=name)
    axes.set(xlabel="points", ylabel="seconds, fastest", xscale="log", yscale="log")
    axes.legend()
    return plots.save(figure, folder, "total_variation")

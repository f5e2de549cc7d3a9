"""What signs cost where nothing is sent: a local step, compiling a voted one, and the import.

Without an axis `signopt.signsgd`, `signum` and `lion` are optax's own, so their steps have to take as long and need as much
memory: 20 million parameters, in 5 large leaves and in 500 small ones, take turns with optax's. Then the time to trace
and to compile a voted step over 500 leaves on a mesh, against `optax.lion` behind a float32 mean (limit 2), and the time
of `import signopt` in a fresh interpreter against `import optax` (limit 1.2). No figure of a paper.
"""

from collections.abc import Callable, Iterator
import dataclasses
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
import rich.table

from experiments.common import devices
from experiments.common import plots
from experiments.common import progress
from experiments.common import runners
from experiments.common.flags import flag
from experiments.common.records import Record
import signopt
from signopt._tools import timing

AXIS = runners.AXIS
RATE = 1e-3
KINDS = ("plain", "ours")
SIZES = ("equal", "different")
LIMITS = {"compile": 2.0, "import": 1.2}
LOCAL = {
    "signsgd": (lambda: optax.sign_sgd(RATE), lambda: signopt.signsgd(RATE)),
    "signum": (lambda: optax.signum(RATE), lambda: signopt.signum(RATE)),
    "lion": (lambda: optax.lion(RATE), lambda: signopt.lion(RATE)),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    parameters: int = flag(20_000_000, "parameters of a local step", at_least=1)
    leaves: tuple[int, ...] = flag((5, 500), "leaves that the parameters are divided into")
    voted_parameters: int = flag(4_000_000, "parameters of the voted step that is compiled", at_least=1)
    voted_leaves: int = flag(500, "leaves of that step", at_least=1)
    voted_sizes: tuple[str, ...] = flag(
        ("equal", "different"), "of those leaves: XLA compiles a kernel once for all leaves of a size", choices=SIZES
    )
    workers: int = flag(8, "voters, each on a device of its own", at_least=1)
    rounds: int = flag(21, "how often each step is timed", at_least=1)
    compilations: int = flag(2, "how often each voted step is compiled", at_least=1)
    imports: int = flag(9, "how often each import is timed", at_least=1)
    seeds: int = flag(1, "one: times do not depend on it", at_least=1)
    output: str = flag("results/step_time", "folder for records and plots")


def run(config: Config) -> Iterator[Record]:
    """Time steps, compilations and imports.

    Yields:
      A record for each pair of programs, "plain" and "ours", with the seconds of both in every round.
    """
    for leaves in config.leaves:
        for name, pair in LOCAL.items():
            steps = {
                kind: local_step(make(), config.parameters, leaves) for kind, make in zip(KINDS, pair, strict=True)
            }
            memory = {kind: temporary_bytes(step) for kind, step in steps.items()}
            with progress.telling(f"{name}, {leaves} leaves") as tell:
                seconds = timing.take_turns({kind: step.program for kind, step in steps.items()}, config.rounds, tell)
            yield {"kind": "step", "name": f"{name}, {leaves} leaves", "temporary_bytes": memory} | seconds
    plain = optax.chain(signopt.mean(AXIS), optax.lion(RATE))
    for sizes in config.voted_sizes:
        for name, tx in voted(config.workers).items():
            found = {kind: [] for kind in KINDS}
            for _ in progress.track(range(config.compilations), f"compiling {name}, {sizes} sizes"):
                for kind, each in zip(KINDS, (plain, tx), strict=True):
                    found[kind].append(compilation(each, config, sizes))
            yield {"kind": "compile", "name": f"{name}, {sizes} sizes"} | found
    found = {kind: [] for kind in KINDS}
    for _ in progress.track(range(config.imports), "imports"):
        for kind, package in zip(KINDS, ("optax", "signopt"), strict=True):
            found[kind].append(import_seconds(package))
    yield {"kind": "import", "name": "signopt against optax"} | found


@dataclasses.dataclass(frozen=True)
class Step:
    """A jitted step and what it is called with.

    Attributes:
      advance: From parameters, state (both donated) and gradients to parameters and state.
      args: Shapes and dtypes of its arguments.
      program: Advances by a step.
    """

    advance: Any
    args: tuple
    program: Callable[[], Any]


def local_step(tx: optax.GradientTransformation, parameters: int, leaves: int) -> Step:
    """A step of one worker, as a user would write it."""

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    keys = jax.random.split(jax.random.key(0), leaves)
    gradients = [jax.random.normal(key, (parameters // leaves,)) for key in keys]
    params = jax.tree.map(jnp.zeros_like, gradients)
    advance, held = jax.jit(step, donate_argnums=(0, 1)), [(params, tx.init(params))]
    args = jax.eval_shape(lambda *args: args, *held[0], gradients)

    def program():
        held[0] = advance(*held[0], gradients)
        return held[0]

    return Step(advance, args, program)


def temporary_bytes(step: Step) -> int:
    """How much memory the compiled step needs beside its arguments and results."""
    return step.advance.lower(*step.args).compile().memory_analysis().temp_size_in_bytes


def voted(workers: int) -> dict[str, optax.GradientTransformation]:
    """The optimizers whose voted steps are compiled."""
    shared: dict[str, Any] = {"axis_name": AXIS, "num_workers": workers, "wire": "one_bit"}
    return {
        "signsgd": signopt.signsgd(RATE, **shared),
        "signum": signopt.signum(RATE, **shared),
        "lion": signopt.lion(RATE, **shared),
    }


def compilation(tx: optax.GradientTransformation, config: Config, sizes: str) -> float:
    """The seconds that it takes to trace and compile a step of all workers."""
    workers = config.workers
    mesh = jax.make_mesh((workers,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices.take(workers))
    size = config.voted_parameters // config.voted_leaves
    of_leaves = [size + (i if sizes == "different" else 0) for i in range(config.voted_leaves)]
    params = [jax.ShapeDtypeStruct((n,), jnp.float32) for n in of_leaves]
    gradients = [jax.ShapeDtypeStruct((workers, n), jnp.float32) for n in of_leaves]
    state = jax.eval_shape(tx.init, params)
    specs = (jax.P(), signopt.workers.partition_specs(state, AXIS))

    def step(params, state, gradients):
        updates, state = tx.update(jax.tree.map(lambda x: x[0], gradients), state, params)
        return optax.apply_updates(params, updates), state

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(*specs, jax.P(AXIS)), out_specs=specs)
    jax.clear_caches()
    begin = time.perf_counter()
    jax.jit(mapped).lower(params, state, gradients).compile()
    return time.perf_counter() - begin


def import_seconds(package: str) -> float:
    """The seconds that a fresh interpreter takes to start and import a package."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {package}"], check=True)
    return time.perf_counter() - begin


def table(records: list[Record]) -> rich.table.Table:
    """The median times, and the median of their ratios."""
    drawn = rich.table.Table(title=f"{records[0]['cores']} cores, {records[0]['device']}, medians of rounds")
    for column in ("what", "", "plain, ms", "ours, ms", "ratio", "quartiles", "limit", "extra memory"):
        drawn.add_column(column, justify="left" if column in ("what", "") else "right")
    for r in records[1:]:
        low, middle, high = timing.quartiles(timing.ratios(r["ours"], r["plain"]))
        limit, memory = LIMITS.get(r["kind"]), r.get("temporary_bytes")
        drawn.add_row(
            r["kind"], r["name"], *(f"{1e3 * statistics.median(r[kind]):.0f}" for kind in KINDS), f"{middle:.2f}",
            f"{low:.2f} to {high:.2f}", f"{limit:.1f}" if limit else "",
            f"{memory['ours'] - memory['plain']:,} B" if memory else "",
        )  # fmt: skip
    drawn.caption = "plain: optax's own; to compile, a mean and optax.lion; to import, optax"
    return drawn


def summary(records: list[Record]) -> list[list[str]]:
    """Medians of the ratios."""
    rows = [["what", "measured, median (quartiles)", "to expect, at most"]]
    for r in records[1:]:
        low, middle, high = timing.quartiles(timing.ratios(r["ours"], r["plain"]))
        limit = f"{LIMITS.get(r['kind'], 1):g}"
        rows.append([f"steps: {r['kind']}, {r['name']}", f"{middle:.2f} ({low:.2f} to {high:.2f})", limit])
    return rows


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw the ratios of all rounds and the limits.

    Returns:
      The figures' files.
    """
    config = records[0]["config"]
    title = f"steps of one worker; compiled for {config['workers']} workers"
    figure, (axes,) = plots.panels(1, title=title, width=7.5, height=5)
    ratios = {f"{r['kind']}: {r['name']}": timing.ratios(r["ours"], r["plain"]) for r in records[1:]}
    limits = {f"{r['kind']}: {r['name']}": LIMITS[r["kind"]] for r in records[1:] if r["kind"] in LIMITS}
    plots.boxes(axes, ratios, limits=limits)
    axes.axvline(1, color="grey", linewidth=0.5)
    axes.set(xlabel="time over the plain program's (dashed: limit)")
    return plots.save(figure, folder, "steps")

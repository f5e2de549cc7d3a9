"""The vote on one machine: what packing, exchanging, counting and unpacking cost, beside a plain copy of the same bytes.

Workers are devices of one process, so nothing crosses a network, and a vote has to win by touching less memory. Programs with
the same inputs and outputs take turns: gradients to decisions (against `lax.pmean` of float32 and a psum of int8 signs), and
gradients and donated parameters to parameters, in one leaf and in fifty. Then each stage of the vote by itself: bytes read
and written per second, as a share of what a copy gets. No figure of a paper; the limits are 0.35 for decisions, 0.7 and
0.9 for a one-bit and a two-bit step, as multiples of the float32 mean's time.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import pathlib
import statistics
from typing import Any

import jax
from jax import lax
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
from signopt import _bits
from signopt import _flat
from signopt import border as borders
from signopt import sign
from signopt import vote
from signopt._tools import timing

AXIS = runners.AXIS
LIMITS = {"decisions": {"one_bit": 0.35, "two_bit": 0.35}, "apply": {"one_bit": 0.7, "two_bit": 0.9}}
RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    parameters: int = flag(4_000_000, "parameters", at_least=8)
    workers: int = flag(8, "voters, each on a device of its own", at_least=1)
    leaves: tuple[int, ...] = flag((1, 50), "leaves that the parameters are divided into")
    voters: tuple[int, ...] = flag((4, 8, 16, 32, 64, 128, 256), "numbers of voters whose ballots are counted")
    rounds: int = flag(31, "how often each program is timed", at_least=1)
    seeds: int = flag(1, "one: times do not depend on it", at_least=1)
    output: str = flag("results/wire", "folder for records and plots")


def run(config: Config) -> Iterator[Record]:
    """Time every program and every stage.

    Yields:
      A record for each, with its seconds in every round; of a stage also the bytes that it reads and writes.
    """
    for leaves in config.leaves:
        for kind, programs in (("decisions", decisions), ("apply", applied)):
            with progress.telling(f"{kind}, {leaves} leaves") as tell:
                seconds = timing.take_turns(programs(config, leaves), config.rounds, tell)
            for name, times in seconds.items():
                yield {
                    "kind": "program", "program": kind, "wire": name, "leaves": leaves, "parameters": config.parameters,
                    "workers": config.workers, "seconds": times,
                }  # fmt: skip
    found = stages(config)
    with progress.telling("stages") as tell:
        seconds = timing.take_turns({key: stage.program for key, stage in found.items()}, config.rounds, tell)
    for (name, planes, voters), times in seconds.items():
        yield {
            "kind": "stage", "stage": name, "planes": planes, "workers": voters, "parameters": config.parameters,
            "bytes": found[name, planes, voters].bytes, "seconds": times,
        }  # fmt: skip


def decisions(config: Config, leaves: int) -> dict[str, Callable[[], Any]]:
    """From each worker's gradients to what all of them learn: a mean, a sum of signs, packed decisions.

    And for comparison a mere copy, and "read": their maxima, for which every entry has to be read once, as for a vote.
    """
    mesh, gradients = _gradients(config, leaves)

    def compiled(program, out_specs):
        def one_worker(gradients):
            return program(jax.tree.map(lambda x: x[0], gradients))

        mapped = jax.shard_map(one_worker, mesh=mesh, in_specs=jax.P(AXIS), out_specs=out_specs)
        return functools.partial(jax.jit(mapped), gradients)

    step = jnp.int32(0)

    def packed(wire):
        # Decisions as they travel: the border of the vote, but for taking them apart.
        of_vote = vote.by_bits(wire, 0.0, None, report=False)
        border = of_vote._replace(decode=lambda decisions, like, context: decisions[0])

        def decide(gradients):
            return borders.run(border, gradients, borders.Memory(), borders.context_of(AXIS, step))[0]

        return decide

    return {
        "mean": compiled(lambda gradients: lax.pmean(gradients, AXIS), jax.P()),
        "int8": compiled(lambda gradients: lax.psum(jax.tree.map(sign.vote, gradients), AXIS), jax.P()),
        "one_bit": compiled(packed("one_bit"), jax.P()),
        "two_bit": compiled(packed("two_bit"), jax.P()),
        "read": compiled(lambda gradients: jax.tree.map(lambda x: jnp.max(x)[None], gradients), jax.P(AXIS)),
        "copy": compiled(lambda gradients: jax.tree.map(jnp.negative, gradients), jax.P(AXIS)),  # a mere copy is elided
    }


def applied(config: Config, leaves: int) -> dict[str, Callable[[], Any]]:
    """From gradients and donated parameters to parameters, on every worker; "none" is a step without communication."""
    mesh, gradients = _gradients(config, leaves)
    params = [jnp.zeros(x.shape[1]) for x in gradients]

    def compiled(tx, *, check_vma=True):
        def step(params, state, gradients):
            updates, state = tx.update(jax.tree.map(lambda x: x[0], gradients), state, params)
            return optax.apply_updates(params, updates), state

        shared = jax.P()
        mapped = jax.shard_map(
            step, mesh=mesh, in_specs=(shared, shared, jax.P(AXIS)), out_specs=(shared, shared), check_vma=check_vma
        )
        advance = jax.jit(mapped, donate_argnums=(0, 1))
        held = [jax.device_put(jax.tree.map(jnp.copy, (params, tx.init(params))), jax.NamedSharding(mesh, shared))]

        def program():
            held[0] = advance(*held[0], gradients)
            return held[0]

        return program

    return {
        "mean": compiled(optax.chain(signopt.mean(AXIS), optax.scale(-RATE))),
        "int8": compiled(signopt.signsgd(RATE, axis_name=AXIS, wire="psum")),
        "one_bit": compiled(signopt.signsgd(RATE, axis_name=AXIS, wire="one_bit")),
        "two_bit": compiled(signopt.signsgd(RATE, axis_name=AXIS, wire="two_bit")),
        "none": compiled(signopt.signsgd(RATE), check_vma=False),
    }


def _gradients(config, leaves):
    """A mesh with a device for each worker, and leaves that differ between workers."""
    workers = config.workers
    mesh = jax.make_mesh((workers,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices.take(workers))
    own = jax.sharding.NamedSharding(mesh, jax.P(AXIS))
    keys = jax.random.split(jax.random.key(0), leaves)
    return mesh, jax.device_put([jax.random.normal(key, (workers, config.parameters // leaves)) for key in keys], own)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the vote by itself, on one device.

    Attributes:
      program: Runs it.
      bytes: How many it has to read and write.
    """

    program: Callable[[], Any]
    bytes: int


def stages(config: Config) -> dict[tuple[str, int, int], Stage]:
    """A copy, and the stages of the vote, by name, bits of a ballot and number of voters whose ballots are counted."""
    size = config.parameters
    words = -(-size // 8)
    values = jax.random.normal(jax.random.key(0), (size,))
    step, lead = jnp.int32(0), jnp.int32(1)

    def in_place(function, *args):
        compiled, held = jax.jit(function, donate_argnums=0), [jnp.copy(values)]

        def program():
            held[0] = compiled(held[0], *args)
            return held[0]

        return program

    found = {("copy", 0, 1): Stage(in_place(jnp.negative), 8 * size)}
    alone = borders.context_of(None, step)
    for wire, planes in (("one_bit", 1), ("two_bit", 2)):
        cast = jax.jit(lambda values, wire=wire: vote.cast([values], wire, alone))
        found["pack", planes, 1] = Stage(functools.partial(cast, values), 4 * size + planes * words)
        packed = cast(values)
        for voters in config.voters:

            def decide(ballots, wire=wire, voters=voters):
                return vote.decision(_bits.count(ballots), wire, voters, lead, step)

            share = -(-words // voters)  # of the parameters, which a worker counts for everybody
            ballots = jnp.resize(packed, (voters, share))
            found["count", planes, voters] = Stage(
                functools.partial(jax.jit(decide), ballots), planes * (voters + 1) * share
            )
        apply = in_place(lambda params, packed: params - RATE * _flat.unpack(packed, [params])[0], packed)
        found["unpack", planes, 1] = Stage(apply, 8 * size + planes * words)
    return found


def programs(records: list[Record]) -> Iterator[tuple[Record, list[float]]]:
    """Every program's record, with its time as a multiple of the float32 mean's, round by round."""
    of = {(r["program"], r["leaves"], r["wire"]): r for r in records[1:] if r["kind"] == "program"}
    for (program, leaves, _), record in of.items():
        yield record, timing.ratios(record["seconds"], of[program, leaves, "mean"]["seconds"])


def share_of_copy(record: Record, copy: Record) -> list[float]:
    """How many bytes a stage moves per second, as a share of what a copy does, round by round."""
    times = timing.ratios(copy["seconds"], record["seconds"])
    return [record["bytes"] / copy["bytes"] * ratio for ratio in times]


def table(records: list[Record]) -> rich.table.Table:
    """Medians of rounds: programs as multiples of the float32 mean, stages as shares of a copy's bandwidth."""
    first = records[0]
    drawn = rich.table.Table(
        title=f"{first['config']['parameters']:,} parameters, {first['cores']} cores, {first['device']}; medians"
    )
    for column in ("what", "leaves", "wire", "ms", "ratio", "quartiles", "limit"):
        drawn.add_column(column, justify="left" if column in ("what", "wire") else "right")
    for r, ratios in programs(records):
        low, middle, high = timing.quartiles(ratios)
        limit = LIMITS[r["program"]].get(r["wire"])
        drawn.add_row(
            r["program"], str(r["leaves"]), r["wire"], f"{1e3 * statistics.median(r['seconds']):.2f}", f"{middle:.2f}",
            f"{low:.2f} to {high:.2f}", "" if limit is None else f"{limit:.2f}",
        )  # fmt: skip
    of_stages = [r for r in records[1:] if r["kind"] == "stage"]
    for r in of_stages:
        low, middle, high = timing.quartiles(share_of_copy(r, of_stages[0]))
        wire = "" if r["stage"] == "copy" else f"{r['planes']} bit" + "s" * (r["planes"] > 1)
        voters = f", {r['workers']} voters" if r["stage"] == "count" else ""
        drawn.add_row(
            f"{r['stage']}{voters}", "", wire, f"{1e3 * statistics.median(r['seconds']):.3f}", f"{middle:.2f}",
            f"{low:.2f} to {high:.2f}", "",
        )  # fmt: skip
    drawn.caption = "programs: time over that of the mean; stages: bytes per second over those of a copy in place"
    return drawn


def summary(records: list[Record]) -> list[list[str]]:
    """Medians of the ratios to the float32 mean."""
    rows = [["what", "measured, median (quartiles)", "to expect, at most"]]
    for r, ratios in programs(records):
        if r["wire"] in ("one_bit", "two_bit"):
            low, middle, high = timing.quartiles(ratios)
            what = f"vote: {r['program']}, {r['leaves']} leaves, {r['wire']}, over a float32 mean"
            rows.append([what, f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{LIMITS[r['program']][r['wire']]:g}"])
    return rows


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw the programs' times over the mean's, and the stages' bandwidth over a copy's.

    Returns:
      The figures' files.
    """
    config = records[0]["config"]
    title = f"{config['parameters']:,} parameters, {config['workers']} workers on one machine"
    figure, (of_programs, of_stages) = plots.panels(2, title=title, columns=1, width=7, height=5)
    names = {id(r): f"{r['program']}, {r['leaves']} leaves, {r['wire']}" for r, _ in programs(records)}
    found = {names[id(r)]: ratios for r, ratios in programs(records) if r["wire"] != "mean"}
    limits = {names[id(r)]: LIMITS[r["program"]].get(r["wire"]) for r, _ in programs(records)}
    plots.boxes(of_programs, found, limits={name: limit for name, limit in limits.items() if limit})
    of_programs.axvline(1, color="grey", linewidth=0.5)
    of_programs.set(xlabel="time over that of a float32 mean (dashed: limit)")
    copy, *others = (r for r in records[1:] if r["kind"] == "stage")
    shares = {f"{r['stage']}, {r['planes']} bits, {r['workers']} voters": share_of_copy(r, copy) for r in others}
    plots.boxes(of_stages, shares)
    of_stages.set(xlabel="bytes per second, as a share of a copy's")
    return plots.save(figure, folder, "vote")

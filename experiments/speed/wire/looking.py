"""What looking costs: a vote's margins, the moments of gradients, and whether replicas are still the same.

Times of whole programs on host devices: a one-bit vote of every parameter against the same vote with the learning rate that
`signopt.step_size.adaptive_majority_vote` finds from its margins; and the gradients of a network over a stack of
mini-batches, summed, against `signopt.diagnostics.gradient_moments` of the same; and a step of voted signSGD against the
same step with `signopt.workers.assert_in_sync` of the parameters after it. No figure of a paper; the limits are
1.30 for the vote and 1.2 for the pass, and none for the check, which one makes once in a hundred steps. On a shared machine single times jump by half, so both programs of a pair take
turns in one process, the one that goes first changes every round, and what is compared is the median of the ratios of rounds.
"""

from collections.abc import Callable, Iterator
import dataclasses
import itertools
import pathlib
import statistics
from typing import Any, cast

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
from signopt import diagnostics
from signopt import step_size
from signopt import vote
from signopt._tools import timing

AXIS = runners.AXIS
LIMITS = {"vote": 1.30, "Welford pass": 1.2, "check": None}
LEAVES = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags."""

    parameters: int = flag(4_000_000, "parameters of the vote", at_least=LEAVES)
    workers: int = flag(8, "voters, each on a device of its own", at_least=2)
    wire: str = flag("one_bit", "how votes travel", choices=("one_bit", "two_bit"))
    width: int = flag(1024, "of the four hidden layers of the network that the Welford pass looks at", at_least=1)
    batches: int = flag(8, "mini-batches of the Welford pass", at_least=2)
    batch_size: int = flag(64, "examples in one of them", at_least=1)
    rounds: int = flag(31, "how often each pair is timed", at_least=1)
    seeds: int = flag(1, "one: times do not depend on it", at_least=1)
    output: str = flag("results/vote_cost", "folder for records and plots")


def run(config: Config) -> Iterator[Record]:
    """Time every pair.

    Yields:
      A record for each pair, with the seconds of both programs in every round.
    """
    pairs = (("vote", *votes(config)), ("Welford pass", *passes(config)), ("check", *checks(config)))
    for kind, size, plain, more in pairs:
        with progress.telling(kind) as tell:
            seconds = timing.take_turns({"plain": plain, "more": more}, config.rounds, tell)
        yield {"kind": kind, "parameters": size, "limit": LIMITS[kind]} | seconds


def votes(config: Config) -> tuple[int, Callable[[], Any], Callable[[], Any]]:
    """The number of parameters, a plain vote on as many devices as workers, and one that finds its learning rate."""
    mesh, size, values = _on_devices(config)
    wire, shared = cast(vote.Wire, config.wire), jax.sharding.NamedSharding(mesh, jax.P())

    def program(tx):
        state = jax.device_put(tx.init([jnp.zeros(size)] * LEAVES), shared)

        def body(updates, state):
            return tx.update(jax.tree.map(lambda x: x[0], updates), state)

        mapped = jax.shard_map(body, mesh=mesh, in_specs=(jax.P(AXIS), jax.P()), out_specs=jax.P())
        compiled = jax.jit(mapped)
        return lambda: compiled(values, state)

    # Both end in updates of a learning rate's length, as optimizers do.
    plain = optax.chain(signopt.majority_vote(AXIS, wire=wire), optax.scale(-1e-3))
    adaptive = optax.chain(step_size.adaptive_majority_vote(AXIS, wire=wire), optax.scale(-1.0))
    return LEAVES * size, program(plain), program(adaptive)


def passes(config: Config) -> tuple[int, Callable[[], Any], Callable[[], Any]]:
    """The number of parameters of a network, its mini-batch gradients summed, and their moments."""
    sizes = (64, *[config.width] * 4, 10)
    keys = iter(jax.random.split(jax.random.key(0), 2 * len(sizes)))
    params = [jax.random.normal(next(keys), (m, n)) / m**0.5 for m, n in itertools.pairwise(sizes)]
    batches = jax.random.normal(next(keys), (config.batches, config.batch_size, sizes[0]))

    def loss(params, x):
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer)
        return jnp.mean((x @ params[-1]) ** 2)

    def summed(params, batches):
        def add(total, batch):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, batch)), None

        return lax.scan(add, jax.tree.map(jnp.zeros_like, params), batches)[0]

    def moments(params, batches):
        return diagnostics.gradient_moments(jax.grad(loss), params, batches)

    plain, more = jax.jit(summed), jax.jit(moments)
    size = sum(layer.size for layer in params)
    return size, lambda: plain(params, batches), lambda: more(params, batches)


def checks(config: Config) -> tuple[int, Callable[[], Any], Callable[[], Any]]:
    """The number of parameters, a voted step on as many devices as workers, and one whose replicas are compared."""
    mesh, size, values = _on_devices(config)
    tx = signopt.signsgd(1e-3, axis_name=AXIS, wire=cast(vote.Wire, config.wire))

    def step(state, batch):
        params, opt_state = state
        updates, opt_state = tx.update(jax.tree.map(lambda x: x[0], batch), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    run_step = signopt.workers.on_mesh(step, mesh, axis_name=AXIS)
    params = [jnp.zeros(size)] * LEAVES
    state, _ = run_step((params, tx.init(params)), values)

    def plain():
        return run_step(state, values)[0]

    def checked():
        after = plain()
        signopt.workers.assert_in_sync(after)
        return after

    return LEAVES * size, plain, checked


def _on_devices(config):
    """A mesh with a device for each worker, the size of a leaf, and leaves that differ between workers."""
    workers = config.workers
    mesh = jax.make_mesh((workers,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices.take(workers))
    size, own = config.parameters // LEAVES, jax.sharding.NamedSharding(mesh, jax.P(AXIS))
    keys = jax.random.split(jax.random.key(0), LEAVES)
    return mesh, size, jax.device_put([jax.random.normal(key, (workers, size)) for key in keys], own)


def ratios(record: Record) -> list[float]:
    """By how much the second program takes longer than the first, round by round."""
    return timing.ratios(record["more"], record["plain"])


def table(records: list[Record]) -> rich.table.Table:
    """The median times, and the median of their ratios."""
    drawn = rich.table.Table(title=f"{records[0]['cores']} cores, {records[0]['device']}, medians of rounds")
    for column in ("what", "parameters", "plain, ms", "this, ms", "ratio", "quartiles", "limit"):
        drawn.add_column(column, justify="left" if column == "what" else "right")
    for r in records[1:]:
        plain, more = (1e3 * statistics.median(r[name]) for name in ("plain", "more"))
        low, middle, high = timing.quartiles(ratios(r))
        drawn.add_row(
            r["kind"], f"{r['parameters']:,}", f"{plain:.1f}", f"{more:.1f}", f"{middle:.3f}",
            f"{low:.2f} to {high:.2f}", f"{r['limit']:.2f}" if r["limit"] else "",
        )  # fmt: skip
    return drawn


def summary(records: list[Record]) -> list[list[str]]:
    """Medians of the ratios."""
    rows = [["what", "measured, median (quartiles)", "to expect, at most"]]
    for r in records[1:]:
        low, middle, high = timing.quartiles(ratios(r))
        limit = f"{r['limit']:g}" if r["limit"] else ""
        rows.append([f"looking: {r['kind']}, over the same without", f"{middle:.2f} ({low:.2f} to {high:.2f})", limit])
    return rows


def plot(records: list[Record], folder: str) -> list[pathlib.Path]:
    """Draw the ratios of all rounds and the limits.

    Returns:
      The figures' files.
    """
    config = records[0]["config"]
    figure, (axes,) = plots.panels(1, title=f"{config['workers']} workers on one machine", width=6.5)
    limits = {r["kind"]: r["limit"] for r in records[1:] if r["limit"]}
    plots.boxes(axes, {r["kind"]: ratios(r) for r in records[1:]}, limits=limits)
    axes.set(xlabel="time over that without (dashed: limit)")
    return plots.save(figure, folder, "looking")

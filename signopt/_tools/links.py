"""What joins the workers at hand: how long the collectives of a step take, without what is computed between them."""

from collections.abc import Callable, Sequence
import math
import statistics
import time
from typing import Any

import jax
from jax import lax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from signopt import wire as wires
from signopt._tools import exchanges

AXIS = "workers"
LEAST, MOST, IN_A_ROW = 2, 8, 4  # how often an exchange is timed, each time a few in a row
ENOUGH = 0.5  # seconds after which the least will do

Messages = tuple[wires.Message, ...]


def given(cluster: exchanges.Cluster, messages: Messages) -> float:
    """The seconds of some collectives, one after another, on a link of which somebody has said how fast it is.

    Sums take 2 log2 M rounds of messages, dealing one message to every other worker, and gathering log2 M rounds.

    Examples:
      >>> cluster = exchanges.Cluster(workers=2, bits_per_second=8e6, latency_seconds=1e-3, message_seconds=0.0)
      >>> given(cluster, (wires.Message("psum", 1000),))  # 2 messages, 1000 bytes
      0.003
    """
    workers, bits_per_second, latency, message = cluster
    rounds = math.ceil(math.log2(workers)) * (latency + message)
    fixed = {"all_to_all": latency + (workers - 1) * message, "all_gather": rounds, "ppermute": latency + message}
    sent = sum(float(m.sent(workers)) for m in messages)
    return 8 * sent / bits_per_second + sum(fixed.get(m.kind, 2 * rounds) for m in messages)


def measured(mesh: jax.sharding.Mesh, exchanges: Sequence[Messages], gradient: Callable[[], Any]) -> list[float]:
    """Time some collectives in turn with gradients between the devices of a mesh with the one axis `AXIS`.

    Gradients come before each, as in training: links rest, and processes that share cores do not all come at once. Every
    process has to call it.

    Args:
      mesh: Of all workers.
      exchanges: The collectives of one program each.
      gradient: What computes one, here.

    Returns:
      The seconds that each adds to gradients and a program that sends nothing.
    """
    distinct = tuple(dict.fromkeys(exchanges))

    def beside(messages):
        program = _program(mesh, messages)

        def step():
            jax.block_until_ready(gradient())
            return program()

        return step

    nothing, *seconds = (seconds_of(beside(messages)) for messages in ((), *distinct))
    found = dict(zip(distinct, (max(0.0, one - nothing) for one in seconds), strict=True))
    return [found[messages] for messages in exchanges]


def _program(mesh, messages):
    """A function of nothing that passes as many bytes as these messages, one after another."""
    count = mesh.shape[AXIS]
    own = jax.sharding.NamedSharding(mesh, jax.P(AXIS))

    def pass_on(x, message):
        if message.kind == "all_gather":
            return lax.all_gather(x, AXIS).ravel()
        if message.kind == "all_to_all":
            return lax.all_to_all(x.reshape(count, -1), AXIS, 0, 0, tiled=True).ravel()
        return lax.psum(x, AXIS)

    def body(rows):
        last = jnp.zeros([], jnp.float32)
        for x, message in zip(rows, messages, strict=True):
            # Each begins when the one before has ended, as those of one step do.
            last = pass_on(x[0] + last.astype(x.dtype), message)[0].astype(jnp.float32)
        return last[None]

    def array(message):
        floats = message.kind not in ("all_to_all", "all_gather")
        size = max(1, -(-message.bytes // (4 if floats else count)) * (1 if floats else count))
        zeros = np.zeros((1, size), np.float32 if floats else np.uint8)
        return jax.make_array_from_callback((count, size), own, lambda index: zeros)

    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=jax.P(AXIS), out_specs=jax.P(AXIS), check_vma=False))
    rows = [array(message) for message in messages]
    return lambda: run(rows)


def seconds_of(program: Callable[[], Any]) -> float:
    """What a program that all processes run takes, one after another, compilation left out; the slowest process counts."""
    jax.block_until_ready(program())
    found, total = [], 0.0
    while len(found) < LEAST or (total < ENOUGH and len(found) < MOST):
        meet()
        begin = time.perf_counter()
        for _ in range(IN_A_ROW):
            jax.block_until_ready(program())
        (seconds,) = at_all([time.perf_counter() - begin])
        found.append(seconds / IN_A_ROW)
        total += seconds
    return typical(found)


def typical(values: Sequence[float]) -> float:
    """The mean of the middle half: outliers do not count, and the sum of parts is that of the whole, unlike with medians.

    Examples:
      >>> typical([1.0, 2.0, 4.0, 90.0]), typical([3.0])
      (3.0, 3.0)
    """
    cut = len(values) // 4
    return statistics.mean(sorted(values)[cut : len(values) - cut])


def meet() -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("signopt advise")


def at_all(seconds: Sequence[float]) -> list[float]:
    """Of each number the largest of all processes, on each of them."""
    if jax.process_count() == 1:
        return list(seconds)
    return np.max(multihost_utils.process_allgather(np.asarray(seconds, np.float32)), axis=0).tolist()

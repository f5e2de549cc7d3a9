"""What joins the workers at hand: bandwidth and latency of their collectives, fitted to what they take.

Sums travel by all-reduces, and votes by an `all_to_all` and an `all_gather`, which a network may carry at another rate. Both
are timed with a small and a large message, between all devices of all processes.
"""

from collections.abc import Callable
import dataclasses
import math
import statistics
import time
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import optax

from signopt import workers
from signopt._tools import exchanges
from signopt.vote import majority_vote

AXIS = "workers"
SMALL, LARGE = 2**12, 2**24  # bytes
ENOUGH = 0.2  # seconds, after which a message is large enough
TIMES = 5


class Links(NamedTuple):
    """What joins workers.

    Attributes:
      sums: For all-reduces of floats or small integers.
      deals: For what travels to servers and back.
    """

    sums: exchanges.Cluster
    deals: exchanges.Cluster

    def of(self, wire: str) -> exchanges.Cluster:
        """The one that a wire takes."""
        return self.deals if wire in exchanges.PLANES or wire in exchanges.CODED else self.sums


def given(workers: int, bits_per_second: float, latency_seconds: float) -> Links:
    """A link of which somebody has said how fast it is."""
    cluster = exchanges.Cluster(workers, bits_per_second, latency_seconds)
    return Links(cluster, cluster)


def measured(mesh: jax.sharding.Mesh) -> Links:
    """Fit the links between the devices of a mesh with the one axis `AXIS`. Every process has to call it."""
    count = mesh.shape[AXIS]
    rounds = math.ceil(math.log2(count))

    def deal(x):
        row = lax.all_to_all(x.reshape(count, -1), AXIS, 0, 0, tiled=True)
        return lax.all_gather(row[0], AXIS)

    return Links(
        _fitted(mesh, lambda x: lax.psum(x, AXIS), jnp.float32, 2 * rounds),
        _fitted(mesh, deal, jnp.uint8, 1 + rounds),
    )


def _fitted(mesh, collective, dtype, messages) -> exchanges.Cluster:
    """The bandwidth and latency with which a small and a large message take as long as they do."""
    count, width = mesh.shape[AXIS], jnp.dtype(dtype).itemsize
    own = jax.sharding.NamedSharding(mesh, jax.P(AXIS))
    mapped = jax.jit(
        jax.shard_map(
            lambda x: collective(x[0])[None], mesh=mesh, in_specs=jax.P(AXIS), out_specs=jax.P(AXIS), check_vma=False
        )
    )

    def seconds(size):
        shape = (count, -(-size // (width * count)) * count)
        x = jax.make_array_from_callback(shape, own, lambda index: np.zeros((1, shape[1]), dtype))
        return at_all(median_seconds(lambda: mapped(x))), 2 * (count - 1) * shape[1] * width / count

    (first, little), size = seconds(SMALL), SMALL
    last, much = first, little
    while last < ENOUGH and size < LARGE:
        size *= 8
        last, much = seconds(size)
    bits_per_second = 8 * (much - little) / max(last - first, 1e-9)
    latency = max(0.0, first - 8 * little / bits_per_second) / messages
    return exchanges.Cluster(count, bits_per_second, latency, 0.0)


def rates() -> exchanges.Rates:
    """The rates of this machine, while all processes do the same: ours, as many times slower as a one-bit vote is here."""
    size, model = 2**20, exchanges.Rates()
    tx = majority_vote(AXIS, wire="one_bit")

    def step(state, batch):
        params, opt_state = state
        updates, opt_state = tx.update(batch[0], opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    run = jax.jit(workers.simulate(step, 1, axis_name=AXIS), donate_argnums=0)
    batch = jnp.ones((1, size))
    held = [(jnp.zeros(size), tx.init(jnp.zeros(size)))]

    def once():
        held[0], _ = run(held[0], batch)
        return held[0]

    slower = at_all(median_seconds(once)) / exchanges.work_seconds(size, 1, "one_bit", model)
    # What a reduction adds is in the bandwidth of sums.
    return dataclasses.replace(model.times(slower), add=0.0)


def median_seconds(program: Callable[[], object]) -> float:
    """The median time of a program, compilation left out."""
    jax.block_until_ready(program())
    found = []
    for _ in range(TIMES):
        begin = time.perf_counter()
        jax.block_until_ready(program())
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def at_all(seconds: float) -> float:
    """The largest of all processes' numbers, on each of them."""
    if jax.process_count() == 1:
        return seconds
    return float(np.max(multihost_utils.process_allgather(np.float64(seconds))))

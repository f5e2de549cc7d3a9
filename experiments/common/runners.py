"""Runners: the same step for one worker, on one device, on a mesh of devices, or under `jax.pmap`, in one process or many.

A runner carries a training state for each seed. On one device all seeds and all workers are one program, a vmap of a
vmap; on several devices the seeds follow each other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import numpy as np

from experiments.common import devices
from experiments.common import processes
import signopt

AXIS = "workers"

Step = Callable[[Any, Any], tuple[Any, Any]]


class Runner(NamedTuple):
    """What it takes to carry training states along.

    Attributes:
      start: From states with a leading axis of seeds to what `advance` carries.
      advance: From what is carried and batches of shape (seeds, steps, examples, ...) to what is carried and metrics
        of shape (seeds, steps, workers).
      read: From what is carried to the states, with a leading axis of seeds, on one device. State that belongs to one
        worker has an axis of workers behind it, unless it was made without `num_workers`: then it is worker 0's.
    """

    start: Callable[[Any], Any]
    advance: Callable[[Any, Any], tuple[Any, Any]]
    read: Callable[[Any], Any]


def simulate(step: Step, num_workers: int) -> Runner:
    """All workers and all seeds on one device, in one compiled loop."""
    together = signopt.workers.simulate(step, num_workers, axis_name=AXIS)

    def one_seed(state, batches):
        return lax.scan(together, state, batches)

    return Runner(start=lambda states: states, advance=jax.jit(jax.vmap(one_seed)), read=lambda states: states)


def mesh(step: Step, num_workers: int) -> Runner:
    """Each worker on a device of its own, through `jax.shard_map`."""
    axis_types = (jax.sharding.AxisType.Auto,)
    grid = jax.make_mesh((num_workers,), (AXIS,), axis_types, devices=devices.take(num_workers))
    together = signopt.workers.on_mesh(step, grid, axis_name=AXIS)

    def read(states):
        return _stack(processes.on_host(states))

    return Runner(start=_unstack, advance=_one_by_one(together, processes.on_host), read=read)


def pmap(step: Step, num_workers: int) -> Runner:
    """Each worker on a device of its own, through `jax.pmap`: every state has a copy on each device."""
    mapped = jax.pmap(step, axis_name=AXIS, devices=devices.take(num_workers))
    # `pmap` takes what belongs to the devices of its own process.
    here = num_workers // jax.process_count()
    own = slice(jax.process_index() * here, (jax.process_index() + 1) * here)

    def together(state, batch):
        return mapped(state, jax.tree.map(lambda x: x[own], signopt.workers.split_batch(batch, num_workers)))

    def start(states):
        copies = jax.tree.map(lambda x: np.repeat(np.asarray(x)[:, None], here, axis=1), states)
        return _unstack(copies)

    def read(states):
        return _stack(jax.tree.map(lambda x: x[0], jax.device_get(states)))

    return Runner(start, _one_by_one(together, processes.joined), read)


def _one_by_one(together, fetch):
    """A plain training loop, for each seed; `fetch` brings the metrics of all workers to the host."""

    def advance(states, batches):
        states, metrics = list(states), []
        for seed, state in enumerate(states):
            found = []
            for batch in zip(*(x[seed] for x in batches), strict=True):
                state, metric = together(state, batch)
                found.append(metric)
            states[seed] = state
            metrics.append(_stack(fetch(found)))
        return states, _stack(metrics)

    return advance


def _unstack(tree):
    count = len(jax.tree.leaves(tree)[0])
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(count)]


def _stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

"""What each host does for `advised`: ask for advice as `python -m signopt advise` does, and follow it."""

import functools
import time
from typing import Any

import jax
import numpy as np
import optax

from experiments.common import losses
from experiments.common import pasted
import signopt
from signopt._tools import advise as asked
from signopt._tools import choices
from signopt._tools import gradients
from signopt._tools import links
from signopt._tools import problem as problems
from signopt._tools import work

ROUNDS = 7  # of `advise`, its default


@functools.cache
def _problem(loss):
    """A loss, its gradient, what it takes here to compute and to agree without a network, and whether data are alike."""
    problem, devices = problems.of(losses.OF[loss]()), jax.local_devices()
    gradient = work.gradient(problem, devices)
    found = work.seconds(problem, devices, gradient, ROUNDS)
    return problem, gradient, found, gradients.look(problem, jax.device_count()).alike


def advise(loss: str) -> dict[str, Any]:
    """What `python -m signopt advise --distributed` measures and ranks on all hosts.

    Args:
      loss: The name of one of `losses.OF`.

    Returns:
      A row for each choice, the best first, with its rank and its index in `choices.CHOICES`.
    """
    problem, gradient, seconds, alike = _problem(loss)
    count = jax.device_count()
    own = jax.make_mesh((count,), (links.AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    sent = asked.messages(problem, count)
    rows = asked.predicted(problem, count, sent, links.measured(own, sent, gradient), seconds, alike=alike)
    rows = asked.ranked([row | {"kind": "advice", "index": i} for i, row in enumerate(rows)], tolerance=2.0)
    return {"rows": [row | {"rank": rank} for rank, row in enumerate(rows, 1)]}


@functools.cache
def _choice(loss, index):
    """A function of nothing that makes a step as the lines to paste do, compiled."""
    problem, choice = problems.of(losses.OF[loss]()), choices.CHOICES[index]
    optimizer = optax.with_extra_args_support(pasted.optimizer(choice, jax.device_count(), 1e-4))
    axis = choices.AXIS
    own = jax.make_mesh((jax.device_count(),), (axis,), axis_types=(jax.sharding.AxisType.Auto,))
    value_and_grad = signopt.workers.value_and_grad(problem.loss, axis_name=axis)

    def step(state, batch):
        params, opt_state = state
        place = signopt.local_params(opt_state, params) if choice.is_local else params
        value, gradient = value_and_grad(place, jax.tree.map(lambda x: x[0], batch))
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    run = signopt.workers.on_mesh(step, own, axis_name=axis, donate=True, check_vma=False)
    held = [(problem.params, optimizer.init(problem.params))]
    mine = jax.process_index() % problem.count
    rows = jax.tree.map(lambda x: np.asarray(x[mine : mine + 1]), problem.batches)
    split = jax.sharding.NamedSharding(own, jax.P(axis))
    batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), rows)

    def one():
        held[0], _ = run(held[0], batch)
        return held[0]

    for _ in range(pasted.SETTLED if choice.then else 1):
        jax.block_until_ready(one())
    return one


def choice(loss: str, index: int, count: int) -> dict[str, Any]:
    """Make steps of one of `advise`'s choices back to back.

    Args:
      loss: The name of one of `losses.OF`.
      index: Of `choices.CHOICES`.
      count: How many steps; 0 only compiles.

    Returns:
      The seconds of one on this host.
    """
    links.meet()
    one = _choice(loss, index)
    links.meet()
    begin, last = time.perf_counter(), None
    for _ in range(count):
        last = one()
    jax.block_until_ready(last)
    return {"seconds": (time.perf_counter() - begin) / max(count, 1)}

"""What a step computes, without a network: your gradient, and what each choice does with it.

A choice runs on your own tree among one worker, which packs, counts, decodes and unpacks as much as each of many does. All
devices of all processes work at the same time, each for itself, and the slowest counts, as in training: processes of one
machine compete for its cores.
"""

from collections.abc import Callable, Sequence
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import signopt
from signopt._tools import choices
from signopt._tools import links
from signopt._tools import problem as problems

_APART = "apart"
LEAST = 3  # rounds of a choice that are timed, at least


class Work(NamedTuple):
    """Seconds.

    Attributes:
      gradient: Of the loss and its gradient.
      updates: What each choice adds in a step, on average over a round.
    """

    gradient: float
    updates: tuple[float, ...]


def seconds(problem: problems.Problem, devices: Sequence[Any], gradient: Callable[[], Any], rounds: int) -> Work:
    """Time the gradient, and each of `choices.CHOICES`. Every process has to call it.

    Args:
      problem: The user's.
      devices: Of this process; all compute at the same time.
      gradient: What `gradient` has returned for them.
      rounds: How many steps of each are timed, at least.
    """
    mesh, programs = _mesh(devices), [gradient]
    gradients = jax.block_until_ready(gradient())
    for choice in choices.CHOICES:
        problems.progress(f"compiling {choice.name}")
        programs.append(_update(problem, mesh, choice, gradients))
        jax.block_until_ready(programs[-1]())
    lengths = [1, *(choice.every for choice in choices.CHOICES)]
    found = [[] for _ in programs]
    for turn in range(rounds):
        problems.progress(f"round {turn + 1} of {rounds}")
        order = range(len(programs))
        for i in order if turn % 2 == 0 else reversed(order):
            if turn >= max(LEAST, rounds // lengths[i]):
                continue
            links.meet()
            begin, last = time.perf_counter(), None
            for _ in range(lengths[i]):
                last = programs[i]()
            jax.block_until_ready(last)
            found[i].append((time.perf_counter() - begin) / lengths[i])
    problems.progress("")
    alone, *updates = (links.typical(links.at_all(times)) for times in found)
    return Work(alone, tuple(updates))


def gradient(problem: problems.Problem, devices: Sequence[Any]) -> Callable[[], Any]:
    """A function of nothing that takes a gradient on each device, of a mini-batch of its own."""
    mesh = _mesh(devices)
    count = mesh.shape[_APART]
    chosen = np.arange(count) % problem.count
    place = jax.sharding.NamedSharding(mesh, jax.P(_APART))
    batches = jax.device_put(jax.tree.map(lambda x: x[chosen], problem.batches), place)
    params = _stacked(problem.params, mesh)
    run = jax.jit(_apart(jax.value_and_grad(problem.loss), mesh))
    return lambda: run(params, batches)[1]


def _mesh(devices):
    """Devices, each a mesh of its own, of one worker."""
    axes = 2 * (jax.sharding.AxisType.Auto,)
    return jax.sharding.Mesh(np.array(devices)[:, None], (_APART, choices.AXIS), axis_types=axes)


def _update(problem, mesh, choice, gradients):
    """A function of nothing that makes another step with the same gradients."""
    optimizer = optax.with_extra_args_support(choices.settled(choice, 1))

    def step(state, gradients):
        params, opt_state = state
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        place = signopt.local_params(opt_state, params) if choice.is_local else None
        return (params, opt_state), place

    run = jax.jit(_apart(step, mesh), donate_argnums=0)
    held = [_stacked((problem.params, optimizer.init(problem.params)), mesh)]

    def one():
        held[0], place = run(held[0], gradients)
        return held[0], place

    return one


def _stacked(tree, mesh):
    """The same for each device."""
    count, place = mesh.shape[_APART], jax.sharding.NamedSharding(mesh, jax.P(_APART))
    spread = jax.jit(
        lambda tree: jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))), tree), out_shardings=place
    )
    return spread(tree)


def _apart(body, mesh):
    """`body` on each device, with its row of every array."""

    def own(*trees):
        rows = jax.tree.map(lambda x: x[0], trees)
        return jax.tree.map(lambda x: jnp.asarray(x)[None], body(*rows))

    return jax.shard_map(own, mesh=mesh, in_specs=jax.P(_APART), out_specs=jax.P(_APART), check_vma=False)

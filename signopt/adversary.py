r"""Bad workers: what they send in place of their own updates, to see what a vote survives.

An adversary is a function from a worker's honest updates, and from what it knows in this step (`Situation`), to what
it sends. `corrupt` hands the first few workers over to one, left of the vote::

  gradient > momentum > corrupt(inverted(), 3, "worker") > majority vote > ...

A vote gives each of them one sign per parameter, whatever it sends. A mean gives each as much as it claims.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jaxtyping import Array, Int
import optax

from signopt import _axis
from signopt import _check
from signopt import sign
from signopt import vote


class Situation(NamedTuple):
    """What an adversary knows beside its own updates.

    Attributes:
      axis_name: The workers, honest ones included. An adversary may gather over them: all workers run its code.
      count: int32 scalar: the steps before this one.
    """

    axis_name: _axis.AxisName
    count: Int[Array, ""]


Adversary = Callable[[optax.Updates, Situation], optax.Updates]


class CorruptState(NamedTuple):
    """How many steps were corrupted.

    Attributes:
      count: int32 scalar. Shared.
    """

    count: jax.Array


def corrupt(
    adversary: Adversary, num_adversaries: int | jax.Array, axis_name: _axis.AxisName
) -> optax.GradientTransformationExtraArgs:
    """Let the first workers of an axis send what an adversary makes of their updates.

    It belongs left of the border. Right of the momentum it corrupts what travels, left of it what a worker remembers.

    Args:
      adversary: What they send: `inverted()`, `random(key)`, `scaled(factor)`, `silent()`, `colluding()`, or any function
        from updates and a `Situation` to updates of the same shapes.
      num_adversaries: How many: the workers 0 ... `num_adversaries` - 1. May be traced, to sweep it in one program.
      axis_name: The workers, as in `majority_vote`.

    Returns:
      A transformation with a `CorruptState`. Updates keep their shapes and dtypes, and those of honest workers their bits.

    Raises:
      ValueError: If `num_adversaries` is negative; in `update`, if the axis is not bound or has fewer workers.
      TypeError: In `update`, if a leaf is not of a floating-point dtype.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from signopt import adversary
      >>> tx = adversary.corrupt(adversary.inverted(), 1, "worker")
      >>> update = jax.vmap(tx.update, in_axes=(0, None), out_axes=(0, None), axis_name="worker")
      >>> update(jnp.array([[0.5, -2.0], [0.5, -2.0]]), tx.init(None))[0].tolist()
      [[-0.5, 2.0], [0.5, -2.0]]
    """
    caller = "corrupt"
    _check.at_least(0, num_adversaries, caller, "num_adversaries")

    def init_fn(params):
        del params
        return CorruptState(jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        num_workers = _axis.size(axis_name, caller)
        if not isinstance(num_adversaries, Tracer) and num_adversaries > num_workers:
            raise ValueError(
                f"`{caller}(num_adversaries=...)` has to be at most the size of axis {axis_name!r}, which is "
                f"{num_workers}, got {num_adversaries}."
            )
        sign.require_floating(updates, caller)
        is_bad = _axis.index(axis_name) < num_adversaries
        sent = adversary(updates, Situation(axis_name, state.count))
        updates = jax.tree.map(lambda bad, own: jnp.where(is_bad, bad.astype(jnp.result_type(own)), own), sent, updates)
        return updates, CorruptState(state.count + 1)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def inverted() -> Adversary:
    """Send the opposite of what was computed: the strongest of the adversaries that know their own data only.

    References:
      The adversary of Theorem 2 of Bernstein et al., `fault tolerance <https://arxiv.org/abs/1810.05291>`_, 2019.
    """
    return scaled(-1.0)


def scaled(factor: float | jax.Array = -1000.0) -> Adversary:
    """Send `factor` times what was computed.

    A vote reads its sign alone. One such worker ruins a mean: for M workers it counts `factor / M` times.
    """
    return lambda updates, situation: jax.tree.map(lambda x: x * jnp.asarray(factor, jnp.result_type(x)), updates)


def silent() -> Adversary:
    """Send nothing: a worker that abstains from every vote, and pulls a mean to zero."""
    return lambda updates, situation: jax.tree.map(jnp.zeros_like, updates)


def random(key: jax.Array) -> Adversary:
    """Throw a coin for each sign, and keep the sizes: another coin on each worker and in each step.

    Args:
      key: A random key, the same on every worker.
    """

    def send(updates, situation):
        own = jax.random.fold_in(jax.random.fold_in(key, situation.count), _axis.index(situation.axis_name))
        keys = optax.tree.split_key_like(own, updates)
        return jax.tree.map(lambda k, x: x * jax.random.rademacher(k, jnp.shape(x), jnp.result_type(x)), keys, updates)

    return send


def colluding() -> Adversary:
    r"""Vote together against everybody: the opposite of what the majority would be if all workers were honest.

    .. math::
      v_{m,i} = -\operatorname{sign}\Big(\sum_{k=1}^M \operatorname{sign}(v_{k,i})\Big) \quad \text{for every bad } m

    They know what all workers are about to vote, themselves included, so none of their votes is lost by chance, as
    some of those that `inverted` casts are. With half of the workers or more they decide everything. Updates become -1, 0
    and +1: it belongs directly left of a vote, right of the momentum.
    """

    def send(updates, situation):
        num_workers = _axis.size(situation.axis_name, "colluding")
        votes = jax.tree.map(lambda x: sign.vote(x).astype(vote.ballot_dtype(num_workers)), updates)
        sums = _axis.total(votes, situation.axis_name)
        return jax.tree.map(lambda s, x: -jnp.sign(s).astype(jnp.result_type(x)), sums, updates)

    return send

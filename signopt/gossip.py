r"""Gossip: every worker averages with its neighbours, and no mean over all workers is taken.

.. math::
  x_m \leftarrow \frac{1}{1 + |N|} \Big( x_m + u_m + \sum_{n \in N} (x_{m+n} + u_{m+n}) \Big)

Workers stand in a circle, and N says how far from each its neighbours are: -1 and 1 on a ring. The mean of all workers'
parameters moves by the mean of their updates, as if they had averaged. How far apart they are depends on the graph.
"""

from collections.abc import Hashable, Sequence

import jax
from jax import lax
import jax.numpy as jnp
import optax

from signopt import _axis
from signopt import _check
from signopt import _flat
from signopt import sign


def gossip_mean(axis_name: Hashable, neighbours: Sequence[int] = (-1, 1)) -> optax.GradientTransformationExtraArgs:
    r"""Move each worker to the mean of where its own update and those of its neighbours lead.

    Unlike a border's, its updates differ between workers, so it belongs where parameters are a worker's own: last in the
    `inner` optimizer of `local_steps`, whose `outer` averages over all workers once in a while.

    Args:
      axis_name: The workers: one axis bound by `jax.vmap`, `jax.pmap` or `jax.shard_map`.
      neighbours: How many places on each neighbour stands: (-1, 1) is a ring, (1,) one that hears from one side only,
        (1, 2, 4) an exponential graph.

    Returns:
      A transformation without state whose `update` needs `params`, where this worker is. One `ppermute` for each
      neighbour, of all parameters in float32. With `present=False` a worker keeps its own updates, and its neighbours do
      without it. What is not finite goes nowhere: its neighbours take their own value.

    Raises:
      ValueError: If there are no neighbours, or two are the same; in `update`, without `params`, if the axis is not bound,
        or if it is so short that a neighbour is the worker itself, or one twice.
      TypeError: If a neighbour is no Python integer; in `update`, if a leaf is not of a floating-point dtype.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> tx = signopt.gossip_mean("w", neighbours=(1,))
      >>> params, updates = jnp.array([0.0, 3.0, 6.0]), jnp.array([1.0, 0.0, 0.0])
      >>> def update(u, x):
      ...     return tx.update(u, tx.init(x), x)[0]
      >>> (params + jax.vmap(update, axis_name="w")(updates, params)).tolist()
      [2.0, 4.5, 3.5]

    References:
      Lian et al., `Can decentralized algorithms outperform centralized algorithms?
      <https://arxiv.org/abs/1705.09056>`_, 2017, Algorithm 1. Chen et al., `Accelerating gossip SGD with periodic global
      averaging <https://arxiv.org/abs/2105.09080>`_, 2021, for the mean once in a while.
    """
    caller = "gossip_mean"
    places = tuple(neighbours)
    for place in places:
        _check.count(place, caller, "neighbours", least=-(2**31))
    if not places or len(set(places)) < len(places):
        raise ValueError(f"`{caller}(neighbours=...)` has to be different places, at least one, got {neighbours!r}.")

    def update_fn(updates, state, params=None, *, present=None, **extra_args):
        del extra_args
        size = _axis.size(axis_name, caller)
        if len({place % size for place in (0, *places)}) <= len(places):
            raise ValueError(
                f"`{caller}(neighbours=...)` has to be different workers, none of them this one, got {neighbours!r} among "
                f"{size} workers of axis {axis_name!r}."
            )
        sign.require_floating(updates, caller)
        updates = jax.tree.map(jnp.asarray, updates)
        here = jax.tree.map(jnp.asarray, _check.params(params, caller, "what is averaged is `params` plus its update"))
        start = _flat.rows(here, 1, 1)[0]
        own = start + _flat.rows(updates, 1, 1)[0]
        takes_part = jnp.ones([], bool) if present is None else jnp.asarray(present, bool)
        own, takes_part = _axis.to_varying((own, takes_part), axis_name)
        sent = jnp.where(takes_part, own, jnp.nan)  # nobody takes what is not finite

        def hear(place):
            heard = lax.ppermute(sent, axis_name, [((m + place) % size, m) for m in range(size)])
            return jnp.where(takes_part & jnp.isfinite(heard), heard, own)

        mean = jnp.stack([own, *map(hear, places)]).mean(0)
        return _flat.tree((mean - start)[None], updates, 1), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)

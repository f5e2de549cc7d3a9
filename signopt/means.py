"""The mean over workers: the other border that a chain can have."""

import jax
import optax

from signopt import _axis
from signopt import _shards


def mean(axis_name: _axis.AxisName) -> optax.GradientTransformation:
    """Replace each worker's updates by their mean over all workers, in full precision.

    The baseline that `majority_vote` is measured against, and the inner level where workers within a fast network
    average and only groups of them vote: `optax.chain(mean("device"), ..., majority_vote("host"))`.

    Args:
      axis_name: The workers: an axis bound by `jax.vmap`, `jax.pmap` or `jax.shard_map`, a tuple of such axes, or None
        for one worker and no communication.

    Returns:
      A transformation without state. Updates keep their shapes and dtypes.

    Raises:
      ValueError: In `update`, if `axis_name` is not bound, or if the updates are known to be the same on all workers,
        which means that they were added up before.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> tx = signopt.mean("worker")
      >>> update = jax.vmap(tx.update, in_axes=(0, None), out_axes=None, axis_name="worker")
      >>> update(jnp.array([[1.0, 2.0], [3.0, 6.0]]), tx.init(None))[0]
      Array([2., 4.], dtype=float32)
    """

    def init_fn(params):
        del params
        return optax.EmptyState()

    def update_fn(updates, state, params=None):
        del params
        num_workers = _axis.size(axis_name, "mean")
        _axis.require_varying(updates, axis_name, "mean")
        return jax.tree.map(lambda x: x / num_workers, _axis.total(updates, axis_name)), state

    return optax.GradientTransformation(init_fn, _shards.cut(update_fn))

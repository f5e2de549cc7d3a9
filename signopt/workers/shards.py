"""Borders over sharded parameters: an inner axis of the mesh holds the shards (FSDP), an outer one the replicas that vote."""

from typing import Any

import optax

from signopt import _shards


def on_shards(tx: optax.GradientTransformation, specs: Any) -> optax.GradientTransformationExtraArgs:
    """Run the border of a chain on the shards: each device exchanges its own with the same shard of other replicas.

    It is for steps on a mesh whose inner axes shard the parameters and are left to the compiler:
    `on_mesh(step, mesh, axis_name="replica")`, `jax.shard_map(..., axis_names={"replica"})`. Links left and right of the
    border still see whole arrays. So does a border that does more than agree on each entry by itself: one with scales, memory,
    delay or a report gives the same numbers as without this, and the compiler gathers what it needs.

    Args:
      tx: A border over the axis of the replicas, or a chain or a ready optimizer that has one.
      specs: How parameters, and so updates, are sharded: `jax.sharding.PartitionSpec` of inner axes, one for all leaves
        or a tree of them as for `jax.shard_map`.

    Returns:
      A transformation like `tx`. On a two-bit wire it returns the same votes, bit for bit; on a one-bit wire zeros and
      ties are settled by the position in the shard instead of that in the leaf. Where there is no mesh, as in
      `simulate`, nothing is sharded, and it is `tx`.

    Raises:
      TypeError: If `specs` holds something else.
      ValueError: In `update`, if the mesh does not have these axes, a leaf has no spec, or a `jax.shard_map` already
        runs over these axes.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, signopt
      >>> specs = {"w": jax.P("shard"), "b": jax.P()}
      >>> tx = signopt.workers.on_shards(signopt.signum(0.5, axis_name="replica", num_workers=1), specs)
      >>> def step(state, batch):
      ...     params, opt_state = state
      ...     updates, opt_state = tx.update(jax.tree.map(lambda x: x[0], batch), opt_state, params)
      ...     return (optax.apply_updates(params, updates), opt_state), None
      >>> mesh = jax.make_mesh((1, 1), ("replica", "shard"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
      >>> params = {"w": jnp.zeros(4), "b": jnp.zeros(1)}
      >>> gradients = {"w": jnp.array([[3.0, 0.0, -1.0, 2.0]]), "b": jnp.array([[-2.0]])}
      >>> (params, _), _ = signopt.workers.on_mesh(step, mesh, axis_name="replica")((params, tx.init(params)), gradients)
      >>> params["w"].tolist(), params["b"].tolist()
      ([-0.5, 0.0, 0.5, -0.5], [0.5])
    """
    declared = _shards.read(specs, "on_shards")
    tx = optax.with_extra_args_support(tx)

    def update_fn(updates, state, params=None, **extra_args):
        _shards.check_covers(declared, updates, "on_shards")
        with _shards.declare(declared):
            return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)

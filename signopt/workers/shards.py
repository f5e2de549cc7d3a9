"""Borders over sharded parameters: an inner axis of the mesh holds the shards (FSDP), an outer one the replicas that vote.

A border inside a `jax.shard_map` over the replicas alone sees whole arrays, and the compiler gathers them over the inner
axis, which it lays out by itself, to pack them. Here each device packs, counts and unpacks its own shard.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax

from signopt import _axis
from signopt import border as borders


def on_shards(tx: optax.GradientTransformation, specs: Any) -> optax.GradientTransformationExtraArgs:
    """Run a border on the shards of the parameters: each device votes on its own, with the same shard of other replicas.

    It takes the place of the border in a chain, in a step that runs on a mesh whose inner axes shard the parameters and
    are left to the compiler: `on_mesh(step, mesh, axis_name="replica")`, `jax.shard_map(..., axis_names={"replica"})`.

    Args:
      tx: A border such as `majority_vote` or `mean`, over the axis of the replicas, without memory at the servers.
      specs: How parameters, and so updates, are sharded: `jax.sharding.PartitionSpec` of inner axes, one for all leaves
        or a tree of them as for `jax.shard_map`.

    Returns:
      A transformation like `tx`. On a two-bit wire it returns the same votes, bit for bit; on a one-bit wire zeros and
      ties are settled by the position in the shard instead of that in the leaf. Where there is no mesh, as in
      `simulate`, nothing is sharded, and it is `tx`.

    Raises:
      TypeError: If `tx` is no border, or `specs` holds something else.
      ValueError: In `update`, if the mesh does not have these axes, or a `jax.shard_map` already runs over them.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, signopt
      >>> specs = {"w": jax.P("shard"), "b": jax.P()}
      >>> tx = optax.chain(
      ...     signopt.workers.per_worker(signopt.scale_by_signum(0.9), 1),
      ...     signopt.workers.on_shards(signopt.majority_vote("replica"), specs),
      ...     optax.scale_by_learning_rate(0.5))
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
    state = jax.eval_shape(tx.init, jnp.zeros(()))
    if not isinstance(state, borders.BorderState):
        raise TypeError(
            f"`on_shards(tx=...)` has to be a border, such as `majority_vote` or `mean`, got one with a state of "
            f"{type(state).__name__}. Leave what is left and right of the border beside it in `optax.chain`: the compiler "
            "shards that by itself."
        )
    if jax.tree.leaves(optax.tree.get(state, "server", ())):
        raise ValueError(
            "`on_shards(tx=...)` has to be a border without memory at the servers, whose rows are cut from whole parameters, "
            'got one with. Pass `memory="workers"` and no `server` to it.'
        )
    names = _axes_of(specs)
    tx = optax.with_extra_args_support(tx)

    def update_fn(updates, state, params=None, *, present=None, **extra_args):
        del params, extra_args
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or not names:
            return tx.update(updates, state, present=present)
        _check_mesh(names, mesh)

        def local(updates, state, present):
            return tx.update(updates, state, present=present)

        # Types cannot say that a leaf without shards is still the same on all of them once it has shared a buffer with
        # one that has. So they are left out inside, and taken from the same update as it would be without shards.
        types = jax.eval_shape(lambda: tx.update(_like(updates), state, present=present))
        whole = PartitionSpec()
        own = _state_specs(state, specs)
        mapped = jax.shard_map(
            local, in_specs=(specs, own, whole), out_specs=(specs, own), axis_names=names, check_vma=False
        )
        return jax.tree.map(
            lambda x, t: _axis.to_varying(x, tuple(_axis.varying(t))), mapped(updates, state, present), types
        )

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def _axes_of(specs):
    """The names of all axes in a tree of specs."""
    leaves = jax.tree.leaves(specs, is_leaf=lambda x: x is None)
    odd = [x for x in leaves if not isinstance(x, PartitionSpec)]
    if odd:
        raise TypeError(
            f"`on_shards(specs=...)` has to be `jax.sharding.PartitionSpec`, or a tree of them, got {odd[0]!r}."
        )
    return {name for spec in leaves for entry in spec for name in _axis.names(entry)}


def _state_specs(state, specs):
    """How the state of a border is sharded: what a worker remembers lies as the parameters do, behind its worker axis."""
    whole = PartitionSpec()
    if not jax.tree.leaves(state.own):
        return whole
    behind = jax.tree.map(lambda spec: PartitionSpec(None, *spec), specs)
    own = state.own.per_worker

    def like(tree):
        return behind if jax.tree.leaves(tree) else whole

    sharded = borders.Own(borders.Memory(like(own.memory.worker), whole), like(own.held), whole)
    return borders.BorderState(whole, whole, state.own._replace(per_worker=sharded, worker=whole))


def _check_mesh(names, mesh):
    for name in sorted(names):
        if name not in mesh.axis_names:
            raise ValueError(
                f"`on_shards(specs=...)` has to name axes of the mesh, which has {mesh.axis_names}, got {name!r}."
            )
        if name in mesh.manual_axes:
            raise ValueError(
                f"`on_shards(specs=...)` has to name axes that are left to the compiler, got {name!r}, which a "
                "`jax.shard_map` already runs over: there each device has its own shard, and `tx` alone votes on it."
            )


def _like(tree):
    """Zeros of the same shapes, dtypes and varying axes, without shards."""
    return jax.tree.map(lambda x: _axis.to_varying(jnp.zeros(x.shape, x.dtype), tuple(_axis.varying(x))), tree)

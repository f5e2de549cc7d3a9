"""Gradients that JAX has not added up yet: borders in plain `jax.jit` where axes are Explicit.

There a type can say that the value is the sum of what the devices hold. JAX calls it *unreduced*. `jax.grad` returns such
gradients for parameters that are tagged as *reduced*: what a device holds is then the gradient of its own part of the
batch. So each worker's gradient is there without a `jax.vmap`, and the all-reduce that would follow is never made.
"""

import math
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import optax

from signopt import _axis
from signopt.workers.plain_jit import in_jit


def unreduced(tx: optax.GradientTransformation, *, axis_name: _axis.AxisName) -> optax.GradientTransformationExtraArgs:
    """Run an optimizer in plain `jax.jit`, on gradients that are typed as unreduced over the workers.

    Such a gradient is a sum over the workers, one term on each device. A worker's own gradient is M times its term, so
    that their mean is what JAX would have reduced it to. Meshes and shards are read off the types. Otherwise it is
    `in_jit`: all links of the chain run for one worker, on whole arrays, and each device sends its own shard.

    Args:
      tx: A chain with a border over `axis_name`, such as `signum(..., axis_name="data", num_workers=8)`.
      axis_name: The Explicit axis of the mesh that the batch is sharded over, or a tuple of such axes.

    Returns:
      A transformation. `init` takes parameters on the mesh and puts per-worker state on the devices of its workers.
      `update` takes unreduced gradients and returns updates that are the same on all workers, sharded like the
      gradients. It takes `present` and other extra arguments as `in_jit` does.

    Raises:
      ValueError: In `update`, if a gradient is not unreduced over the workers, or is so over other axes, or shared state
        would differ between workers: momentum needs `num_workers`.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> params = jax.device_put(jnp.zeros(2), jax.NamedSharding(mesh, jax.P(None)))
      >>> batch = jax.device_put(jnp.array([[3.0, -1.0], [1.0, -1.0]]), jax.NamedSharding(mesh, jax.P("data", None)))
      >>> tx = signopt.workers.unreduced(signopt.signsgd(0.5, axis_name="data"), axis_name="data")
      >>> @jax.jit
      ... def updates(params, batch):
      ...     tagged = jax.reshard(params, jax.NamedSharding(mesh, jax.P(None, reduced={"data"})))
      ...     grads = jax.grad(lambda params: jnp.mean(batch @ params))(tagged)
      ...     return tx.update(grads, tx.init(params), params)[0]
      >>> updates(params, batch).tolist()
      [-0.5, 0.5]
    """
    names = _axis.names(axis_name)
    if not names:
        raise ValueError("`unreduced(axis_name=...)` has to name an axis of the mesh, got None.")

    def inner(mesh: Any, tree: Any) -> optax.GradientTransformationExtraArgs:
        specs = jax.tree.map(lambda x: PartitionSpec(*jax.typeof(x).sharding.spec.partitions), tree)
        return in_jit(tx, mesh, axis_name=axis_name, specs=specs)

    def init_fn(params):
        mesh = _mesh_of(params, names)
        return tx.init(params) if mesh is None else inner(mesh, params).init(_plain(params))

    def update_fn(updates, state, params=None, **extra_args):
        mesh: Any = _mesh_of(updates, names)
        _check_unreduced(updates, names)
        stacked = jax.tree.map(lambda x: _stacked(x, mesh, names), updates)
        return inner(mesh, updates).update(stacked, state, _plain(params), **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _mesh_of(tree: Any, names: tuple) -> Mesh | None:
    """The mesh of the first leaf; None if its type names none."""
    x = next(iter(jax.tree.leaves(tree)), None)
    at = None if x is None else getattr(jax.typeof(x), "sharding", None)
    if x is None or at is None or at.mesh.empty:
        return None
    if not set(names) <= set(at.mesh.axis_names):
        raise ValueError(
            f"`unreduced(axis_name=...)` has to name axes of the mesh, which has {at.mesh.axis_names}, got {names}."
        )
    return at.mesh if isinstance(x, Tracer) else x.sharding.mesh


def _stacked(x: jax.Array, mesh: Mesh, names: tuple) -> jax.Array:
    """Each worker's own gradient along a leading axis. Nothing travels: a device keeps what it holds."""
    entries = jax.typeof(x).sharding.spec.partitions
    workers = math.prod(mesh.shape[name] for name in names)
    return jax.shard_map(
        lambda term: (term * workers)[None],
        mesh=mesh,
        in_specs=PartitionSpec(*entries, unreduced=frozenset(names)),
        out_specs=PartitionSpec(names, *entries),
        check_vma=False,
    )(x)


def _plain(tree: Any) -> Any:
    """Parameters without the tag that made their gradients unreduced."""

    def plain(x):
        at = getattr(jax.typeof(x), "sharding", None)
        if at is None or not at.spec.reduced:
            return x
        return jax.reshard(x, NamedSharding(at.mesh, PartitionSpec(*at.spec.partitions)))

    return jax.tree.map(plain, tree)


def _check_unreduced(updates: Any, names: tuple) -> None:
    for path, x in jax.tree.leaves_with_path(updates):
        at = getattr(jax.typeof(x), "sharding", None)
        found = frozenset() if at is None else at.spec.unreduced
        if found != set(names):
            raise ValueError(
                f"`unreduced(...).update(updates=...)` has to be given gradients that are unreduced over {set(names)}, got "
                f"{jax.typeof(x)} at `updates{jax.tree_util.keystr(path)}`. On a mesh whose axes are Explicit, take them of "
                "parameters that are tagged: `jax.reshard(param, jax.P(*jax.typeof(param).sharding.spec.partitions, "
                f"reduced={set(names)}))`."
            )

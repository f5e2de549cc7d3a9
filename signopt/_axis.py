"""Axes: which are bound, which are devices, what varies along them, and how to add and gather over them.

This is the one place that knows JAX's rules. An axis is bound by `jax.vmap(axis_name=...)` (a *vmapped* axis: workers
simulated on one device) or by `jax.pmap` and `jax.shard_map` (a *device* axis). A vote may run over several of them
at once. Under `shard_map(check_vma=True)` each value's type says along which device axes it varies; elsewhere types
say nothing.
"""

from collections.abc import Callable, Hashable
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from signopt import _swaps

AxisName = Hashable | tuple[Hashable, ...] | None


def names(axis_name: AxisName) -> tuple[Hashable, ...]:
    """The single names behind an `axis_name`: none for None, several for a tuple."""
    if axis_name is None:
        return ()
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def size(axis_name: AxisName, caller: str) -> int:
    """The number of workers along `axis_name`; 1 for None.

    Raises:
      ValueError: If a name is not bound where this is traced.
    """
    return math.prod(_bound_size(name, caller) for name in names(axis_name))


def index(axis_name: AxisName) -> jax.Array:
    """This worker's place along `axis_name`, in 0 ... size - 1; int32."""
    return lax.axis_index(names(axis_name)) if names(axis_name) else jnp.zeros([], jnp.int32)


def devices_and_vmapped(axis_name: AxisName) -> tuple[tuple[Hashable, ...], tuple[Hashable, ...]]:
    """The device axes and the vmapped axes of `axis_name`, each in order."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    devices = tuple(name for name in names(axis_name) if name in manual)
    return devices, tuple(name for name in names(axis_name) if name not in manual)


def total(tree: Any, axis_name: AxisName) -> Any:
    """The sum of every leaf over all workers, the same on each, in the leaf's dtype."""
    devices, vmapped = devices_and_vmapped(axis_name)
    if vmapped:
        tree = jax.tree.map(lambda x: jnp.sum(stack_vmapped(x, vmapped), axis=0, dtype=x.dtype), tree)
    return lax.psum(tree, devices) if devices else tree


def stack_vmapped(x: jax.Array, vmapped: tuple[Hashable, ...]) -> jax.Array:
    """Everybody's `x` along a new leading axis, over vmapped axes only.

    The result is unbatched: what is computed from it is computed once for all workers, and `out_axes=None` accepts it.
    """
    x = x[None]
    for name in reversed(vmapped):  # vmap cannot gather over a tuple
        # The primitive, because under check_vma all functions of `lax` assert that an axis is one of the mesh.
        x = lax.all_gather_p.bind(
            x,
            all_gather_dimension=0,
            axis_name=(name,),
            axis_index_groups=None,
            axis_size=lax.axis_size(name),
            tiled=True,
        )
    return x


def deal_rows(rows: jax.Array, devices: tuple[Hashable, ...]) -> jax.Array:
    """Row j of everybody's `rows` to device j, which has them in an order of its own; over device axes only."""
    if _swaps.should_deal(rows):
        return _swaps.all_to_all(rows, devices)
    return lax.all_to_all(rows, devices, split_axis=0, concat_axis=0, tiled=True)


def join_devices(x: jax.Array, devices: tuple[Hashable, ...]) -> jax.Array:
    """Everybody's `x`, concatenated along the last axis, over device axes only; typed as the same on each."""
    if _swaps.should_gather(x, math.prod(lax.axis_size(name) for name in devices)):
        return _swaps.all_gather(x, devices)
    same = "invarying" if all(map(_is_tracked, devices)) else "varying"
    return lax.all_gather(x, devices, axis=x.ndim - 1, tiled=True, to=same)


def gather_scalar(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Everybody's scalar, in one order: what is added up from it is the same on every worker, bit for bit."""
    devices, vmapped = devices_and_vmapped(axis_name)
    found = stack_vmapped(to_varying(x, devices), vmapped)
    return join_devices(found, devices) if devices else found


def varying(x: Any) -> frozenset:
    """The device axes along which the type of `x` says that it varies."""
    return jax.typeof(x).manual_axis_type.varying


def to_varying(tree: Any, axis_name: AxisName) -> Any:
    """Mark every leaf as one worker's own, so that `jax.grad` does not add up its gradient over the workers."""
    tracked = [name for name in names(axis_name) if _is_tracked(name)]

    def cast(x):
        missing = tuple(name for name in tracked if name not in varying(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def varying_of(function: Callable, *args: Any) -> tuple[Hashable, ...]:
    """The device axes along which results of `function(*args)` vary; it is traced to find out, and not computed."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return ()
    return tuple(frozenset().union(*map(varying, jax.tree.leaves(jax.eval_shape(lambda: function(*args))))))


def vary_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Arrays with one type of what varies: along every device axis along which one of them does."""
    return to_varying(list(arrays), tuple(frozenset().union(*map(varying, arrays))))


def require_varying(tree: Any, axis_name: AxisName, caller: str) -> None:
    """Refuse gradients that were reduced over the workers before they got here.

    `jax.grad` of replicated parameters under `shard_map(check_vma=True)` returns the gradient already summed over the
    workers: a vote over it is no vote, and a mean of it is too large by the number of workers. The types show it.

    Raises:
      ValueError: If a leaf is known to be the same on all workers.
    """
    for name in filter(_is_tracked, names(axis_name)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            if name not in varying(leaf):
                raise ValueError(
                    f"`{caller}` has to be given each worker's own gradient, got one that is the same on every worker "
                    f"of axis {name!r} at `updates{jax.tree_util.keystr(path)}`: it was reduced before. Under "
                    "`shard_map`, `jax.grad` of replicated parameters adds up the workers' gradients; take it with "
                    f"`signopt.workers.value_and_grad(loss, axis_name={axis_name!r})`, and leave out any "
                    "`lax.pmean` or `lax.psum` of the gradients."
                )


def _is_tracked(name: Hashable) -> bool:
    """Whether types show along `name` what varies: under `shard_map(check_vma=True)`, not elsewhere."""
    return name in varying(lax.axis_index(name))


def _bound_size(name, caller):
    try:
        return lax.axis_size(name)
    except NameError:
        raise ValueError(
            f"`{caller}` has to be called where axis {name!r} is bound, got an unbound name. Run the step with "
            f"`signopt.workers.simulate` or `on_mesh`, `jax.vmap(..., axis_name={name!r})`, `jax.pmap` or "
            "`jax.shard_map`, or pass `axis_name=None` for one worker."
        ) from None

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

from signopt import _compat
from signopt._compat import varying as varying

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


def may_be_sharded() -> bool:
    """Whether the compiler may have laid out what is traced here over several devices.

    Inside a `shard_map` over all axes of a mesh it has not. Without a mesh nobody knows: arguments of `jit` bring theirs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or any(size > 1 for name, size in mesh.shape.items() if name not in mesh.manual_axes)


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
        x = _compat.gather_vmapped(x, name)
    return x


def deal(rows: jax.Array, axis_name: AxisName) -> jax.Array:
    """Row r of everybody's `rows` to the worker r.

    Args:
      rows: `(workers, k)`: this worker's, a row for each server.
      axis_name: The workers.

    Returns:
      `(workers, here, k)`: from each worker, in order, its rows for the servers on this device. One device serves a row
      for each vmapped worker that it runs.
    """
    devices, vmapped = devices_and_vmapped(axis_name)
    here = stack_vmapped(rows, vmapped)  # (here, workers, k)
    if not devices:
        return here
    num_devices, num_here = _product(devices), _product(vmapped)
    by_device = _to_devices_first(here, 1, axis_name).reshape(num_here, num_devices, num_here, -1).swapaxes(0, 1)
    dealt = all_to_all(to_varying(by_device, devices), devices)
    return _to_order(dealt.reshape(num_devices * num_here, num_here, -1), axis_name)


def collect(rows: jax.Array, axis_name: AxisName) -> jax.Array:
    """The rows of all servers, in order, the same on every worker: `(here, k)` to `(workers, k)`."""
    devices, _ = devices_and_vmapped(axis_name)
    if not devices:
        return rows
    return _to_order(all_gather(to_varying(rows, devices), devices), axis_name)


def all_to_all(rows: jax.Array, devices: tuple[Hashable, ...]) -> jax.Array:
    """Row d of everybody's `rows` to device d; over device axes only."""
    return lax.all_to_all(rows, devices, split_axis=0, concat_axis=0, tiled=True)


def all_gather(rows: jax.Array, devices: tuple[Hashable, ...]) -> jax.Array:
    """Everybody's `rows`, one after another, over device axes only; typed as the same on each."""
    same = "invarying" if all(map(_is_tracked, devices)) else "varying"
    return lax.all_gather(rows, devices, axis=0, tiled=True, to=same)


def own_row(rows: jax.Array, axis_name: AxisName) -> jax.Array:
    """This worker's of the rows that its device serves: `(here, k)` to `(k,)`."""
    _, vmapped = devices_and_vmapped(axis_name)
    if not vmapped:
        return rows[0]
    return lax.dynamic_index_in_dim(rows, lax.axis_index(vmapped), keepdims=False)


def gather(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Everybody's `(k,)`, in order, as `(workers, k)`: what is computed from it is the same on every worker."""
    devices, vmapped = devices_and_vmapped(axis_name)
    return collect(stack_vmapped(to_varying(x, devices), vmapped), axis_name)


def gather_scalar(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Everybody's scalar, in order, as `(workers,)`."""
    return gather(x[None], axis_name)[:, 0]


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


def require_own(state: Any, new_state: Any, caller: str) -> None:
    """Refuse shared state that this step makes one worker's own, where types show it.

    JAX would ask for `check_vma=False`. Then every worker goes on with momentum of its own behind one array, and a
    checkpoint keeps that of the first.

    Raises:
      ValueError: If a leaf differs between workers, and did not before.
    """
    for (path, new), old in zip(jax.tree.leaves_with_path(new_state), jax.tree.leaves(state), strict=True):
        more = varying(new) - varying(old)
        if more:
            name = min(more, key=str)
            raise ValueError(
                f"`{caller}(...).update(state=...)` has to be given state of each worker's own, got state that is the same "
                f"on every worker of axis {name!r} at `state{jax.tree_util.keystr(path)}`, for updates that differ along it. "
                "Make the optimizer with `num_workers=...` (in a chain of your own: `signopt.workers.per_worker`) and pass "
                "its state by `signopt.workers.partition_specs`. Without checks of JAX, `check_vma=False`, a checkpoint "
                f"would keep one worker's. State that is made and used up in one `jax.shard_map`: `jax.lax.pcast(state, "
                f"{name!r}, to='varying')`."
            )


def _is_tracked(name: Hashable) -> bool:
    """Whether types show along `name` what varies: under `shard_map(check_vma=True)`, not elsewhere."""
    return name in varying(lax.axis_index(name))


def _bound_size(name, caller):
    try:
        return lax.axis_size(name)
    except NameError:
        bound = ", ".join(map(repr, _compat.bound_names())) or "none"
        raise ValueError(
            f"`{caller}` has to be called where axis {name!r} is bound, got an unbound name; bound here: {bound}. Run the "
            f"step with `signopt.workers.simulate` or `on_mesh`, `jax.vmap(..., axis_name={name!r})`, `jax.pmap` or "
            "`jax.shard_map`; in plain `jax.jit` run the optimizer with `signopt.workers.in_jit(tx, mesh, "
            f"axis_name={name!r})`; or pass `axis_name=None` for one worker."
        ) from None


def _product(names):
    return math.prod(lax.axis_size(name) for name in names)


def _to_devices_first(x, axis, axis_name):
    """Reorder an axis of workers so that those of one device come one after another."""
    devices, vmapped = devices_and_vmapped(axis_name)
    return _permuted(x, axis, names(axis_name), (*devices, *vmapped))


def _to_order(x, axis_name):
    """Reorder a leading axis of workers from devices first to the order of `axis_name`."""
    devices, vmapped = devices_and_vmapped(axis_name)
    return _permuted(x, 0, (*devices, *vmapped), names(axis_name))


def _permuted(x, axis, order, wanted):
    if order == wanted:
        return x
    sizes = tuple(lax.axis_size(name) for name in order)
    apart = x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])
    places = [axis + order.index(name) for name in wanted]
    after = range(axis + len(order), apart.ndim)
    return apart.transpose(*range(axis), *places, *after).reshape(x.shape)

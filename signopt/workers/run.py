"""Running a step: one function, written for one worker, on one device or on many.

A step takes `(state, batch)` and returns `(state, metrics)`. `simulate` runs it for all workers on one device,
`on_mesh` on a device each; the same gradients give the same updates on both, bit for bit.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import optax

from signopt import _axis
from signopt.workers import check as processes
from signopt.workers.gradient import check_batch
from signopt.workers.state import owners
from signopt.workers.state import partition_specs
from signopt.workers.sync import assert_in_sync

Step = Callable[[Any, Any], tuple[Any, Any]]


def simulate(
    step: Step,
    num_workers: int | tuple[int, ...],
    *,
    axis_name: _axis.AxisName,
    state_axis_name: _axis.AxisName = None,
) -> Step:
    """Run a step for all workers on one device.

    Args:
      step: `(state, batch) -> (state, metrics)` for one worker, which votes over `axis_name`.
      num_workers: The size of the axis; a tuple for nested axes.
      axis_name: Its name; a tuple of as many.
      state_axis_name: The axes of per-worker state, if not all of them: the vote's axis alone, when an inner axis
        averages.

    Returns:
      A jitted function from the state of all workers and the whole batch to the new state and the metrics of all
      workers, stacked along a leading axis. State inside a `PerWorkerState` belongs to one worker each; all other state
      is shared.

    Raises:
      ValueError: When called, if the batch cannot be split, or shared state would differ between workers.

    Examples:
      >>> import jax.numpy as jnp, optax, signopt
      >>> tx = signopt.signum(0.1, axis_name="worker", num_workers=4)
      >>> def step(state, batch):
      ...     params, opt_state = state
      ...     loss, grads = signopt.workers.value_and_grad(
      ...         lambda w: jnp.mean((batch - w) ** 2), axis_name="worker")(params)
      ...     updates, opt_state = tx.update(grads, opt_state, params)
      ...     return (optax.apply_updates(params, updates), opt_state), loss
      >>> run = signopt.workers.simulate(step, 4, axis_name="worker")
      >>> params = jnp.float32(0.0)
      >>> (params, _), losses = run((params, tx.init(params)), jnp.arange(8.0))
      >>> round(float(params), 6), losses.tolist()
      (0.1, [0.5, 6.5, 20.5, 42.5])
    """
    names = _axis.names(axis_name)
    sizes = num_workers if isinstance(num_workers, tuple) else (num_workers,)
    if len(names) != len(sizes) or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(
            f"`simulate(num_workers=...)` has to be a positive integer for each name in axis_name={axis_name!r}, got "
            f"{num_workers!r}."
        )
    of_state = names if state_axis_name is None else _axis.names(state_axis_name)
    if [name for name in names if name in of_state] != list(of_state):
        raise ValueError(
            f"`simulate(state_axis_name=...)` has to be names of axis_name={axis_name!r}, in their order, got "
            f"{state_axis_name!r}."
        )
    own_sizes = tuple(size for name, size in zip(names, sizes, strict=True) if name in of_state)

    workers, own_workers = math.prod(sizes), math.prod(own_sizes)

    @jax.jit
    def run(state, batch):
        flat, treedef = jax.tree.flatten_with_path(state)
        own = [owner != "shared" for owner in jax.tree.leaves(owners(state))]
        _check_num_workers(state, own_workers, "simulate")
        check_batch(batch, workers, "simulate")

        def one_worker(leaves, batch):
            new_state, metrics = step(jax.tree.unflatten(treedef, leaves), batch)
            return _leaves_like(treedef, new_state, "simulate"), metrics

        def all_workers(may_differ):
            mapped = one_worker
            for name in reversed(names):
                in_axes = [0 if mine and name in of_state else None for mine in own]
                out_axes = [0 if may else a for a, may in zip(in_axes, may_differ, strict=True)]
                mapped = jax.vmap(mapped, in_axes=(in_axes, 0), out_axes=(out_axes, 0), axis_name=name)
            return mapped

        leaves = [_unfold(x, own_sizes) if mine else x for (_, x), mine in zip(flat, own, strict=True)]
        batch = jax.tree.map(lambda x: _unfold(x, (*sizes, x.shape[0] // workers)), batch)
        nobody = [False] * len(flat)
        try:
            leaves, metrics = all_workers(nobody)(leaves, batch)
        except ValueError as error:
            if "out_axes is None" not in str(error):
                raise
            for i, (path, _) in enumerate(flat):  # JAX does not say which one differs: try them one by one
                try:
                    all_but_one = [j != i for j in range(len(flat))]
                    jax.eval_shape(all_workers(all_but_one), leaves, batch)
                except ValueError:
                    raise _differs(path, "simulate") from error
            raise
        leaves = [_fold(x, len(own_sizes)) if mine else x for x, mine in zip(leaves, own, strict=True)]
        return jax.tree.unflatten(treedef, leaves), jax.tree.map(lambda x: _fold(x, len(sizes)), metrics)

    return run


def on_mesh(
    step: Step,
    mesh: jax.sharding.Mesh,
    *,
    axis_name: _axis.AxisName,
    state_axis_name: _axis.AxisName = None,
    check_vma: bool = True,
    donate: bool = False,
) -> Step:
    """Run a step with one worker on each device of a mesh, on one host or many.

    Args:
      step: `(state, batch) -> (state, metrics)` for one worker, which votes over `axis_name`.
      mesh: Devices; `jax.make_mesh((8,), ("worker",), axis_types=(jax.sharding.AxisType.Auto,))` for eight. Axes of it that
        are not in `axis_name` stay automatic.
      axis_name: The axis of the workers, or a tuple of axes.
      state_axis_name: The axes of per-worker state, if not all of them: the vote's axis alone, when an inner axis
        averages.
      check_vma: Let JAX track which values differ between workers, which catches gradients that were reduced before the
        vote and shared state that is not the same everywhere.
      donate: Let the new state take the memory of the old one, which cannot be used afterwards.

    Returns:
      A jitted function from the state of all workers and the whole batch to the new state and the metrics of all
      workers, stacked along a leading axis. Arguments that are not on the mesh are put there first: batches and
      state inside a `PerWorkerState` split over the workers, all other state on every device. With several processes
      each has to be given the whole batch, or an array that lies on the mesh
      (`jax.make_array_from_process_local_data`). Its first call compares versions, shapes and dtypes, the compiled
      step, and shared state between the processes; inside of jit it does not.

    Raises:
      ValueError: If the mesh has no such axis; when called, if the batch cannot be split, or shared state would differ
        between workers; on every process, before the first step, if they were not given the same.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, signopt
      >>> tx = signopt.signsgd(0.1, axis_name="worker")
      >>> def step(params, batch):
      ...     loss, grads = signopt.workers.value_and_grad(
      ...         lambda w: jnp.mean((batch - w) ** 2), axis_name="worker")(params)
      ...     updates, _ = tx.update(grads, tx.init(params), params)
      ...     return optax.apply_updates(params, updates), loss
      >>> mesh = jax.make_mesh((1,), ("worker",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> run = signopt.workers.on_mesh(step, mesh, axis_name="worker")
      >>> params, losses = run(jnp.float32(0.0), jnp.arange(2.0))
      >>> round(float(params), 6), losses.tolist()
      (0.1, [0.5])
    """
    names = _axis.names(axis_name)
    of_state = names if state_axis_name is None else _axis.names(state_axis_name)
    for caller, group in (("axis_name", names), ("state_axis_name", of_state)):
        if not group or not set(group) <= set(mesh.axis_names):
            raise ValueError(
                f"`on_mesh({caller}=...)` has to name axes of the mesh, which has {mesh.axis_names}, got {group!r}."
            )
    workers = math.prod(mesh.shape[name] for name in names)
    own_workers = math.prod(mesh.shape[name] for name in of_state)
    of_batch = PartitionSpec(names)

    def body(state, batch):
        new_state, metrics = step(state, batch)
        leaves = _leaves_like(jax.tree.structure(state), new_state, "on_mesh")
        for (path, owner), x in zip(jax.tree.leaves_with_path(owners(state)), leaves, strict=True):
            allowed = set() if owner == "shared" else set(of_state)
            if (_axis.varying(x) & set(names)) - allowed:
                raise _differs(path, "on_mesh")
        return new_state, jax.tree.map(lambda x: jnp.asarray(x)[None], metrics)

    def all_workers(state, batch):
        specs = partition_specs(state, of_state)
        mapped = jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(specs, of_batch),
            out_specs=(specs, of_batch),
            axis_names=set(names),
            check_vma=check_vma,
        )
        return mapped(state, batch)

    compiled = jax.jit(all_workers, donate_argnums=(0,) if donate else ())

    explicit = jax.sharding.AxisType.Explicit in mesh.axis_types

    def put(x, spec):
        if isinstance(x, Tracer):  # inside jit the compiler lays out what types do not
            return jax.device_put(x, NamedSharding(mesh, spec)) if explicit else x
        at = getattr(x, "sharding", None)
        on_it = isinstance(at, NamedSharding) and at.mesh == mesh
        return x if on_it else processes.put(x, NamedSharding(mesh, spec))

    compared = len({device.process_index for device in mesh.devices.flat}) == 1

    @functools.wraps(step)
    def run(state, batch):
        nonlocal compared
        first = not (compared or any(isinstance(x, Tracer) for x in jax.tree.leaves((state, batch))))
        if first:  # before anything that may fail on one process only
            about = processes.describe(state=state, batch=batch) | processes.values(state=state)
            processes.compare(about, mesh, "on_mesh")
            if any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in jax.tree.leaves(state)):
                assert_in_sync(state)
        _check_num_workers(state, own_workers, "on_mesh")
        check_batch(batch, workers, "on_mesh")
        state = jax.tree.map(put, state, partition_specs(state, of_state))
        batch = jax.tree.map(lambda x: put(x, of_batch), batch)
        if first:
            program = processes.digest(compiled.lower(state, batch).as_text())
            processes.compare({"the compiled step (its code, wire and constants)": program}, mesh, "on_mesh")
            compared = True
        return compiled(state, batch)

    return run


def stacked(tx: optax.GradientTransformation, *, axis_name: _axis.AxisName) -> optax.GradientTransformationExtraArgs:
    """Vote in plain `jax.jit`, over gradients with a leading axis of workers.

    Under `jit` with sharded batches there is no worker's gradient, only the mean of all. `jax.vmap` over the batch, split
    by `split_batch` and sharded along its leading axis, has one; with `wire="psum"` in `tx` the compiler turns the sum of
    votes over that axis into an all-reduce of 8-bit integers (up to 127 workers), and parameters keep the shards of other
    axes of the mesh. The packed wires give the same numbers, but leave it to the compiler what travels.

    Args:
      tx: A chain that votes over `axis_name`, such as `signum(..., axis_name="worker", num_workers=8, wire="psum")`.
      axis_name: The name that `tx` knows the workers by; not that of an axis of a mesh.

    Returns:
      A transformation whose `update` takes updates, and what lies inside a `PerWorkerState`, with a leading axis of
      workers, and returns updates without it.

    Raises:
      ValueError: In `update`, if shared state would differ between workers: momentum needs `num_workers`.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> tx = signopt.workers.stacked(signopt.signsgd(0.5, axis_name="worker", wire="psum"), axis_name="worker")
      >>> params = jnp.zeros(2)
      >>> loss = lambda params, batch: jnp.mean((params - batch) ** 2)
      >>> batches = signopt.workers.split_batch(jnp.array([[3.0, -1.0], [-1.0, -1.0], [2.0, 4.0]]), 3)
      >>> losses, grads = jax.vmap(jax.value_and_grad(loss), (None, 0))(params, batches)
      >>> tx.update(grads, tx.init(params), params)[0].tolist()
      [0.5, -0.5]
    """
    tx = optax.with_extra_args_support(tx)
    names = _axis.names(axis_name)
    if len(names) != 1:
        raise ValueError(f"`stacked(axis_name=...)` has to be one name, got {axis_name!r}.")

    def update_fn(updates, state, params=None, **extra_args):
        leaves, treedef = jax.tree.flatten(state)
        axes = [None if owner == "shared" else 0 for owner in jax.tree.leaves(owners(state))]

        def one_worker(updates, leaves):
            updates, new_state = tx.update(updates, jax.tree.unflatten(treedef, leaves), params, **extra_args)
            return updates, _leaves_like(treedef, new_state, "stacked")

        vote = jax.vmap(one_worker, (0, axes), (None, axes), axis_name=names[0])
        try:
            updates, leaves = vote(updates, leaves)
        except ValueError as error:
            if "out_axes is None" not in str(error):
                raise
            raise ValueError(
                "`stacked(tx)` has to be given a chain that votes or averages over axis_name="
                f"{axis_name!r}, with per-worker state left of that, got one whose updates or shared state differ between "
                "workers. Make it with `num_workers=...`, or use `signopt.workers.per_worker` in a chain of your own."
            ) from error
        return updates, jax.tree.unflatten(treedef, leaves)

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def _unfold(x, sizes):
    return x.reshape(*sizes, *x.shape[1:])


def _fold(x, num_axes):
    return x.reshape(math.prod(x.shape[:num_axes]), *x.shape[num_axes:])


def _leaves_like(treedef, new_state, caller):
    leaves, new_treedef = jax.tree.flatten(new_state)
    if new_treedef != treedef:
        raise ValueError(
            f"`{caller}(step)` has to return a state of the structure that it is given, {treedef}, got {new_treedef}."
        )
    return leaves


def _check_num_workers(state, num_workers, caller):
    for (path, x), owner in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(owners(state)), strict=True):
        if owner != "shared" and (jnp.ndim(x) == 0 or x.shape[0] != num_workers):
            raise ValueError(
                f"`{caller}(...)` has to be given the state of all {num_workers} workers, got shape {jnp.shape(x)} at "
                f"`state{jax.tree_util.keystr(path)}`. Make it with `num_workers={num_workers}`, or carry it over with "
                f"`signopt.workers.resize(state, {num_workers})`."
            )


def _differs(path, caller):
    return ValueError(
        f"`{caller}(step)` has to return shared state that is the same on every worker, got a different one on each at "
        f"`state{jax.tree_util.keystr(path)}`. Vote or average before what changes it (statistics: `jax.lax.pmean`), or "
        "keep it per worker: `num_workers=...` in a ready optimizer, `signopt.workers.per_worker` in a chain of your own."
    )

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
from jax.sharding import Mesh
from jax.sharding import PartitionSpec

from signopt import _axis
from signopt import _compat
from signopt.workers import _hidden
from signopt.workers import _layout
from signopt.workers import check
from signopt.workers._shared import settled
from signopt.workers.gradient import check_batch
from signopt.workers.state import check_num_workers
from signopt.workers.state import owners
from signopt.workers.state import partition_specs

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
        check_num_workers(state, own_workers, "simulate")
        check_batch(batch, workers, "simulate")

        def one_worker(leaves, batch):
            return _leaves_and_metrics(step(jax.tree.unflatten(treedef, leaves), batch), treedef, "simulate")

        def all_workers(may_differ):
            mapped = one_worker
            for name, size in zip(reversed(names), reversed(sizes), strict=True):
                in_axes = [0 if mine and name in of_state else None for mine in own]
                out_axes = [0 if may else a for a, may in zip(in_axes, may_differ, strict=True)]
                mapped = jax.vmap(mapped, in_axes=(in_axes, 0), out_axes=(out_axes, 0), axis_name=name, axis_size=size)
            return mapped

        leaves = [_unfold(x, own_sizes) if mine else x for (_, x), mine in zip(flat, own, strict=True)]
        batch = jax.tree.map(lambda x: _unfold(x, (*sizes, x.shape[0] // workers)), batch)
        nobody = [False] * len(flat)
        try:
            leaves, metrics = all_workers(nobody)(leaves, batch)
        except ValueError as error:
            if not _compat.says_that_workers_differ(error):
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
    hidden: bool = False,
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
      hidden: On CPUs, run what is exchanged one step late (`delay=1`) while the gradient is computed, as a second program.
        The results are the same. It needs processes with one device each to save time, and a step outside of `jax.jit`.

    Returns:
      A jitted function from the state of all workers and the whole batch to the new state and the metrics of all
      workers, stacked along a leading axis. Arguments that are not on the mesh are put there first: batches and
      state inside a `PerWorkerState` split over the workers, all other state on every device. With several processes
      each has to be given the whole batch, or an array that lies on the mesh
      (`jax.make_array_from_process_local_data`). Its first call compares versions, shapes and dtypes, the compiled
      step, and shared state between the processes; inside of jit it does not.

    Raises:
      TypeError: If `mesh` is no mesh.
      ValueError: If the mesh has no such axis, or `hidden` cannot be on it; when called, if the batch cannot be split, if
        shared state would differ between workers, or if with `hidden` the exchange waits for the batch; on every process,
        before the first step, if they were not given the same.

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
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"`on_mesh(mesh=...)` has to be a mesh, got {mesh!r}. Make one: `jax.make_mesh((8,), ({axis_name!r},))`."
        )
    names = _axis.names(axis_name)
    of_state = names if state_axis_name is None else _axis.names(state_axis_name)
    for caller, group in (("axis_name", names), ("state_axis_name", of_state)):
        if not group or not set(group) <= set(mesh.axis_names):
            raise ValueError(
                f"`on_mesh({caller}=...)` has to name axes of the mesh, which has {mesh.axis_names}, got {group!r}."
            )
    if hidden:
        _hidden.check(mesh, names, donate)
        step = _hidden.flat(step)
    workers = math.prod(mesh.shape[name] for name in names)
    own_workers = math.prod(mesh.shape[name] for name in of_state)
    of_batch = PartitionSpec(names)

    def all_workers(state, batch):  # what it checks and looks up is done once for each structure, shape and dtype
        check_num_workers(state, own_workers, "on_mesh")
        check_batch(batch, workers, "on_mesh")
        named, treedef = jax.tree.flatten_with_path(owners(state))
        paths = [path for path, _ in named]
        refused = [set(names) - (set() if owner == "shared" else set(of_state)) for _, owner in named]
        specs = partition_specs(state, of_state)
        state = jax.tree.map(lambda x, spec: _layout.split_over(x, mesh, names, spec), state, specs)
        batch = jax.tree.map(lambda x: _layout.split_over(x, mesh, names, of_batch), batch)

        def differ(leaves):
            return [bool(_axis.varying(x) & axes) for x, axes in zip(leaves, refused, strict=False)]

        def run(step):
            def body(state, batch):
                leaves, metrics = _leaves_and_metrics(step(state, batch), treedef, "on_mesh")
                if any(differ(leaves)):
                    raise _DiffersError(paths[differ(leaves).index(True)])
                return jax.tree.unflatten(treedef, leaves), jax.tree.map(lambda x: jnp.asarray(x)[None], metrics)

            sides = (specs, of_batch)
            return jax.shard_map(
                body, mesh=mesh, in_specs=sides, out_specs=sides, axis_names=set(names), check_vma=check_vma
            )(state, batch)

        try:
            return run(step)
        except _DiffersError:
            pass
        try:
            return run(settled(step, differ))
        except _DiffersError as error:
            raise _differs(error.path, "on_mesh") from None

    compiled = jax.jit(all_workers, donate_argnums=(0,) if donate else ())
    execute = _hidden.hide(all_workers, mesh) if hidden else compiled
    compared = len({device.process_index for device in mesh.devices.flat}) == 1

    @functools.wraps(step)
    def run(state, batch):
        nonlocal compared
        of_state_now, of_batch_now = jax.tree.leaves(state), jax.tree.leaves(batch)
        if any(issubclass(t, Tracer) for t in {*map(type, of_state_now), *map(type, of_batch_now)}):
            if hidden:
                raise ValueError(
                    "`on_mesh(hidden=...)` has to be False inside of `jax.jit` or `jax.lax.scan`, got True: two programs "
                    "cannot be parts of one. Call the step outside."
                )
            return compiled(state, batch)
        if not compared:  # before anything that may fail on one process only
            check.compare_arguments(mesh, "on_mesh", state=state, batch=batch)
        if not _layout.lie_on(of_state_now, mesh):
            check_num_workers(state, own_workers, "on_mesh")
            state = _layout.place(state, mesh, partition_specs(state, of_state))
        if not _layout.lie_on(of_batch_now, mesh):
            check_batch(batch, workers, "on_mesh")
            batch = _layout.place(batch, mesh, of_batch)
        if not compared:
            check.compare_program(mesh, "on_mesh", compiled.lower(state, batch).as_text())
            compared = True
        return execute(state, batch)

    return run


class _DiffersError(Exception):
    """Shared state is typed as different on each worker."""

    def __init__(self, path):
        super().__init__(path)
        self.path = path


def _unfold(x, sizes):
    return x.reshape(*sizes, *x.shape[1:])


def _fold(x, num_axes):
    return x.reshape(math.prod(x.shape[:num_axes]), *x.shape[num_axes:])


def _leaves_and_metrics(found, treedef, caller):
    """The leaves of the new state, and the metrics, of what a step returned."""
    if not isinstance(found, tuple | list) or len(found) != 2 or jax.tree.structure(found) == treedef:
        what = "its state alone" if jax.tree.structure(found) == treedef else repr(type(found).__name__)
        raise ValueError(
            f"`{caller}(step)` has to return `(state, metrics)`, got {what}. Return `(state, None)` where there is nothing "
            "to report."
        )
    new_state, metrics = found
    leaves, new_treedef = jax.tree.flatten(new_state)
    if new_treedef != treedef:
        raise ValueError(
            f"`{caller}(step)` has to return a state of the structure that it is given, {treedef}, got {new_treedef}."
        )
    return leaves, metrics


def _differs(path, caller):
    return ValueError(
        f"`{caller}(step)` has to return shared state that is the same on every worker, got a different one on each at "
        f"`state{jax.tree_util.keystr(path)}`. Vote or average before what changes it (`axis_name=...` in a ready "
        "optimizer, `jax.lax.pmean` of statistics), or keep it per worker (`num_workers=...` in a ready optimizer, "
        "`signopt.workers.per_worker` in a chain of your own)."
    )

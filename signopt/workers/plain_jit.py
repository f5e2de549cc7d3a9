"""Borders in plain `jax.jit`, where most loops are: the workers are an axis of the gradients, and an axis of the mesh.

Under `jit` with sharded batches there is no worker's gradient, only the mean of all. `jax.vmap` over the batch, split by
`split_batch`, has one for each worker, along a leading axis. What a chain does with them has to be written for one worker:
left to itself, the compiler moves whole ballots about. So the chain runs in a `jax.shard_map` over the axis of the workers,
and over nothing else: the model, the loss, and the other axes of the mesh stay the compiler's.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax

from signopt import _axis
from signopt import _shards
from signopt.workers import _layout
from signopt.workers._shared import settled
from signopt.workers.shards import on_shards
from signopt.workers.state import check_num_workers
from signopt.workers.state import owners
from signopt.workers.state import partition_specs

_OWN = ("present", "value_fn")  # extra arguments whose arrays have a leading axis of workers


def in_jit(
    tx: optax.GradientTransformation, mesh: Mesh, *, axis_name: _axis.AxisName, specs: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Run an optimizer in plain `jax.jit`, on gradients with a leading axis of workers.

    All links of the chain run for one worker, on whole arrays. Parameters may be sharded over other axes of the mesh, by
    hand or by the compiler, and stay so.

    Args:
      tx: A chain with a border over `axis_name`, such as `signum(..., axis_name="worker", num_workers=8)`.
      mesh: Devices, with Auto or Explicit axes; the same that parameters and batches lie on.
      axis_name: The axis of the workers, or a tuple of axes: those that the batch is sharded over.
      specs: How parameters are sharded over other axes of the mesh, as for `on_shards`, so that each device sends its own
        shard. If None, the compiler gathers packed leaves over these axes, which gives the same updates.

    Returns:
      A transformation. `init` puts per-worker state on the devices of its workers, sharded like the parameters if these
      lie on the mesh. `update` takes updates, and what lies inside a `PerWorkerState`, with a leading axis of workers,
      and returns updates without it. `present` is one boolean, or one for each worker. A `value_fn` that needs a worker's
      own batch is a `jax.tree_util.Partial` of arrays with a leading axis of workers. All other extra arguments are
      shared.

    Raises:
      TypeError: If `specs` holds something else than specs.
      ValueError: If the mesh has no such axis; in `update`, if the updates are not those of all workers, or shared state
        would differ between workers: momentum needs `num_workers`.

    Examples:
      >>> import jax, jax.numpy as jnp, signopt
      >>> mesh = jax.make_mesh((1,), ("worker",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> tx = signopt.workers.in_jit(signopt.signsgd(0.5, axis_name="worker"), mesh, axis_name="worker")
      >>> params = jnp.zeros(2)
      >>> loss = lambda params, batch: jnp.mean((params - batch) ** 2)
      >>> batches = signopt.workers.split_batch(jnp.array([[3.0, -1.0], [1.0, -1.0]]), 1)
      >>> losses, grads = jax.vmap(jax.value_and_grad(loss), (None, 0))(params, batches)
      >>> jax.jit(tx.update)(grads, tx.init(params), params)[0].tolist()
      [0.5, -0.5]
    """
    names = _axis.names(axis_name)
    if not names or not set(names) <= set(mesh.axis_names):
        raise ValueError(
            f"`in_jit(axis_name=...)` has to name axes of the mesh, which has {mesh.axis_names}, got {axis_name!r}."
        )
    workers = math.prod(mesh.shape[name] for name in names)
    of_worker, shared = PartitionSpec(names), PartitionSpec()
    declared = None if specs is None else _shards.read(specs, "in_jit")
    tx = optax.with_extra_args_support(tx if specs is None else on_shards(tx, specs))

    def init_fn(params):
        return _init(tx.init, params, declared, mesh, names)

    def update_fn(updates, state, params=None, **extra_args):
        _check_updates(updates, params, workers)
        check_num_workers(state, workers, "in_jit")
        given = {name: jax.tree.flatten(extra) for name, extra in extra_args.items()}
        arrays = {name: [x for x in leaves if _is_array(x)] for name, (leaves, _) in given.items()}
        own = {name: [name in _OWN and jnp.ndim(x) > 0 for x in found] for name, found in arrays.items()}
        _check_extra(arrays, own, workers)

        def one_worker(updates, state, params, arrays):
            extra = {}
            for name, (leaves, treedef) in given.items():
                pairs = zip(arrays[name], own[name], strict=True)
                here = iter([jnp.squeeze(x, 0) if mine else x for x, mine in pairs])
                extra[name] = jax.tree.unflatten(treedef, [next(here) if _is_array(x) else x for x in leaves])
            return tx.update(jax.tree.map(lambda x: jnp.squeeze(x, 0), updates), state, params, **extra)

        of_state = partition_specs(state, names)
        in_specs = (
            jax.tree.map(lambda _: of_worker, updates),
            of_state,
            jax.tree.map(lambda _: shared, params),
            jax.tree.map(lambda mine: of_worker if mine else shared, own),
        )
        args = (updates, state, params, arrays)
        args = jax.tree.map(lambda x, spec: _layout.split_over(x, mesh, names, spec), args, in_specs)
        return _run(one_worker, args, mesh, names, in_specs)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _DiffersError(Exception):
    """Updates or shared state are typed as different on each worker."""


def _run(one_worker: Callable, args: tuple, mesh: Mesh, names: tuple, in_specs: tuple) -> tuple[Any, Any]:
    """Run the chain on every worker; once more, without casts, if types say that frozen values differ."""
    updates, state, params, _ = args
    out_specs = (PartitionSpec(), in_specs[1])
    own = [owner != "shared" for owner in jax.tree.leaves(owners(state))]

    def differ(leaves):
        of_updates = [False] * (len(leaves) - len(own))
        return [
            not mine and bool(_axis.varying(x) & set(names)) for x, mine in zip(leaves, of_updates + own, strict=True)
        ]

    def run(update):
        def body(*args):
            found = update(*args)
            if any(differ(jax.tree.leaves(found))):
                raise _DiffersError
            return found

        auto, on = _layout.left_to_the_compiler(mesh, of_results)
        mapped = jax.shard_map(body, mesh=on, in_specs=in_specs, out_specs=out_specs, axis_names=set(names))
        return jax.jit(auto(mapped))(*args)  # outside of jit it would compile every operation by itself

    # Updates are to be added to the parameters, so they are split alike. Gradients may be another tree (`optax.lookahead`).
    same = params is None or jax.tree.structure(params) == jax.tree.structure(updates)
    of_updates = jax.tree.map(lambda x: PartitionSpec(*_layout.spec_of(x)[1:]), updates)
    of_updates = of_updates if same else jax.tree.map(_layout.spec_of, params)
    of_results = of_updates, jax.tree.map(_layout.spec_of, state)

    try:
        return run(one_worker)
    except _DiffersError:
        pass
    try:
        return run(settled(one_worker, differ))
    except _DiffersError:
        raise ValueError(
            f"`in_jit(tx)` has to be given a chain with a border over axis_name={names!r}, and per-worker state left of "
            "that, got one whose updates or shared state differ between workers. Pass `axis_name=...` and `num_workers=...` to a "
            "ready optimizer; in a chain of your own use a border such as `signopt.mean`, and `signopt.workers.per_worker`."
        ) from None


def _init(init: Callable, params: Any, declared: _shards.Declared | None, mesh: Mesh, names: tuple) -> Any:
    """State that lies where its workers are, cut like the parameters."""
    named = jax.tree.leaves_with_path(params)
    if not named or not all(isinstance(x, jax.Array) for _, x in named):
        return init(params)
    of_params = [(path, jnp.shape(x), _spec_of_param(path, x, declared, mesh)) for path, x in named]

    def spec_of(path, x, owner):
        front = () if owner == "shared" else (names,)
        shape = jnp.shape(x)[len(front) :]
        like = (spec for place, of, spec in of_params if path[len(path) - len(place) :] == place and of == shape)
        return PartitionSpec(*front, *next(like, ()))

    shapes = jax.eval_shape(init, params)
    check_num_workers(shapes, math.prod(mesh.shape[name] for name in names), "in_jit")
    specs = jax.tree.map_with_path(spec_of, shapes, owners(shapes))
    specs = jax.tree.map(lambda x, spec: _as_jax_writes_it(spec, x.ndim, mesh), shapes, specs)
    if any(isinstance(x, Tracer) for _, x in named):
        return jax.tree.map(lambda x, spec: _constrained(x, spec, mesh, names, declared), init(params), specs)
    if _layout.lie_on((x for _, x in named), mesh):
        return jax.jit(init, out_shardings=jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))(params)
    return _layout.place(init(params), mesh, specs)


def _as_jax_writes_it(spec, rank, mesh):
    """The same spec as results have, so that the second step finds the program of the first."""
    entries = (*spec, *(None,) * (rank - len(spec)))
    while entries and entries[-1] is None and AxisType.Explicit not in mesh.axis_types:
        entries = entries[:-1]
    return PartitionSpec(*entries)


def _spec_of_param(path, x, declared, mesh):
    if declared is not None:
        return _shards.spec_at(declared, path) or PartitionSpec()
    return x.sharding.spec if not isinstance(x, Tracer) and _layout.lie_on([x], mesh) else PartitionSpec()


def _constrained(x, spec, mesh, names, declared):
    """Split a traced state over the workers; over other axes it lies as declared, or as the compiler finds best."""
    if not spec or _axis.names(spec[0]) != names:
        return x
    if _layout.is_explicit(mesh, names):
        return _layout.split_over(x, mesh, names, PartitionSpec(names))
    rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1) if declared is None else spec[1:]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(names, *rest)))


def _is_array(x):
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _check_updates(updates, params, workers):
    cure = (
        "Take the gradients with `jax.vmap(jax.value_and_grad(loss), (None, 0))(params, "
        f"signopt.workers.split_batch(batch, {workers}))`."
    )
    for path, x in jax.tree.leaves_with_path(updates):
        if jnp.ndim(x) == 0 or jnp.shape(x)[0] != workers:
            raise ValueError(
                f"`in_jit(...).update(updates=...)` has to have a leading axis of {workers} workers, got shape "
                f"{jnp.shape(x)} at `updates{jax.tree_util.keystr(path)}`. {cure}"
            )
    of_params = dict(jax.tree.leaves_with_path(params))
    for path, x in jax.tree.leaves_with_path(updates):
        if path in of_params and jnp.shape(x)[1:] != jnp.shape(of_params[path]):
            raise ValueError(
                f"`in_jit(...).update(updates=...)` has to have a leading axis of {workers} workers before the shape of the "
                f"parameter, {jnp.shape(of_params[path])}, got {jnp.shape(x)} at `updates{jax.tree_util.keystr(path)}`. "
                f"{cure}"
            )


def _check_extra(arrays, own, workers):
    for name, found in arrays.items():
        for x, mine in zip(found, own[name], strict=True):
            if mine and jnp.shape(x)[0] != workers:
                raise ValueError(
                    f"`in_jit(...).update({name}=...)` has to hold arrays with a leading axis of {workers} workers, got "
                    f"shape {jnp.shape(x)}. Split a batch with `signopt.workers.split_batch(batch, {workers})`."
                )

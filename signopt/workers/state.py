"""State that differs between workers, kept so that nothing of it is lost.

What lies left of the vote (momentum, residuals) belongs to one worker. `per_worker` gives such state a leading worker
axis, so that a checkpoint holds all of it, a mesh shards it, and its type says whose it is.
"""

from typing import Any, NamedTuple

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax

from signopt import _axis
from signopt import _boxes
from signopt import _check


class PerWorkerState(NamedTuple):
    """The states of all workers; inside a step, of one.

    Attributes:
      per_worker: The state of the wrapped transformation, every leaf with a leading axis of size `num_workers`. Inside
        a step a worker sees its own part: `(1, *shape)` under `shard_map`, `shape` under `vmap` and `pmap`.
      worker: 0 ... num_workers - 1, int32; inside a step one of them. Its rank tells which of the two views it is.
    """

    per_worker: optax.OptState
    worker: jax.Array


def per_worker(
    tx: optax.GradientTransformation, num_workers: int, *, axis_name: _axis.AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Give every worker a state of its own: what belongs left of the vote goes in here.

    `partition_specs` tells where such state lies, `resize` carries it over to another number of workers, and
    `signopt.workers.simulate` and `on_mesh` hand it out. By hand: `in_specs=partition_specs(state, axis_name)` under
    `shard_map`, `in_axes=0` for it under `vmap`.

    Flax keeps the names of a parameter's axes in a box around it (`nn.with_partitioning`, `nn.with_logical_partitioning`,
    nnx's `out_sharding=`), and optax keeps the boxes in its state. Their names get `axis_name` in front, so that Flax's
    `get_partition_spec` puts each worker's state on its own devices. Where names are logical ones, so is this: with
    `axis_name="data"`, add `("data", "data")` to the rules. `tx` sees its own state, without that axis and its name.

    Args:
      tx: A transformation without communication, such as `scale_by_signum()`.
      num_workers: M, the size of the axis that the vote runs over.
      axis_name: That axis. Its size is checked against `num_workers`, and Flax's boxes are told its name; with None
        neither is, and Flax puts the state of all workers on every device.

    Returns:
      A transformation with a `PerWorkerState`.

    Raises:
      ValueError: If `num_workers` is not positive; in `update`, if it differs from the size of the axis, if the states
        of several workers arrive at once, if the updates were reduced over the workers before, or if they differ along
        another axis than the state does.
      TypeError: If `num_workers` is no integer, as inside `optax.inject_hyperparams`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from signopt.workers.state import per_worker
      >>> tx = per_worker(optax.trace(0.5), num_workers=2)
      >>> state = tx.init(jnp.zeros(3))
      >>> state.per_worker.trace.shape, state.worker.tolist()
      ((2, 3), [0, 1])
      >>> grads = jnp.array([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])  # a row for each worker
      >>> updates, state = jax.vmap(tx.update)(grads, state)
      >>> updates, state = jax.vmap(tx.update)(grads, state)
      >>> state.per_worker.trace.tolist()
      [[1.5, 1.5, 1.5], [3.0, 3.0, 3.0]]
    """
    tx = optax.with_extra_args_support(tx)
    _check.count(num_workers, "per_worker", "num_workers")

    def init_fn(params):
        state = tx.init(params)
        stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_workers, *jnp.shape(x))), state)
        return PerWorkerState(_boxes.add_axis(stacked, axis_name), jnp.arange(num_workers, dtype=jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        if axis_name is not None:
            require_size(num_workers, axis_name, "per_worker")
        _axis.require_varying(updates, tuple(_axis.varying(state.worker)), "per_worker")
        in_front = jnp.ndim(state.worker) == 1
        if in_front and state.worker.shape != (1,):
            raise ValueError(
                "`per_worker(...).update(state=...)` has to be given the state of one worker, got those of "
                f"{state.worker.shape[0]} at once. Run the step with `signopt.workers.simulate` or `on_mesh`, or split "
                "the state along the worker axis: `in_specs=signopt.workers.partition_specs(state, axis_name)` under "
                "`jax.shard_map`, `in_axes=0` under `jax.vmap` and `jax.pmap`. If it was made for another number of "
                f"workers, carry it over first: `signopt.workers.resize(state, {num_workers})`."
            )
        own = jax.tree.map(lambda x: x[0], state.per_worker) if in_front else state.per_worker
        own = _boxes.remove_axis(own, axis_name, "per_worker")
        updates, new_state = tx.update(updates, own, params, **extra_args)
        _axis.require_own(own, new_state, "per_worker")
        if in_front:
            new_state = jax.tree.map(lambda x: x[None], new_state)
        return updates, PerWorkerState(_boxes.add_axis(new_state, axis_name), state.worker)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def require_size(num_workers: int, axis_name: _axis.AxisName, caller: str) -> None:
    """Raise a `ValueError` if `axis_name` does not have `num_workers` workers."""
    size = _axis.size(axis_name, caller)
    if size != num_workers:
        raise ValueError(
            f"`{caller}(num_workers=...)` has to be the size of axis {axis_name!r}, which is {size}, got {num_workers}. "
            "To go on with a state of another number of workers, use `signopt.workers.resize(state, num_workers)`."
        )


def check_num_workers(state: Any, num_workers: int, caller: str) -> None:
    """Raise a `ValueError` if per-worker state is not that of so many workers."""
    for (path, x), owner in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(owners(state)), strict=True):
        if owner != "shared" and (jnp.ndim(x) == 0 or jnp.shape(x)[0] != num_workers):
            raise ValueError(
                f"`{caller}(...)` has to be given the state of all {num_workers} workers, got shape {jnp.shape(x)} at "
                f"`state{jax.tree_util.keystr(path)}`. Make it with `num_workers={num_workers}`, or carry it over with "
                f"`signopt.workers.resize(state, {num_workers})`."
            )


def owners(state: Any) -> Any:
    """Whose each leaf of a state is.

    A `PerWorkerState` is known by its type. `flax.nnx` flattens it to a mapping of its names; there it is known by the
    type of nnx's own variables of optimizers, so that a mapping of a user's with the same names is not taken for it.

    Args:
      state: Any tree; a `PerWorkerState` in it may also have been flattened to names, as `flax.nnx.state` does.

    Returns:
      A tree like `state` of strings: "worker" for the number of a worker, "per_worker" for what else is its own, and
      "shared".

    Raises:
      ValueError: If something else has the names, shapes and dtypes of a `PerWorkerState`: nobody can tell what it is.
    """
    names = PerWorkerState._fields
    nodes = jax.tree.leaves_with_path(state, is_leaf=lambda x: isinstance(x, PerWorkerState) or _boxes.is_variable(x))
    places = {path for path, node in nodes if isinstance(node, PerWorkerState)}
    named = {}  # the nodes below a name, for both names, in every place that has them
    for path, node in nodes:
        for i, key in enumerate(path):
            if _name(key) in names:
                named.setdefault(path[:i], {}).setdefault(_name(key), []).append(node)
    for place, found in named.items():
        if len(found) == len(names) and _is_flattened(found, place):
            places.add(place)

    def owner(path, _):
        inside = (_name(key) for i, key in enumerate(path) if path[:i] in places and _name(key) in names)
        return next(inside, "shared")

    return jax.tree.map_with_path(owner, state)


def partition_specs(state: Any, axis_name: _axis.AxisName) -> Any:
    """Where each leaf of a state lies on a mesh: the `in_specs` and `out_specs` of `jax.shard_map`.

    Args:
      state: The state of an optimizer, or a whole training state that holds one.
      axis_name: The axis of the workers.

    Returns:
      A tree like `state` of `PartitionSpec(axis_name)` inside every `PerWorkerState` and `PartitionSpec()` elsewhere.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from signopt.workers.state import partition_specs, per_worker
      >>> tx = optax.chain(per_worker(optax.trace(0.9), 8), optax.scale_by_schedule(lambda step: 1.0))
      >>> momentum, schedule = partition_specs(tx.init(jnp.zeros(3)), "worker")
      >>> momentum.per_worker.trace == jax.P("worker"), schedule.count == jax.P()
      (True, True)
    """
    own, shared = PartitionSpec(axis_name), PartitionSpec()
    return jax.tree.map(lambda owner: shared if owner == "shared" else own, owners(state))


def resize(state: Any, num_workers: int) -> Any:
    """Carry a state over to another number of workers.

    Every new worker starts from the *mean* of the old workers' momentum and residuals, so their mean over workers, which
    is what the iterates of such methods depend on, is kept. Counters go on from their largest value. What servers remember
    about their rows keeps every value; the rows are cut anew. Of ballots that wait for the next step, the majority's waits.

    An optimizer knows its `num_workers`, so one for the new number has to take over. A Flax `TrainState` and an
    `nnx.Optimizer` hold theirs, which has to change along::

      state = resize(state, 6).replace(tx=make_optimizer(num_workers=6))  # flax.training.train_state.TrainState
      optimizer = resize(optimizer, 6)                                    # flax.nnx.Optimizer
      optimizer.tx = make_optimizer(num_workers=6)

    Args:
      state: The state of an optimizer, or a training state that holds one, of all workers.
      num_workers: The new number of workers.

    Returns:
      The same tree with `num_workers` workers inside every `PerWorkerState`. Nothing else changes.

    Raises:
      ValueError: If `num_workers` is not positive.
      TypeError: If `num_workers` is no integer, or a worker's state holds something that has neither a mean nor a largest value, such as a random key.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from signopt.workers.state import PerWorkerState, resize
      >>> state = PerWorkerState(jnp.array([[1.0], [3.0]]), jnp.arange(2))
      >>> resize(state, 3)
      PerWorkerState(per_worker=Array([[2.],
             [2.],
             [2.]], dtype=float32), worker=Array([0, 1, 2], dtype=int32))
    """
    _check.count(num_workers, "resize", "num_workers")
    entries = _entries_served(state)

    def leaf(path, owner, x):
        if owner == "shared" or x.shape[0] == num_workers:
            return x
        if owner == "worker":
            return jnp.arange(num_workers, dtype=x.dtype)
        names = tuple(map(_name, path))
        served = next((entries[names[:i]] for i in range(len(names)) if names[:i] in entries), None)
        if served is not None and x.shape == (x.shape[0], -(-served // x.shape[0])) and names[-1] != "entries":
            row = -(-served // num_workers)
            flat = jnp.ravel(x)[:served]
            return jnp.pad(flat, (0, num_workers * row - served)).reshape(num_workers, row)
        if "held" in names and jnp.issubdtype(x.dtype, jnp.integer):
            one = jnp.sign(jnp.sum(x, axis=0, dtype=jnp.int32)).astype(x.dtype)
            return jnp.broadcast_to(one, (num_workers, *one.shape))
        if jnp.issubdtype(x.dtype, jnp.inexact):
            one = jnp.mean(x, axis=0, dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)
        elif jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool:
            one = jnp.max(x, axis=0)
        else:
            raise TypeError(
                f"`resize(state=...)` can carry over numbers, got {x.dtype} at `state{jax.tree_util.keystr(path)}`. "
                "Set it anew, for example with `optax.tree.set`."
            )
        return jnp.broadcast_to(one, (num_workers, *one.shape))

    return jax.tree.map_with_path(leaf, owners(state), state)


def is_served(path: tuple) -> bool:
    """Whether a leaf says how many entries the servers of a border share: they remember something."""
    return tuple(map(_name, path[-2:])) == ("server", "entries")


def _entries_served(state: Any) -> dict[tuple, int]:
    """How many entries the servers of a border share, by the place of what they remember."""
    found = {}
    for path, x in jax.tree.leaves_with_path(state):
        if is_served(path):
            if not isinstance(x, jax.Array | np.ndarray) or isinstance(x, Tracer):
                raise TypeError(
                    f"`resize(state=...)` has to be given values where servers remember, got {x} at "
                    f"`state{jax.tree_util.keystr(path)}`. Restore the state of the old workers first, outside of `jax.jit`."
                )
            found[tuple(map(_name, path[:-1]))] = int(np.asarray(x).reshape(-1)[0])
    return found


def _is_flattened(found, place):
    """Whether nodes with the names of a `PerWorkerState` are one that nnx has flattened; raise if they may be one."""
    worker, *others = found["worker"]
    if any(of.__name__ == "OptState" for of in type(worker).__mro__):
        return True
    shapes = [jnp.shape(x) for x in jax.tree.leaves(found["per_worker"]) if hasattr(x, "shape")]
    is_number = getattr(worker, "dtype", None) == jnp.int32 and jnp.ndim(worker) == 1
    if is_number and not others and shapes and all(shape[:1] == worker.shape for shape in shapes):
        raise ValueError(
            "`state` has to keep what belongs to one worker in a `signopt.workers.PerWorkerState`, got something with its "
            f"names, shapes and dtypes at `state{jax.tree_util.keystr(place)}`. If it is one, as a checkpoint that was "
            "restored without a target has it, write `PerWorkerState(**that)`; else give one of the two another name."
        )
    return False


def _name(key):
    return getattr(key, "name", getattr(key, "key", None))

"""Shards: how the leaves that reach a border are cut over axes of the mesh that the compiler lays out.

A border inside a `jax.shard_map` over the workers alone sees whole arrays. To pack them, the compiler gathers them over the
other axes. So whoever knows the shards declares them here, and a border runs once more inside a `jax.shard_map` over those
axes: each device packs, counts and unpacks its own shard. Whatever stands left and right of the border sees whole arrays.
"""

from collections.abc import Callable
import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax

from signopt import _axis

Declared = tuple[tuple[tuple[str, ...], PartitionSpec], ...]  # a path in a tree, and the spec of all leaves below it

# JAX's jit caches look at it: a function traced for other shards is traced anew.
_declared = jax.make_user_context(default_value=())


def read(specs: Any, caller: str) -> Declared:
    """Write down a tree of specs, so that it can be compared and looked up by path.

    Raises:
      TypeError: If it holds something else.
    """
    leaves = jax.tree.leaves_with_path(specs, is_leaf=lambda x: x is None)
    odd = [x for _, x in leaves if not isinstance(x, PartitionSpec)]
    if odd:
        raise TypeError(
            f"`{caller}(specs=...)` has to be `jax.sharding.PartitionSpec`, or a tree of them, got {odd[0]!r}."
        )
    return tuple((_names(path), spec) for path, spec in leaves)


def spec_at(declared: Declared, path: tuple) -> PartitionSpec | None:
    """The spec of a leaf; None if nothing is declared about it."""
    here = _names(path)
    return next((spec for place, spec in declared if here[: len(place)] == place), None)


def check_covers(declared: Declared, tree: Any, caller: str) -> None:
    """Raise a `ValueError` if a leaf of a tree has no spec."""
    for path, _ in jax.tree.leaves_with_path(tree):
        if spec_at(declared, path) is None:
            raise ValueError(
                f"`{caller}(specs=...)` has to hold a spec for every leaf of the updates, got none for "
                f"`updates{jax.tree_util.keystr(path)}`. For a leaf without shards it is `jax.P()`."
            )


def declare(declared: Declared) -> contextlib.AbstractContextManager:
    """While this is entered, borders run on the shards."""
    return _declared(declared)


def cut(update_fn: Callable) -> Callable:
    """Run the update of a border on the shards that are declared, or that Explicit types show, if any are.

    Every entry has to be agreed on by itself, and state is a few numbers that are the same on every shard.
    """

    @functools.wraps(update_fn)
    def on_shards(updates, state, params=None, **extra_args):
        mesh = jax.sharding.get_abstract_mesh()
        specs = _specs(updates, _declared.value, mesh)
        names = {name for spec in jax.tree.leaves(specs) for entry in spec for name in _axis.names(entry)}
        if not names:
            return update_fn(updates, state, params, **extra_args)
        if mesh.empty:  # Explicit types know their mesh
            mesh = next(jax.typeof(x).sharding.mesh for x in jax.tree.leaves(updates))
        _check_mesh(names, mesh)
        extra, treedef = jax.tree.flatten(extra_args)
        arrays = {i: x for i, x in enumerate(extra) if isinstance(x, jax.Array | np.ndarray)}  # others are functions
        given = (updates, state, arrays)
        whole = PartitionSpec()

        def local(updates, state, arrays):
            here = [arrays.get(i, x) for i, x in enumerate(extra)]
            return update_fn(updates, state, None, **jax.tree.unflatten(treedef, here))

        # Types cannot say that a leaf without shards is still the same on all of them once it has shared a buffer with
        # one that has. So they are left out inside, and taken from the same update as it would be without shards.
        with declare(()):
            types = jax.eval_shape(lambda: local(_like(updates), *given[1:]))
            found = jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(specs, whole, whole),
                out_specs=(specs, whole),
                axis_names=names,
                check_vma=False,
            )(*given)
        return jax.tree.map(lambda x, t: _axis.to_varying(x, tuple(_axis.varying(t))), found, types)

    return on_shards


def _specs(updates, declared, mesh):
    """How each leaf is cut: as declared, or as its type says where axes are Explicit."""
    if declared and mesh.manual_axes:  # under vmap nothing is sharded
        return jax.tree.map_with_path(lambda path, _: spec_at(declared, path) or PartitionSpec(), updates)
    return jax.tree.map(lambda x: getattr(getattr(jax.typeof(x), "sharding", None), "spec", PartitionSpec()), updates)


def _names(path):
    return tuple(str(key) for key in path)


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


def _like(tree: optax.Updates) -> optax.Updates:
    """Zeros of the same shapes, dtypes and varying axes, without shards."""
    return jax.tree.map(lambda x: _axis.to_varying(jnp.zeros(x.shape, x.dtype), tuple(_axis.varying(x))), tree)

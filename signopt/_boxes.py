"""Flax's boxes: leaves that carry the names of their axes beside an array.

linen's `Partitioned` and `LogicallyPartitioned` and the variables of nnx are boxes. Flax lays out an array by the names on
its box. So a transformation that gives an array another axis has to give the box another name, as Flax's own `vmap` and
`scan` do. A box is known by its methods: nothing here imports Flax.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from signopt import _axis

# What nnx keeps names in: the variable's own, and what its optimizer's state is to have instead of them.
_SHARDINGS = ("out_sharding", "optimizer_sharding")


def is_box(x: Any) -> bool:
    """Whether `x` is one of Flax's boxes."""
    return hasattr(x, "add_axis") and hasattr(x, "remove_axis")


def is_variable(x: Any) -> bool:
    """Whether `x` is a box of nnx."""
    return is_box(x) and hasattr(x, "get_metadata")


def add_axis(tree: Any, axis_name: _axis.AxisName) -> Any:
    """Name the new leading axis of every box in a tree; boxes without names stay without."""
    name = _entry(axis_name)

    def add(x):
        if not is_box(x):
            return x
        if not is_variable(x):
            return x.add_axis(0, {"partition_name": name})
        x = x.copy(**{key: _insert(found, name) for key, found in _shardings(x).items()})
        x.add_axis(0, name)
        return x

    return jax.tree.map(add, tree, is_leaf=is_box)


def remove_axis(tree: Any, axis_name: _axis.AxisName, caller: str) -> Any:
    """Take the name of the leading axis off every box again.

    Raises:
      ValueError: If a box has another name there.
    """
    name = _entry(axis_name)

    def remove(path, x):
        if not is_box(x):
            return x
        try:
            if not is_variable(x):
                return x.remove_axis(0, {"partition_name": name})
            x = x.copy(**{key: _drop(found, name) for key, found in _shardings(x).items()})
        except AssertionError:
            told = _shardings(x) if is_variable(x) else getattr(x, "names", type(x).__name__)
            raise ValueError(
                f"`{caller}(...).update(state=...)` has to be given Flax's boxes with {name!r} as the name of their first "
                f"axis, got {told} at `state{jax.tree_util.keystr(path)}`. Make the state with `tx.init`, and put values into "
                "its boxes as they are."
            ) from None
        x.remove_axis(0, name)
        return x

    return jax.tree.map_with_path(remove, tree, is_leaf=is_box)


def _entry(axis_name):
    """What stands for some axes in a `PartitionSpec`."""
    names = _axis.names(axis_name)
    return names[0] if len(names) == 1 else names or None


def _shardings(x):
    found = x.get_metadata()
    return {key: found[key] for key in _SHARDINGS if found.get(key)}


def _insert(sharding, name):
    return _with_names(sharding, (name, *_names(sharding)))


def _drop(sharding, name):
    first, *rest = _names(sharding)
    assert first == name
    return _with_names(sharding, rest)


def _names(sharding):
    return tuple(sharding.spec if isinstance(sharding, NamedSharding) else sharding)


def _with_names(sharding, names):
    """A sharding of the same type, over other names."""
    if isinstance(sharding, NamedSharding):
        return sharding.update(spec=_with_names(sharding.spec, names))
    if isinstance(sharding, PartitionSpec):
        return sharding.update(partitions=tuple(names))
    return type(sharding)(names)

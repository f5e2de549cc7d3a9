"""Where arrays lie: put on a mesh from wherever they come, and split over the workers where types say how they are split."""

from collections.abc import Callable, Iterable
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

from signopt import _axis
from signopt.workers.state import check_num_workers
from signopt.workers.state import owners


def place(tree: Any, mesh: Mesh, specs: Any) -> Any:
    """Put a tree on a mesh. Leaves that lie on it already stay as they are.

    `on_mesh` does so by itself. In a loop of your own it puts the state and each batch where they belong.

    Args:
      tree: Arrays that every process has whole, or that lie on the mesh.
      mesh: Devices, of one process or of many.
      specs: `jax.sharding.PartitionSpec` for all leaves, or a tree of them, such as
        `partition_specs(state, axis_name)`, which may end above the leaves.

    Returns:
      The tree on the mesh. Between processes nothing travels.

    Raises:
      ValueError: If per-worker state is that of another number of workers than `specs` split it over.

    Examples:
      >>> import jax, numpy as np
      >>> from signopt.workers import place
      >>> mesh = jax.make_mesh((1,), ("worker",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> batch = place({"x": np.ones((2, 3))}, mesh, jax.P("worker"))
      >>> batch["x"].sharding.spec == jax.P("worker")
      True
    """

    def put(spec, part):
        return jax.tree.map(lambda x: x if lie_on([x], mesh) else _put(x, NamedSharding(mesh, spec)), part)

    try:
        return jax.tree.map(put, specs, tree, is_leaf=lambda x: isinstance(x, PartitionSpec))
    except ValueError:  # JAX says that some axis cannot be split, and not what to do
        of_leaves = jax.tree.broadcast(specs, tree, is_leaf=lambda x: isinstance(x, PartitionSpec))
        split = zip(jax.tree.leaves(of_leaves), jax.tree.leaves(owners(tree)), strict=True)
        names = next((_axis.names(spec[0]) for spec, owner in split if owner != "shared" and len(spec)), ())
        check_num_workers(tree, math.prod(mesh.shape[name] for name in names), "place")
        raise


def lie_on(leaves: Iterable[Any], mesh: Mesh) -> bool:
    """Whether all leaves are arrays on a mesh."""
    try:
        return all(x.sharding.mesh is mesh or x.sharding.mesh == mesh for x in leaves)
    except AttributeError:  # NumPy's, or on a single device
        return False


def split_over(x: jax.Array, mesh: Mesh, names: tuple, spec: PartitionSpec) -> jax.Array:
    """Split a traced array over axes of the workers as `spec` says; how it lies on other axes stays as it is.

    Where axes are Auto the compiler does so by itself. Where they are Explicit, `jax.shard_map` wants to be given it so.
    """
    if not is_explicit(mesh, names):
        return x
    now = spec_of(x)
    inner = [tuple(n for n in _axis.names(entry) if n not in names) for entry in now]
    own = [_axis.names(entry) for entry in spec] + [()] * (len(now) - len(spec))
    wanted = PartitionSpec(*(_entry((*a, *b)) for a, b in zip(own, inner, strict=True)))
    return x if wanted == now else jax.device_put(x, NamedSharding(mesh, wanted))


def spec_of(x: Any) -> PartitionSpec:
    """How the type of a traced array says that it is split, with an entry for every axis."""
    at = getattr(jax.typeof(x), "sharding", None)
    now = () if at is None or at.mesh.empty else tuple(at.spec)
    return PartitionSpec(*now, *(None,) * (jnp.ndim(x) - len(now)))


def left_to_the_compiler(mesh: Mesh, specs: Any) -> tuple[Callable, Mesh | None]:
    """What makes Explicit axes Auto inside of a function whose results are split as `specs` say, and the mesh inside.

    The links of a chain are written for whole arrays; many have no rule for Explicit shards. And jax 0.10 gathers what is
    split over Explicit axes that a `jax.shard_map` leaves alone.
    """
    if AxisType.Explicit not in mesh.axis_types:
        return lambda fun: fun, mesh
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return lambda fun: jax.sharding.auto_axes(fun, out_sharding=shardings), None


def _entry(names):
    return names[0] if len(names) == 1 else names or None


def is_explicit(mesh: Mesh, names: tuple) -> bool:
    """Whether types say how arrays are split over one of these axes."""
    return any(AxisType.Explicit == t for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if n in names)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    """`jax.device_put` of a value that every process has whole; across processes nothing travels.

    `jax.device_put` would send all of it to every process at every step, to see whether it is the same there.
    """
    if (
        isinstance(x, Tracer)
        or sharding.is_fully_addressable
        or not hasattr(x, "shape")
        or getattr(x, "weak_type", False)
    ):
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    if not jnp.issubdtype(x.dtype, jax.dtypes.extended):
        x = np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

"""A mesh of the same devices in reverse order, where worker i of M is at place M - 1 - i and does not notice.

Two programs with collectives in flight over the same devices in the same order get each other's messages. In reverse order the
devices have connections of their own. So a program may run there beside one that runs on the mesh itself. `bind` computes for
each worker what an equation is on the mesh: it numbers places from the other end, and turns the order of what was gathered.
"""

import functools
import math
from typing import Any

import jax
from jax import lax
from jax.extend.core import JaxprEqn
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from signopt import _axis
from signopt.workers import _shared

_QUIET = ("axis_index", "pvary", "pcast")  # they name axes, and nothing travels
_WITHOUT_ORDER = ("psum", "psum_invariant", "pmax", "pmin")
# Which parameter names the axis with a block for each worker, of what is given and of what is found.
_IN_ORDER = {
    "all_gather": (None, "all_gather_dimension"),
    "all_gather_invariant": (None, "all_gather_dimension"),
    "all_to_all": ("split_axis", "concat_axis"),
    "reduce_scatter": ("scatter_dimension", None),
}


def of(mesh: Mesh) -> Mesh:
    """The mesh in reverse order along each of its axes."""
    return Mesh(np.flip(mesh.devices), mesh.axis_names, axis_types=mesh.axis_types)


def moved(x: jax.Array, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """What each device holds, without a copy, as an array on a mesh in one order or the other."""
    lies: Any = x.sharding
    if lies.mesh == mesh:
        return x
    pieces = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(mesh, spec), pieces)


def communicates(eqn: JaxprEqn) -> bool:
    """Whether something travels between workers."""
    if any(communicates(inner) for jaxpr in jaxprs_in_params(eqn.params) for inner in jaxpr.eqns):
        return True
    return eqn.primitive.name not in _QUIET and bool(_axes(eqn))


def bind(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    """What an equation is for this worker.

    Raises:
      ValueError: If it is a collective whose order cannot be turned.
    """
    name, params = eqn.primitive.name, eqn.params
    if name == "axis_index":
        (place,) = _shared.bind(eqn, values)
        return [lax.axis_size(params["axis_name"]) - 1 - place]
    if not communicates(eqn):
        return _shared.bind(eqn, values)
    if name == "cond":
        branches = [functools.partial(_evaluate, branch) for branch in params["branches"]]
        return lax.switch(values[0], branches, *values[1:])
    if params.get("axis_index_groups") is None and name in _WITHOUT_ORDER:
        return _shared.bind(eqn, values)
    if params.get("axis_index_groups") is None and name in _IN_ORDER:
        size = math.prod(lax.axis_size(axis) for axis in _axes(eqn))
        before, after = _IN_ORDER[name]
        found = _shared.bind(eqn, [_turned(x, params[before], size) if before else x for x in values])
        return [_turned(x, params[after], size) if after else x for x in found]
    can = ", ".join(sorted((*_WITHOUT_ORDER, *_IN_ORDER)))
    raise ValueError(
        f"`on_mesh(hidden=...)` has to be False for a step that exchanges by {name!r}, got True. What can travel while a step "
        f"computes: {can}, also inside of `jax.lax.cond`."
    )


def _axes(eqn):
    """The axes of a mesh that an equation names."""
    entries = (eqn.params.get(name) for name in ("axes", "axis_name"))
    return tuple(n for entry in entries if entry is not None for n in _axis.names(entry) if isinstance(n, str))


def _evaluate(branch, *args):
    jaxpr, consts = _shared.opened(branch)
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        values |= zip(eqn.outvars, bind(eqn, [_shared.read(values, v) for v in eqn.invars]), strict=True)
    return [_shared.read(values, v) for v in jaxpr.outvars]


def _turned(x, axis, size):
    """`size` equal blocks along an axis, in reverse order."""
    blocks = x.reshape(*x.shape[:axis], size, x.shape[axis] // size, *x.shape[axis + 1 :])
    return lax.rev(blocks, (axis,)).reshape(x.shape)

"""Are all processes and replicas alike? What each process was given, and what lies on each device.

Each process traces, compiles and runs the step by itself, and JAX trusts that all do the same. A host with another library
version, another dtype, or another wire hangs in a collective at best. At worst its bits are read as something else, and
every vote is wrong. `assert_alike` compares processes before the first step.

Nothing in JAX keeps replicas equal but that they are computed alike. A flipped bit, or a device that rounds differently,
makes a replica that trains on by itself, with votes that still look like votes. `assert_in_sync` compares replicas at any
time.
"""

from collections.abc import Mapping
import functools
import hashlib
import json
import re
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import jaxlib
from jaxtyping import Array, Bool
import numpy as np
import optax

from signopt import _axis
from signopt.workers._fingerprint import fingerprint
from signopt.workers._fingerprint import mixed
from signopt.workers.state import owners

SHOWN = 3  # differences that an error names


def assert_alike(mesh: Mesh | None = None, **trees: Any) -> bool:
    """Check that all processes have trees of the same structure, shapes and dtypes, and the same versions.

    `on_mesh` does so by itself before its first step. In a loop of your own call it once before the loop, on every
    process: `assert_alike(state=state, batch=batch)`. Values are not looked at; `assert_in_sync` compares them.

    Args:
      mesh: The devices whose processes take part; those of all processes if None.
      **trees: What to compare, by the name that an error calls it.

    Returns:
      True. With one process there is nothing to compare.

    Raises:
      ValueError: On every process, if they differ, naming the leaf or the library, and the processes.

    Examples:
      >>> import jax.numpy as jnp
      >>> from signopt.workers import assert_alike
      >>> assert_alike(state={"w": jnp.zeros(3)})
      True
    """
    if mesh is None:
        mesh = Mesh(np.array(jax.devices()), ("device",))
    compare(describe(**trees), mesh, "assert_alike")
    return True


def assert_in_sync(state: Any, *, axis_name: _axis.AxisName = None) -> Bool[Array, ""] | bool:
    """Check that shared values are the same on every worker, bit for bit.

    Every leaf outside a `PerWorkerState` is hashed to 32 bits where it lies, at about the cost of reading it, and only
    hashes are compared. A change within one 32-bit word is always seen, any other unless hashes collide, which one in
    four billion do.

    Args:
      state: A training state. Under `pmap` without `num_workers` momentum is one worker's own but does not say so: pass
        what is shared, such as the parameters.
      axis_name: Inside a step: the workers, as in `majority_vote`. Each then sends 4 bytes, and nothing is raised. None
        outside of jit, where the replicas on the devices of all hosts are compared; leaves on one device have none.

    Returns:
      Whether all agree; inside a step a traced boolean, the same on every worker, to be returned as a metric.

    Raises:
      ValueError: Outside of jit, if a leaf differs between devices, naming the leaf and the devices; if `state` is
        traced and `axis_name` is None.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from signopt.workers import assert_in_sync
      >>> params = jnp.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0000002]])  # one replica a row, as under pmap
      >>> check = jax.vmap(lambda x: assert_in_sync(x, axis_name="worker"), axis_name="worker")
      >>> check(params[:2]).tolist(), check(params).tolist()
      ([True, True], [False, False, False])
    """
    named = jax.tree.leaves_with_path(state)
    shared = [
        (path, x) for (path, x), owner in zip(named, jax.tree.leaves(owners(state)), strict=True) if owner == "shared"
    ]
    if axis_name is not None:
        _axis.size(axis_name, "assert_in_sync")
        own = jnp.sum(mixed(fingerprint([x for _, x in shared])), dtype=jnp.uint32)
        everybody = _axis.gather_scalar(own, axis_name).ravel()
        return jnp.all(everybody == everybody[0])
    if any(isinstance(x, Tracer) for _, x in shared):
        raise ValueError(
            "`assert_in_sync(axis_name=...)` has to name the workers where values are traced, got None. Pass it and return "
            "the flag from the step, or call it outside of `jax.jit`."
        )
    by_mesh = {}
    for path, x in shared:
        if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1:
            by_mesh.setdefault(_mesh_of(path, x), []).append((path, x))
    for mesh, leaves in by_mesh.items():
        _compare_copies(leaves, mesh)
    return True


def compare_arguments(mesh: Mesh, caller: str, *, state: Any, batch: Any) -> None:
    """Raise a `ValueError` on every process if what `caller` was given, shared values included, differs between them."""
    compare(describe(state=state, batch=batch) | values(state=state), mesh, caller)
    if any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in jax.tree.leaves(state)):
        assert_in_sync(state)


def compare_program(mesh: Mesh, caller: str, program: str) -> None:
    """Raise a `ValueError` on every process if they are about to run other programs."""
    compare({"the compiled step (its code, wire and constants)": digest(program)}, mesh, caller)


def describe(**trees: Any) -> dict[str, str]:
    """Write down versions, and the name, shape and dtype of every leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> from signopt.workers.check import describe
      >>> [*describe(state={"w": jnp.zeros(3)}).items()][-1]
      ("`state['w']`", 'float32[3]')
    """
    from signopt import __version__  # the package is not there yet when it imports this file

    about = {"signopt": __version__}
    about |= {library.__name__: library.__version__ for library in (jax, jaxlib, optax)}
    for name, tree in trees.items():
        about[f"the structure of `{name}`"] = str(jax.tree.structure(tree))
        for path, x in jax.tree.leaves_with_path(tree):
            about[f"`{name}{jax.tree_util.keystr(path)}`"] = jax.typeof(x).str_short()
    return about


def values(**trees: Any) -> dict[str, str]:
    """Hash the shared values that this process has whole; those on a mesh are `assert_in_sync`'s."""
    leaves = {}
    for name, tree in trees.items():
        named = jax.tree.leaves_with_path(tree)
        for (path, x), owner in zip(named, jax.tree.leaves(owners(tree)), strict=True):
            if owner == "shared" and (not isinstance(x, jax.Array) or x.is_fully_addressable):
                leaves[f"the values of `{name}{jax.tree_util.keystr(path)}`"] = x
    hashes = np.asarray(jax.jit(fingerprint)([*leaves.values()])).tolist()
    return {name: f"{found:08x}" for name, found in zip(leaves, hashes, strict=True)}


def digest(program: str) -> str:
    """Hash a lowered program, but for where this process keeps its callbacks."""
    lines = (re.sub(r"\d+", "", line) if "callback" in line else line for line in program.splitlines())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def compare(about: Mapping[str, str], mesh: Mesh, caller: str) -> None:
    """Raise a `ValueError` on every process of a mesh if they do not say the same."""
    leaders = {device.process_index: device for device in mesh.devices.flat[::-1]}
    if len(leaders) < 2:
        return
    text = json.dumps(dict(about)).encode()
    heads = _gather(hashlib.sha256(text).digest() + len(text).to_bytes(8, "little"), leaders)
    if len({head.tobytes() for head in heads.values()}) == 1:
        return
    longest = max(int.from_bytes(head[-8:].tobytes(), "little") for head in heads.values())
    texts = _gather(text.ljust(longest), leaders)
    by_process = {process: json.loads(row.tobytes()) for process, row in sorted(texts.items())}
    names = dict.fromkeys(name for own in by_process.values() for name in own)
    differ = [name for name in names if len({own.get(name) for own in by_process.values()}) > 1]
    # Another leaf says more than other values, and the tree around it.
    ranked = [[], [], []]
    for name in differ:
        ranked[name.startswith("the values of ") + 2 * name.startswith("the structure of ")].append(name)
    differ = next(group for group in ranked if group)
    more = f", and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
    raise ValueError(
        f"`{caller}(...)` has to be given the same on every process, with the same versions, got "
        + "; ".join(_who_has_what(name, by_process) for name in differ[:SHOWN])
        + f"{more}. Start all processes from the same code, flags, seeds and environment."
    )


def _gather(data: bytes, leaders: Mapping[int, Any]) -> dict[int, np.ndarray]:
    """As many bytes of every process, by its number."""
    from jax.experimental import multihost_utils  # imports all of jax.experimental's multihost machinery

    order = sorted(leaders)
    mesh = Mesh(np.array([leaders[process] for process in order]), ("process",))
    row = np.frombuffer(data, np.uint8)[None]
    spread = jax.make_array_from_callback(
        (len(order), len(data)), NamedSharding(mesh, PartitionSpec("process")), lambda _: row
    )
    rows = np.asarray(multihost_utils.process_allgather(spread, tiled=True))
    return dict(zip(order, rows, strict=True))


def _who_has_what(name, by_process):
    """`name` 1 on process 0 and 2 on processes 1, 2."""
    groups = {}
    for process, own in by_process.items():
        groups.setdefault(own.get(name, "missing"), []).append(str(process))
    said = [
        f"{value} on process{'es' if len(members) > 1 else ''} {', '.join(members)}"
        for value, members in groups.items()
    ]
    return f"{name} {' and '.join(said)}"


def _mesh_of(path, x):
    if not isinstance(x.sharding, NamedSharding):
        raise ValueError(
            "`assert_in_sync(state)` has to be given arrays that lie on a mesh or on one device, got "
            f"{type(x.sharding).__name__} at `state{jax.tree_util.keystr(path)}`. Call it inside the step, with `axis_name`."
        )
    return x.sharding.mesh


def _compare_copies(leaves, mesh):
    """Raise if copies of one piece of a leaf differ between the devices of a mesh."""
    specs = tuple(x.sharding.spec for _, x in leaves)
    found = _hash_where_it_lies(mesh, specs)(tuple(x for _, x in leaves))
    if not found.is_fully_addressable:  # some of its devices are another process's
        from jax.experimental import multihost_utils  # imports all of jax.experimental's multihost machinery

        found = multihost_utils.process_allgather(found, tiled=True)
    by_device = dict(zip(mesh.devices.flat, np.asarray(found), strict=True))
    for i, (path, x) in enumerate(leaves):
        copies = {}
        for device, piece in x.sharding.devices_indices_map(x.shape).items():
            copies.setdefault(str(piece), {}).setdefault(int(by_device[device][i]), []).append(device)
        for hashes in copies.values():
            if len(hashes) > 1:
                most, *rest = sorted(hashes.values(), key=len, reverse=True)
                odd = ", ".join(str(device) for group in rest for device in group)
                raise ValueError(
                    "`assert_in_sync(state)` has to be given shared values that are the same on every worker, got others at "
                    f"`state{jax.tree_util.keystr(path)}` on {odd} than on {len(most)} of "
                    f"{sum(map(len, hashes.values()))} devices. Go on from a checkpoint, and look for what each worker "
                    "computes by itself: hardware, library versions, random keys, data-dependent control flow."
                )


@functools.lru_cache(maxsize=8)
def _hash_where_it_lies(mesh, specs):
    """A row of fingerprints for each device of a mesh; kept, because a fresh jit would compile at every check."""
    mapped = jax.shard_map(
        lambda leaves: fingerprint(leaves)[None],
        mesh=mesh,
        in_specs=(specs,),
        out_specs=PartitionSpec(mesh.axis_names),
        check_vma=False,
    )
    return jax.jit(mapped)

"""Whether all processes are about to run the same: what each was given, compared before the first step.

With several processes each traces, compiles and runs the step by itself, and JAX takes it on trust that all do the same. A
host with another library version, another dtype, or another wire hangs in a collective at best; at worst its bits are read
as something else, and every vote is wrong.
"""

from collections.abc import Mapping
import hashlib
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import jaxlib
import numpy as np
import optax

from signopt.workers.state import owners
from signopt.workers.sync import fingerprint

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


def put(x: Any, sharding: NamedSharding) -> jax.Array:
    """`jax.device_put` of a value that every process has whole; across processes nothing travels.

    `jax.device_put` would send all of it to every process at every step, to see whether it is the same there.
    """
    here = not isinstance(x, jax.Array) or x.is_fully_addressable
    if sharding.is_fully_addressable or not here or not hasattr(x, "shape") or getattr(x, "weak_type", False):
        return jax.device_put(x, sharding)
    if not jnp.issubdtype(x.dtype, jax.dtypes.extended):
        x = np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


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

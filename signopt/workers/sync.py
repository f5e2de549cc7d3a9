"""Whether shared values are still the same on every worker: a fingerprint of their bits, compared.

Nothing in JAX keeps replicas equal but that they are computed alike. A flipped bit, one host with another library version,
or a device that rounds differently make replicas that train on, each for itself, with votes that still look like votes.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, UInt32
import numpy as np

from signopt import _axis
from signopt.workers.state import owners


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
        own = jnp.sum(_mixed(fingerprint([x for _, x in shared])), dtype=jnp.uint32)
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
            by_mesh.setdefault(_mesh(path, x), []).append((path, x))
    for mesh, leaves in by_mesh.items():
        _compare(leaves, mesh)
    return True


def fingerprint(tree: Any) -> UInt32[Array, " leaves"]:
    r"""Hash the bits of every leaf, with their places.

    .. math::
      h = \sum_i f(w_i \oplus k_i) \bmod 2^{32},

    over the words :math:`w_i` of a leaf, with f the finalizer of MurmurHash3, a bijection, and a key for each place. A
    change of one word always changes the hash.

    Args:
      tree: Arrays of any dtype, random keys included.

    Returns:
      A number for each leaf.
    """
    hashes = [
        jnp.sum(_mixed(_words(jnp.asarray(x)), 1 + i), dtype=jnp.uint32) for i, x in enumerate(jax.tree.leaves(tree))
    ]
    return jnp.stack(hashes) if hashes else jnp.zeros([0], jnp.uint32)


def _words(x):
    """The bits of an array as flat 32-bit words; a smaller number fills one with zeros in front."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    width = min(x.dtype.itemsize, 4)
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * width}")).ravel().astype(jnp.uint32)


def _mixed(words, leaf=0):
    """MurmurHash3's finalizer of each word, with its place in it."""
    place = lax.iota(jnp.uint32, words.size) * jnp.uint32(0x9E3779B9) + jnp.uint32(0x85EBCA6B * leaf % 2**32)
    h = words ^ place
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _mesh(path, x):
    if not isinstance(x.sharding, NamedSharding):
        raise ValueError(
            "`assert_in_sync(state)` has to be given arrays that lie on a mesh or on one device, got "
            f"{type(x.sharding).__name__} at `state{jax.tree_util.keystr(path)}`. Call it inside the step, with `axis_name`."
        )
    return x.sharding.mesh


def _compare(leaves, mesh):
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

"""Dealing and gathering among two or four workers, in processes on CPUs, by all-reduces.

Between processes on CPUs JAX's collectives are gloo's. Its `all_to_all` lets the two directions of a connection take turns: a
host that comes second writes all of its message before its "ready to receive", so the other's message waits. Its all-reduce
cuts a message into pieces, which travel both ways at once. So two workers *swap* words by adding them up::

  theirs = (mine + theirs) - mine

which is exact, since words are unsigned and wrap around, and sends the same bytes. Four workers deal in three swaps, each with
one of the others; more would lose more to waiting than they gain. What it gains: `slow_network` in experiments/README.md.
"""

from collections.abc import Hashable

import jax
from jax import lax
import jax.numpy as jnp

# A swap waits longer than JAX's own exchange, by milliseconds where processes share cores; smaller messages gain less.
_LARGE = 2**16  # bytes


def should_deal(rows: jax.Array) -> bool:
    """Whether rows like these, one for each worker, are dealt by `all_to_all` below."""
    return len(rows) in (2, 4) and _pays(rows.size // len(rows), rows.dtype)


def should_gather(x: jax.Array, num_workers: int) -> bool:
    """Whether something like this from each worker is gathered by `all_gather` below."""
    return num_workers == 2 and _pays(x.size, x.dtype)


def _pays(size: int, dtype: jnp.dtype) -> bool:
    """Whether a message is better swapped: large, of words, in a run of several processes on CPUs.

    Nothing tells here whether the workers of an axis are in different processes. Where they are not, swaps only cost time.
    """
    between_processes_on_cpus = jax.process_count() > 1 and jax.default_backend() == "cpu"
    is_large = size * dtype.itemsize >= _LARGE
    return between_processes_on_cpus and is_large and jnp.issubdtype(dtype, jnp.unsignedinteger)


def all_to_all(rows: jax.Array, devices: tuple[Hashable, ...]) -> jax.Array:
    """Row j of everybody's `rows` to worker j; each has them in an order of its own.

    Args:
      rows: Words, a row for each of two or four workers.
      devices: The axes of the workers.

    Returns:
      An array like `rows`.
    """
    me, num_workers = lax.axis_index(devices), len(rows)
    others = [_swap(rows[me ^ distance], devices, num_workers, distance) for distance in range(1, num_workers)]
    return jnp.stack([rows[me], *others])


def all_gather(x: jax.Array, devices: tuple[Hashable, ...]) -> jax.Array:
    """Both workers' `x`, concatenated along the last axis, the same on each.

    Args:
      x: Words.
      devices: The axes of two workers.

    Returns:
      Twice as many words.
    """
    theirs = _swap(x, devices, 2, 1)
    first = lax.axis_index(devices) == 0
    both = jnp.concatenate([jnp.where(first, x, theirs), jnp.where(first, theirs, x)], axis=-1)
    # With itself alone: types learn that it is the same on each, and XLA computes a word once, not for each of its bits.
    return lax.psum_p.bind(both, axes=devices, axis_index_groups=((0,), (1,)))


def _swap(words: jax.Array, devices: tuple[Hashable, ...], num_workers: int, distance: int) -> jax.Array:
    """What worker `me ^ distance` has passed."""
    pairs = tuple((i, i ^ distance) for i in range(num_workers) if i < i ^ distance)
    # The primitive, because under check_vma `lax.psum` takes no groups; the difference is typed as each worker's own.
    return lax.psum_p.bind(words, axes=devices, axis_index_groups=pairs) - words

"""Dealing and gathering among two or four workers, in processes on CPUs, by all-reduces.

Between processes on CPUs JAX's collectives are gloo's. Its `all_to_all` lets the two directions of a connection take turns: a
host that comes second writes all of its message before its "ready to receive", so the other's message waits. Its all-reduce
cuts a message into pieces, which travel both ways at once. So two workers *swap* words by adding them up::

  theirs = (mine + theirs) - mine

which is exact, since words are unsigned and wrap around, and sends the same bytes. Four workers deal in three swaps, each with
one of the others; more would lose more to waiting than they gain. What it gains, `slow_network` measures. The order of workers is lost, which a vote does not mind and a sum of floats does, so
it is no part of the library.
"""

from collections.abc import Callable, Hashable
import functools
from unittest import mock

import jax
from jax import lax
import jax.numpy as jnp

from signopt import _axis

# A swap waits longer than JAX's own exchange, by milliseconds where processes share cores; smaller messages gain less.
LARGE = 2**16  # bytes


def instead(update: Callable) -> Callable:
    """The update of a vote with swaps for its collectives, where there are few enough workers and a large message."""
    deal, gather = _axis.all_to_all, _axis.all_gather

    def dealt(rows, devices):
        if len(rows) not in (2, 4) or not _is_large(rows[0]):
            return deal(rows, devices)
        return all_to_all(rows.reshape(len(rows), -1), devices).reshape(rows.shape)

    def gathered(rows, devices):
        if lax.axis_size(devices) != 2 or not _is_large(rows):
            return gather(rows, devices)
        return all_gather(rows.reshape(-1), devices).reshape(-1, *rows.shape[1:])

    @functools.wraps(update)
    def swapped(*args, **kwargs):
        with mock.patch.object(_axis, "all_to_all", dealt), mock.patch.object(_axis, "all_gather", gathered):
            return update(*args, **kwargs)

    return swapped


def _is_large(message):
    return message.size * message.dtype.itemsize >= LARGE and jnp.issubdtype(message.dtype, jnp.unsignedinteger)


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
